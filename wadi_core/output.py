"""What programs write to standard output and standard error."""

from __future__ import annotations

import io
import sys


def take_any_text() -> None:
    r"""Make standard output and error take any character: what their encoding lacks is written as in ``\xe9``.

    On many Windows machines, and wherever ``PYTHONIOENCODING`` says so, they would otherwise end a program with a
    ``UnicodeEncodeError`` as soon as it says a name or a word in other letters. Called first in each program.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
