"""Drawing while the prompt is being typed: a small picture beside it, in one call of the network.

The page asks some time after the last key (``javascript/wadi.js``), and the newest request alone is drawn. It takes the
program's lock only when nobody has it, so whoever pressed Generate goes first. Nothing is saved, and what the program
remembers of the last picture stays.
"""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from html import escape
from typing import Any

import gradio as gr
from modules import processing, shared
from modules.call_queue import queue_lock

from wadi_core import entries
from wadi_core.files import one_line
from wadi_core.settings import SAMPLER as NAME

from . import catalog, host, large, tags
from .passes import Passes

SEED = 1  # where the page leaves the seed to chance: a picture that changes with every letter shows nothing
LOOKS_EVERY = 0.01  # seconds, while somebody else draws
QUALITY = 90
COUNTS = {"asked": 0, "drawn": 0, "stale": 0}
# Of the program's command line: what would write on its console and into its file of the last picture.
_QUIET = ("no_prompt_history", "disable_console_progressbars")

_counting = threading.Lock()


class Newest:
    """The number of the newest request of one open page."""

    def __init__(self) -> None:
        self.number = 0

    def next(self) -> int:
        with _counting:
            self.number += 1
            COUNTS["asked"] += 1
            return self.number


def draw(
    newest: Newest,
    on: bool,
    enabled: bool,
    name: str,
    strength: float,
    method: str,
    prompt: str,
    styles: list[str] | None,
    width: float,
    height: float,
    seed: float | str | None,
) -> Any:
    """The picture as HTML for its place beside the prompt; no change there for a request that is no longer the newest.

    Args:
        newest: of the page.
        on: whether drawing while typing is switched on.
        enabled, name, strength, method: as the panel has them.
        prompt, styles, width, height, seed: as the page has them.
    """
    if not on:
        return ""
    number = newest.next()
    while not queue_lock.acquire(blocking=False):
        if number != newest.number:
            return _stale()
        time.sleep(LOOKS_EVERY)
    try:
        if number != newest.number:
            return _stale()
        own = "" if not enabled or name in (None, "", catalog.NONE) else tags.tag(name, strength)
        begin = time.perf_counter()
        picture, said, used = _picture(own, method, prompt, styles or [], int(width), int(height), _seed(seed))
        with _counting:
            COUNTS["drawn"] += 1
        return _html(picture, f"seed {used}, {time.perf_counter() - begin:.2f} s", said)
    except (OSError, ValueError, RuntimeError) as error:
        return f'<div class="wadi-live"><span class="wadi-warning">⚠ {escape(one_line(error))}</span></div>'
    finally:
        queue_lock.release()


def _picture(
    own: str, method: str, prompt: str, styles: list[str], width: int, height: int, seed: int
) -> tuple[Any, list[str], int]:
    """The picture, what there is to say of it, and its seed; the program's lock is held."""
    p = processing.StableDiffusionProcessingTxt2Img(
        prompt="", seed=seed, sampler_name=NAME, scheduler="Automatic", steps=1, cfg_scale=1.0, width=width, height=height,
        do_not_save_samples=True, do_not_save_grid=True,
    )  # fmt: skip
    p.wadi_live = True
    p.wadi_large = method if method in large.CHOICES else large.OFF
    p.wadi_passes = Passes.of(p)
    written = shared.prompt_styles.apply_styles_to_prompt(prompt, styles)
    p.prompt = tags.prepare([written], own, lambda sentence: host.tell(p, sentence))[0]
    with _quiet(), closing(p):
        shared.state.begin(job="wadi-live")
        try:
            made = processing.process_images(p)
        finally:
            shared.state.end()
            shared.state.job, shared.state.job_count = "", 0
    if not made.images:
        raise ValueError("there is no picture: it was interrupted")
    return made.images[0], list(p.comments), seed


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is written on the console, nor into the program's file of the last picture."""
    before = {name: getattr(shared.cmd_opts, name, False) for name in _QUIET}
    for name in _QUIET:
        setattr(shared.cmd_opts, name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(shared.cmd_opts, name, value)


def _stale() -> Any:
    with _counting:
        COUNTS["stale"] += 1
    return gr.update()


def _seed(asked: float | str | None) -> int:
    try:
        number = entries.whole(str(asked if asked is not None else "").removesuffix(".0"))
    except ValueError:
        return SEED
    return number if number >= 0 else SEED


def _html(picture: Any, caption: str, said: list[str]) -> str:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=QUALITY)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    warnings = "".join(f'<span class="wadi-warning">⚠ {escape(one)}</span>' for one in said[:2])
    return f'<div class="wadi-live"><img src="{source}" alt="live preview"><span>{escape(caption)}</span>{warnings}</div>'
