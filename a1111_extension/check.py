"""The check line of the panel: how a LoRaD fits the chosen checkpoint, and what else stands in the way of a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from html import escape
from pathlib import Path

from wadi_core.lorad import LoRaD, check_together
from wadi_core.lorad.weights import Weights
from wadi_core.settings import SAMPLER as NAME

from . import catalog, host, large, schedule, tags


def line(
    name: str,
    strength: float,
    sampler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    prompt: str = "",
    in_one_piece: bool = False,
) -> str:
    """The line as HTML: what fits, and warnings behind it. Never raises for a file that cannot be used: it says so.

    Args:
        name: of the LoRaD, as in the list.
        sampler, width, height, prompt: what is set on the page; None or nothing where that is not known.
        in_one_piece: whether pictures larger than native are seen to.
    """
    facts: list[str] = []
    warnings: list[str] = []
    try:
        asked = list(_asked(name, strength, prompt, warnings))
        facts += [_fact(*one) for one in asked] or [_checkpoint_fact()]
        warnings += _warnings(asked, sampler, *((None, None) if in_one_piece else (width, height)))
    except (OSError, ValueError) as error:
        warnings.append(str(error))
    said = [f"<span>{escape(fact)}</span>" for fact in facts]
    said += [f'<span class="wadi-warning">⚠ {escape(warning)}</span>' for warning in warnings]
    return f'<div class="wadi-check">{"<br>".join(said)}</div>'


def size_note(lorad: LoRaD, width: int, height: int) -> str | None:
    """What to say of a picture that is larger than those a LoRaD was trained on; None if it is not."""
    native = large.native_of(lorad)
    if native is None or width * height <= native[0] * native[1]:
        return None
    return (
        f"the LoRaD was trained at {native[0]}x{native[1]}, and in a larger picture parts repeat: choose shrink or redilate "
        "in the panel, which keeps it in one piece"
    )


def sampler_note(name: str, sampler: str) -> str:
    """What to say of a one-step LoRaD with another sampler."""
    return f"{name} is made for one step: choose the sampler {NAME} instead of {sampler}"


def _asked(name: str, strength: float, prompt: str, warnings: list[str]) -> Iterator[tuple[str, float, LoRaD]]:
    """Name, strength and content of the panel's LoRaD and of those in the prompt; of what cannot be read, a warning."""
    chosen = [] if name == catalog.NONE else [(name, strength, True)]
    read = list(tags.read(prompt))
    warnings += [f"{tag.text}: {tag.wrong}" for tag in read if tag.wrong]
    for name, strength, by_panel in [*chosen, *((tag.name, tag.strength, False) for tag in read if not tag.wrong)]:
        file = catalog.file_of(name)
        try:
            lorad = None if file is None else catalog.look(file)
        except (OSError, ValueError) as error:
            warnings.append(f"{name}: {error}")
            continue
        if lorad is not None:
            yield name, strength, lorad
        elif file is None:
            warnings.append(f"{name}: {tags.no_file(name)}")
        elif by_panel:
            warnings.append(f"{name}: this is no LoRaD")


def _checkpoint_fact() -> str:
    checkpoint = host.checkpoint_file()
    own = schedule.of_checkpoint(checkpoint)
    known = f"a one-step network, alpha_T^2 {own.alpha_T_squared:g}" if own else "a multi-step network"
    return f"{_title(checkpoint)}: {host.layout().architecture}, {known}"


def _fact(name: str, strength: float, lorad: LoRaD) -> str:
    checkpoint = host.checkpoint_file()
    match = lorad.matched(host.layout().network)
    said = [f"{name}: {match}"]
    if lorad.one_step:
        said.append(f"one step at t {lorad.one_step.timestep}, alpha_T^2 {lorad.one_step.alpha_T_squared:g}")
    else:
        said.append("an ordinary adapter: sampling stays as it is")
    if strength != 1.0:
        said.append(f"angles times {strength:g}")
    title, trained_on = _title(checkpoint), lorad.metadata.base_sha256
    same = None if match.problems or trained_on is None else _same_base(checkpoint, trained_on)
    said.append({True: f"made for {title}", False: f"made for another base than {title}", None: f"on {title}"}[same])
    return "; ".join(said)


def _title(checkpoint: Path | None) -> str:
    return checkpoint.name if checkpoint else "the checkpoint"


def _warnings(
    asked: list[tuple[str, float, LoRaD]], sampler: str | None, width: int | None, height: int | None
) -> Iterator[str]:
    network = host.layout().network
    for _, _, lorad in asked:
        yield from lorad.matched(network).problems[:3]
    own = schedule.of_checkpoint(host.checkpoint_file())
    one_step = [(name, lorad) for name, strength, lorad in asked if lorad.one_step and strength]
    if not one_step:
        if sampler == NAME and own is None:
            yield schedule.UNKNOWN
        return
    if own is not None:
        yield "the checkpoint is a one-step network already: this LoRaD is made for a multi-step one"
    try:
        check_together(lorad for _, lorad in one_step)
    except ValueError as error:
        yield str(error)
    name, lorad = one_step[0]
    if sampler is not None and sampler != NAME:
        yield sampler_note(name, sampler)
    note = size_note(lorad, int(width or 0), int(height or 0))
    if note:
        yield note


def _same_base(checkpoint: Path | None, trained_on: str) -> bool | None:
    """Whether a checkpoint is the base that an adapter names; None where that cannot be known."""
    if checkpoint is None or checkpoint.suffix.lower() != catalog.ENDING:
        return None
    return _checksum(checkpoint, os.stat(checkpoint).st_mtime_ns) == trained_on


@lru_cache(maxsize=8)
def _checksum(checkpoint: Path, changed: int) -> str:
    return Weights.open(checkpoint).sha256()
