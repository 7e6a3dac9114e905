"""Text files of other people: which bytes are text, where a line ends, and what is wrong in which line.

A file is UTF-8 unless it begins with the mark of another Unicode form, as Excel's "Unicode text" does. A line ends where
"\\n", "\\r\\n" or a lone "\\r" stands. What :meth:`str.splitlines` takes for a line end besides (form feed, NEL, U+2028 and
others) is part of a prompt.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from itertools import zip_longest
from typing import TypeAlias

from .files import refusal

# The longer mark first: that of UTF-32 begins as that of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

File: TypeAlias = "str | os.PathLike[str]"


def tidy(text: str) -> str:
    """A prompt as one line, without spaces around it."""
    return " ".join(text.split())


def is_text(text: str) -> bool:
    """Whether a string is Unicode text; half of a surrogate pair, as a byte that is no UTF-8 leaves it, is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_lines(path: File, newline: str | None = None) -> Iterator[str]:
    """The lines of a text file with their ends.

    Args:
        newline: as :func:`open` takes it; ``""`` leaves line ends as they are.

    Raises:
        OSError: it cannot be read. ValueError: a line is no text; one line that says which and what to do.
    """
    encoding = _encoding(path)
    try:
        with open(path, encoding=encoding, newline=newline) as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise refusal(path, f"line {number} holds a NUL, so this is no UTF-8 text: save the file as UTF-8")
                yield line
    except UnicodeDecodeError:
        name = encoding.upper().removesuffix("-SIG")
        number = _first_bad_line(path, encoding)
        raise refusal(path, f"line {number} is no {name} text: save the file as UTF-8, or mend that line") from None


def read_captions(path: File) -> list[str]:
    """The lines of a text file that say something, tidied.

    Raises:
        OSError, ValueError: as :func:`read_lines`.
    """
    return [line for line in map(tidy, read_lines(path)) if line]


def _encoding(path: File) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8-sig")


def _first_bad_line(path: File, encoding: str) -> int:
    """Number of the first line that is no text; the decoder itself only knows its place in some block of bytes."""
    with (
        open(path, encoding=encoding, errors="replace") as replaced,
        open(path, encoding=encoding, errors="ignore") as left_out,
    ):
        pairs = enumerate(zip_longest(replaced, left_out), 1)
        return next((number for number, (one, other) in pairs if one != other), 1)
