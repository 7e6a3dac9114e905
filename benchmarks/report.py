"""What the reports of the benchmarks have in common: the machine, the command that repeats them, and how they end."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wadi_core import __version__
from wadi_core.files import atomic_write, one_line
from wadi_core.output import take_any_text

BARE = "bare"  # a network without what was learned


def origin(script: str, words: Sequence[str]) -> dict[str, Any]:
    """What made a report: the command line (of a path outside of this folder only the name), versions, machine."""
    shown = [Path(word).name if os.path.isabs(word) else word for word in words]
    return {
        "command": shlex.join(["python", f"benchmarks/{script}.py", *shown]),
        "wadi": __version__,
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]},
    }


def machine() -> dict[str, Any]:
    """Cores and memory, where the system tells them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cores": cores}
    if hasattr(os, "sysconf"):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return found


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a sheet, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        picture.save(file, "png", optimize=True)


def table(title: str, rows: dict[str, dict[str, float]]) -> str:
    """Rows of figures as a Markdown table."""
    figures = list(dict.fromkeys(figure for row in rows.values() for figure in row))
    lines = [f"| {title} | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for key, row in rows.items():
        cells = (f"{row[figure]:.4g}" if figure in row else "" for figure in figures)
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def student_at(strength: float) -> str:
    """What a student is called whose one-step LoRaD has this strength."""
    return "student" if strength == 1 else f"student at {strength:g}"


def gains(sets: dict[str, dict[str, float]], figures: Sequence[str]) -> dict[str, dict[str, float]]:
    """What each set gains over the bare one of the same network, and a student's share of the teacher's gain if it has one.

    Args:
        sets: by "network, what", of which "bare" is one; the teacher's first.
        figures: of a set.
    """
    found: dict[str, dict[str, float]] = {}
    for key, row in sets.items():
        who, _, what = key.partition(", ")
        bare = sets.get(f"{who}, {BARE}")
        if bare is None or what == BARE:
            continue
        found[key] = gained = {f"{figure}_gain": row[figure] - bare[figure] for figure in figures}
        teacher = found[f"teacher, {what}"]
        if gained is not teacher:
            shares = {figure: (gained[f"{figure}_gain"], teacher[f"{figure}_gain"]) for figure in figures}
            gained |= {f"{figure}_over_teacher": ours / its for figure, (ours, its) in shares.items() if its > 0}
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark that compares the teacher of wadi-mini with its student."""
    from trainer.evaluation.features import GRAIN

    from .quality.sets import SAMPLERS

    add = parser.add_argument
    add("--study", type=int, default=6000, help="pictures of one object, and of two, to learn from (default: 6000 each)")
    add("--output", default="docs", metavar="DIR", help="where the report and the sheet go (default: docs)")
    add("--work", default="runs/quality", metavar="DIR", help="where sets are kept (default: runs/quality)")
    add("--model", default="mini", metavar="DIR", help="teacher in diffusers layout (default: the one in the package)")
    add("--lorad", metavar="FILE", help="the student's adapter (default: the one in the package)")
    add("--steps", type=int, default=25, help="of the teacher (default: 25)")
    add("--guidance", type=float, default=3.0, help="of the teacher (default: 3)")
    add("--sampler", choices=SAMPLERS, default="dpm", help="dpm (DPM-Solver++, default) or ddim")
    add("--float32", action="store_true", help="many steps and decoding in float32 too, not in bfloat16")
    add("--grain", type=float, default=GRAIN, help=f"on every picture, in grey levels (default: {GRAIN:g}; see features.py)")
    add("--batch", type=int, default=64, help="pictures a network call (default: 64)")
    add("--device", default="cpu", help="cpu (default), cuda and so on")
    add("--debug", action="store_true", help="show where an error comes from")


def make_parser(about: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark that its module's docstring describes."""
    return argparse.ArgumentParser(description=(about or "").splitlines()[0], allow_abbrev=False)


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Leave if the options of :func:`add_options` and ``--count`` make no sense."""
    if options.count < 2 or options.batch < 1 or options.steps < 2 or options.grain < 0:
        parser.error("at least 2 pictures, 2 steps, batches of 1 and grain of 0 are needed")
    student = any(source.startswith("student") for source in getattr(options, "only", ["student"]))
    if student and options.model != "mini" and not options.lorad:
        parser.error("--model needs --lorad, unless --only leaves out the student")


def how(options: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`add_options` that decide the figures, as a report names them."""
    return {
        "pictures_per_set": options.count,
        "study_pictures": 2 * options.study,
        "teacher_steps": options.steps,
        "guidance": options.guidance,
        "sampler": options.sampler,
        "many_steps_and_decoding_in": "float32" if options.float32 else "bfloat16",
        "grain": options.grain,
    }


def run(
    script: str,
    parser: argparse.ArgumentParser,
    words: Sequence[str] | None,
    act: Callable[[argparse.Namespace], str],
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None] = check_options,
) -> int:
    """Run a benchmark; returns the exit status, and tells an error in one line.

    Args:
        words: of the command line; by default the process's own. They are kept as ``words`` beside the options.
        act: measures, and returns its tables.
        check: leaves by the parser if the options make no sense.
    """
    take_any_text()
    words = sys.argv[1:] if words is None else list(words)
    options = parser.parse_args(words)
    options.words = words
    check(parser, options)
    logging.getLogger("wadi").setLevel(logging.ERROR)  # a bare teacher in one call is not meant, and not drawn
    try:
        text = act(options)
    except (OSError, ValueError) as error:
        if options.debug:
            raise
        sys.stderr.write(f"{script}: error: {one_line(error)}\n")
        return 1
    sys.stdout.write(text)
    return 0
