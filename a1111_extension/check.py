"""The check line of the panel: how a LoRaD fits the chosen checkpoint, and what else stands in the way of a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from html import escape
from pathlib import Path

from wadi_core.lorad import LoRaD
from wadi_core.lorad.weights import Weights
from wadi_core.settings import SAMPLER as NAME

from . import catalog, host, schedule


def line(name: str, strength: float, sampler: str | None, width: int | None, height: int | None) -> str:
    """The line as HTML: what fits, and warnings behind it. Never raises for a file that cannot be used: it says so.

    Args:
        name: of the LoRaD, as in the list.
        sampler, width, height: what is set on the page; None where that is not known.
    """
    try:
        facts, warnings = _facts(name, strength), list(_warnings(name, strength, sampler, width, height))
    except (OSError, ValueError) as error:
        facts, warnings = "", [str(error)]
    said = [f"<span>{escape(facts)}</span>"] if facts else []
    said += [f'<span class="wadi-warning">⚠ {escape(warning)}</span>' for warning in warnings]
    return f'<div class="wadi-check">{"<br>".join(said)}</div>'


def size_note(lorad: LoRaD, width: int, height: int) -> str | None:
    """What to say of a picture that is larger than those a LoRaD was trained on; None if it is not."""
    native = lorad.metadata.resolution
    sides = native.split("x") if native else []
    if len(sides) != 2 or not all(side.isdigit() for side in sides) or lorad.one_step is None:
        return None
    if width * height <= int(sides[0]) * int(sides[1]):
        return None
    return f"the LoRaD was trained at {native}: in a larger picture parts repeat"


def sampler_note(name: str, sampler: str) -> str:
    """What to say of a one-step LoRaD with another sampler."""
    return f"{name} is made for one step: choose the sampler {NAME} instead of {sampler}"


def _facts(name: str, strength: float) -> str:
    layout, checkpoint = host.layout(), host.checkpoint_file()
    title = checkpoint.name if checkpoint else "the checkpoint"
    own = schedule.of_checkpoint(checkpoint)
    if name == catalog.NONE:
        known = f"a one-step network, alpha_T^2 {own.alpha_T_squared:g}" if own else "a multi-step network"
        return f"{title}: {layout.architecture}, {known}"
    lorad = _lorad(name)
    match = lorad.matched(layout.network)
    said = [str(match)]
    if lorad.one_step:
        said.append(f"one step at t {lorad.one_step.timestep}, alpha_T^2 {lorad.one_step.alpha_T_squared:g}")
    else:
        said.append("an ordinary adapter: sampling stays as it is")
    if strength != 1.0:
        said.append(f"angles times {strength:g}")
    trained_on = lorad.metadata.base_sha256
    same = None if match.problems or trained_on is None else _same_base(checkpoint, trained_on)
    said.append({True: f"made for {title}", False: f"made for another base than {title}", None: f"on {title}"}[same])
    return "; ".join(said)


def _warnings(name: str, strength: float, sampler: str | None, width: int | None, height: int | None) -> Iterator[str]:
    own = schedule.of_checkpoint(host.checkpoint_file())
    if name == catalog.NONE:
        if sampler == NAME and own is None:
            yield schedule.UNKNOWN
        return
    lorad = _lorad(name)
    yield from lorad.matched(host.layout().network).problems[:3]
    if lorad.one_step is None or not strength:
        return
    if own is not None:
        yield "the checkpoint is a one-step network already: this LoRaD is made for a multi-step one"
    if sampler is not None and sampler != NAME:
        yield sampler_note(name, sampler)
    note = size_note(lorad, int(width or 0), int(height or 0))
    if note:
        yield note


def _lorad(name: str) -> LoRaD:
    file = catalog.file_of(name)
    lorad = None if file is None else catalog.look(file)
    if lorad is None:
        what = "there is no file of this name" if file is None else "this is no LoRaD"
        raise ValueError(f"{name}: {what}")
    return lorad


def _same_base(checkpoint: Path | None, trained_on: str) -> bool | None:
    """Whether a checkpoint is the base that an adapter names; None where that cannot be known."""
    if checkpoint is None or checkpoint.suffix.lower() != catalog.ENDING:
        return None
    return _checksum(checkpoint, os.stat(checkpoint).st_mtime_ns) == trained_on


@lru_cache(maxsize=8)
def _checksum(checkpoint: Path, changed: int) -> str:
    return Weights.open(checkpoint).sha256()
