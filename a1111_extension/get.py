"""``wadi get`` from the panel: a released one-step network is fetched, and its LoRaD put among the program's own.

The command runs in a process of its own under the program's Python, so that its memory is free again afterwards, and
goes on where it was when it is started again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import IO

from wadi_core import catalog as released
from wadi_core.cli_get import terms
from wadi_core.files import one_line

from . import catalog
from .tools import Say, watched

NAME = "sd15"
ROOT = Path(__file__).resolve().parents[1]
PIECE = 256  # bytes read at once

_running = threading.Lock()


def licence_note() -> str:
    """What is fetched and under which terms, as HTML to be agreed to; or what is wrong with the user's own catalogue."""
    try:
        entry = released.find(NAME)
    except (OSError, ValueError) as error:
        return f'<p class="wadi-warning">⚠ {escape(one_line(error))}</p>'
    size = f"About {(entry.base_bytes + entry.network_bytes) / 1e9:.1f} GB are fetched once. "
    return f"<p>{escape(size)}{escape(' '.join(terms(entry)))}</p>"


def get() -> Iterator[str]:
    """Run the command, saying how far it is; last of all its result, or what went wrong."""

    def work(say: Say) -> str:
        entry = released.find(NAME)
        output = catalog.folders()[0] / entry.file_name
        if not _running.acquire(blocking=False):
            raise ValueError("it is being fetched already")
        try:
            _run([NAME, "--output", str(output), "--yes"], say)
        finally:
            _running.release()
        catalog.refresh()
        return f"{output.stem} is there: it is chosen above; its checkpoint is {entry.about or entry.base[0]}"

    return watched(work)


def file_name() -> str | None:
    """The name of the LoRaD that is fetched, as in the panel's list; None while it is not there."""
    try:
        name = Path(released.find(NAME).file_name).stem
    except (OSError, ValueError):
        return None
    return name if name in catalog.choices() else None


def _run(arguments: list[str], say: Say) -> None:
    """Raises OSError with the command's own last sentence where it fails."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    last = ""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "wadi_core", "get", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        for line in _lines(process.stdout):
            last = line
            say(line)
    if process.returncode:
        raise OSError(re.sub(r"^wadi[^:]*: (error: )?", "", last) or "the command ended without a word")


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """What a command writes, line by line; a bar that is drawn over and over is a line each time."""
    rest = b""
    while piece := os.read(stream.fileno(), PIECE):
        *whole, rest = re.split(rb"[\r\n]+", rest + piece)
        yield from filter(None, (one_line(part.decode("utf-8", "replace")) for part in whole))
    if rest.strip():
        yield one_line(rest.decode("utf-8", "replace"))
