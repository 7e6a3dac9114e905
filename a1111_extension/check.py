"""What the panel says of the settings of the page before a picture is drawn: what fits, and what stands in its way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from pathlib import Path

from modules import sd_models, shared

from wadi_core.lorad import LoRaD, check_together
from wadi_core.lorad.weights import Weights
from wadi_core.settings import SAMPLER as NAME

from . import catalog, host, large, schedule, tags
from .passes import SAME, target_size

CLIP_SKIP = "CLIP_stop_at_last_layers"  # among the program's settings
BASE = "wadi.base"  # in a file's metadata: the base on the hub that it was extracted from


@dataclass(frozen=True)
class Page:
    """What is set on the page; None or nothing where that is not known.

    Attributes:
        sampler, width, height, prompt: of the first pass.
        hires, scale, wide, high, second: of the hires pass: whether there is one, by what factor or to which sides it
            enlarges, and its sampler.
        large: how pictures larger than native are drawn, one of ``large.CHOICES``.
        enabled: whether the panel's LoRaD is switched on.
    """

    sampler: str | None = None
    width: int | None = None
    height: int | None = None
    prompt: str = ""
    hires: bool = False
    scale: float | None = None
    wide: int | None = None
    high: int | None = None
    second: str | None = None
    large: str = large.OFF
    enabled: bool = True

    @property
    def second_size(self) -> tuple[int, int] | None:
        """Width and height of a hires pass that is drawn in one step; None where there is none."""
        second = self.sampler if self.second in (None, "", SAME) else self.second
        if not self.hires or second != NAME or not self.width or not self.height:
            return None
        return target_size(int(self.width), int(self.height), self.scale or 1.0, int(self.wide or 0), int(self.high or 0))


@dataclass
class Found:
    """What there is to say.

    Attributes:
        facts: what fits, a sentence for each adapter.
        warnings: what does not, the gravest first.
        native: width and height to draw at instead, where a pass is larger than that.
        asked: names and strengths of the LoRaDs at work.
    """

    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    native: tuple[int, int] | None = None
    asked: list[tuple[str, float]] = field(default_factory=list)

    @property
    def facts_html(self) -> str:
        return _block("wadi-check", [f"<span>{escape(fact)}</span>" for fact in self.facts])

    @property
    def warnings_html(self) -> str:
        if not self.warnings:
            return ""
        return _block("wadi-notes", [f'<span class="wadi-warning">⚠ {escape(warning)}</span>' for warning in self.warnings])

    @property
    def state_html(self) -> str:
        """What stands in the panel's header, also while it is closed."""
        said = " + ".join(f"{name} {strength:g}" for name, strength in self.asked)
        mark = f' <b class="wadi-warning">⚠ {len(self.warnings)}</b>' if self.warnings else ""
        return f'<span class="wadi-state">{escape(said)}{mark}</span>'


def look(name: str, strength: float, page: Page) -> Found:
    """Look at what is set. Never raises for a file that cannot be used: it says so.

    Args:
        name, strength: of the panel's LoRaD, as in the list.
    """
    found = Found()
    try:
        asked = list(_asked(name, strength, page, found.warnings))
        found.asked = [(name, strength) for name, strength, _ in asked]
        found.facts += [_fact(*one) for one in asked] or [_checkpoint_fact()]
        found.warnings += _warnings(asked, page)
        found.native, notes = _size(asked, page)
        found.warnings += notes
        if name != catalog.NONE and not page.enabled:
            idle = switched_off(name)
            one_step = any(lorad.one_step for *_, lorad in asked)
            (found.warnings if page.sampler == NAME and not one_step else found.facts).insert(0, idle)
    except (OSError, ValueError) as error:
        found.warnings.append(str(error))
    return found


def line(
    name: str,
    strength: float,
    sampler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    prompt: str = "",
    **page: object,
) -> str:
    """All that is said, as HTML; ``page`` as of :class:`Page`."""
    found = look(name, strength, Page(sampler, width, height, prompt, **page))  # type: ignore[arg-type]
    return found.facts_html + found.warnings_html


def size_note(lorad: LoRaD, width: int, height: int, second: bool = False) -> str | None:
    """What to say of a pass that is larger than the pictures a LoRaD was trained on; None if it is not."""
    native = large.native_of(lorad)
    if native is None or width * height <= native[0] * native[1]:
        return None
    what = f"the hires pass draws at {width}x{height}, " if second else ""
    return (
        f"{what}the LoRaD was trained at {native[0]}x{native[1]}, and in a larger picture parts repeat: draw at that size, or "
        "choose redilate or shrink in the panel, which keeps it in one piece"
    )


def sampler_note(name: str, sampler: str) -> str:
    """What to say of a one-step LoRaD with another sampler."""
    return f"{name} is made for one step: choose the sampler {NAME} instead of {sampler}"


def switched_off(name: str) -> str:
    """What to say of a LoRaD that is chosen in the panel and not switched on."""
    return f"{name} is chosen in the panel and not switched on: tick WaDi to use it"


def clip_skip_note() -> str | None:
    """What to say of the program's setting by which the prompt is read; None where it is the one of the core.

    A1111 does not follow it for Stable Diffusion 2.
    """
    skip = int(getattr(shared.opts, CLIP_SKIP, 1) or 1)
    if skip == 1:
        return None
    try:
        if host.layout().architecture == "sd21" and not hasattr(sd_models.model_data.sd_model, "forge_objects"):
            return None
    except (OSError, ValueError):  # told where it matters
        return None
    return f"Clip skip is {skip}, one-step weights know prompts as read with 1: set Clip skip to 1 on the settings page"


def _block(kind: str, lines: list[str]) -> str:
    return f'<div class="{kind}">{"<br>".join(lines)}</div>'


def _asked(name: str, strength: float, page: Page, warnings: list[str]) -> Iterator[tuple[str, float, LoRaD]]:
    """Name, strength and content of the panel's LoRaD and of those in the prompt; of what cannot be read, a warning."""
    chosen = [(name, strength, True)] if name != catalog.NONE and page.enabled else []
    read = list(tags.read(page.prompt))
    warnings += [f"{tag.text}: {tag.wrong}" for tag in read if tag.wrong]
    seen: list[Path] = []
    for name, strength, by_panel in [*chosen, *((tag.name, tag.strength, False) for tag in read if not tag.wrong)]:
        file = catalog.file_of(name)
        try:
            lorad = None if file is None else catalog.look(file)
        except (OSError, ValueError) as error:
            warnings.append(f"{name}: {error}")
            continue
        if file is None:
            warnings.append(f"{name}: {tags.no_file(name)}")
        elif lorad is None:
            warnings += [f"{name}: this is no LoRaD"] if by_panel else []
        elif any(tags.same(file, other) for other in seen):
            warnings += [tags.twice(name)] if strength else []
        else:
            seen += [file] if strength else []
            yield name, strength, lorad


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
        native = large.native_of(lorad)
        size = f", native {native[0]}x{native[1]}" if native else ""
        said.append(f"one step at t {lorad.one_step.timestep}, alpha_T^2 {lorad.one_step.alpha_T_squared:g}{size}")
    else:
        said.append("an ordinary adapter: sampling stays as it is")
    if strength != 1.0:
        said.append(f"angles times {strength:g}")
    title, trained_on = _title(checkpoint), lorad.metadata.base_sha256
    same = None if match.problems or trained_on is None else _same_base(checkpoint, trained_on)
    said.append({True: f"made for {title}", False: f"made for another base than {title}", None: f"on {title}"}[same])
    base = lorad.metadata.extra.get(BASE, "").partition("@")[0]
    if base and not same:
        said.append(f"its base is {base}")
    return "; ".join(said)


def _title(checkpoint: Path | None) -> str:
    return checkpoint.name if checkpoint else "the checkpoint"


def _warnings(asked: list[tuple[str, float, LoRaD]], page: Page) -> Iterator[str]:
    network = host.layout().network
    for _, _, lorad in asked:
        yield from lorad.matched(network).problems[:3]
    own = schedule.of_checkpoint(host.checkpoint_file())
    one_step = [(name, lorad) for name, strength, lorad in asked if lorad.one_step and strength]
    skipped = clip_skip_note()
    if skipped and (one_step or page.sampler == NAME):
        yield skipped
    if not one_step:
        if page.sampler == NAME and own is None:
            yield schedule.UNKNOWN
        return
    if own is not None:
        yield "the checkpoint is a one-step network already: this LoRaD is made for a multi-step one"
    try:
        check_together(lorad for _, lorad in one_step)
    except ValueError as error:
        yield str(error)
    if page.sampler is not None and page.sampler != NAME:
        yield sampler_note(one_step[0][0], page.sampler)


def _size(asked: list[tuple[str, float, LoRaD]], page: Page) -> tuple[tuple[int, int] | None, list[str]]:
    """The size to draw at instead, and what to say, where a pass is larger than native and nothing keeps it in one piece."""
    lorad = next((lorad for _, strength, lorad in asked if lorad.one_step and strength), None)
    if lorad is None or page.large != large.OFF:
        return None, []
    first = size_note(lorad, int(page.width or 0), int(page.height or 0))
    second = size_note(lorad, *page.second_size, second=True) if page.second_size else None
    notes = [note for note in (first, second) if note]
    return (large.native_of(lorad) if notes else None), notes


def _same_base(checkpoint: Path | None, trained_on: str) -> bool | None:
    """Whether a checkpoint is the base that an adapter names; None where that cannot be known."""
    if checkpoint is None or checkpoint.suffix.lower() != catalog.ENDING:
        return None
    return _checksum(checkpoint, os.stat(checkpoint).st_mtime_ns) == trained_on


@lru_cache(maxsize=8)
def _checksum(checkpoint: Path, changed: int) -> str:
    return Weights.open(checkpoint).sha256()
