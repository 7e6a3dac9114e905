"""What the reports of the benchmarks have in common: the machine, the command that repeats them, and how they end."""

from __future__ import annotations

import json
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


def ended(script: str, debug: bool, act: Callable[[], str]) -> int:
    """Run a benchmark that returns its tables; the exit status, and of an error one line."""
    try:
        text = act()
    except (OSError, ValueError) as error:
        if debug:
            raise
        sys.stderr.write(f"{script}: error: {one_line(error)}\n")
        return 1
    sys.stdout.write(text)
    return 0
