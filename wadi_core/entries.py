"""What people write: numbers, strengths, names of files; and the known words that come nearest to a wrong one."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from numbers import Real
from typing import Any

STRENGTH_LIMIT = 100.0  # 1 is as trained, and from 10 on every picture is noise
NAME_LIMIT = 255  # bytes of a file name on every common file system
LONGEST_NUMBER = 400  # characters: more are no slip of the hand, and take Python long to read

_NUMBER = re.compile(r"[+-]?(\d+(_\d+)*\.?(\d+(_\d+)*)?|\.\d+(_\d+)*)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_FORBIDDEN = '<>:"/\\|?*'
_UNSEEN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that are no Unicode, separators of lines
_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"}
_RESERVED |= {f"{port}{number}" for port in ("com", "lpt") for number in "123456789¹²³"}


def decimal(text: str) -> float:
    """A finite number as people write it: digits, a point, an exponent; ``1_000`` is a thousand, as in Python.

    Raises:
        ValueError: anything else, such as ``0,8``, ``12:30``, ``0x10`` or ``nan``; one line.
    """
    return float(_exact(text))


def whole(text: str) -> int:
    """A whole number in decimal digits: ``010`` is ten, ``1e3`` a thousand.

    Raises:
        ValueError: no number, or one with a fraction; one line.
    """
    value = _exact(text)
    if value != value.to_integral_value():
        raise ValueError(f"{text!r} is no whole number")
    return int(value)


def _exact(text: str) -> Decimal:
    stripped = text.strip()
    if not stripped:
        raise ValueError("a number is missing")
    if len(stripped) > LONGEST_NUMBER or not _NUMBER.fullmatch(stripped):
        comma = re.fullmatch(r"[+-]?\d*,\d+", stripped, re.ASCII)
        why = ": the decimal sign is a point" if comma else ""
        raise ValueError(f"{_shown(stripped)} is no decimal number{why}")
    value = Decimal(stripped.replace("_", ""))
    if not math.isfinite(float(value)):
        raise ValueError(f"{_shown(stripped)} is too large")
    return value


def strength(value: Any) -> float:
    """The strength of an adapter, as a number or as text.

    Raises:
        ValueError: it is no number, or far from any that makes sense; one line.
    """
    if isinstance(value, str):
        try:
            value = decimal(value)
        except ValueError as error:
            raise ValueError(f"the strength has to be a finite number such as 0.8: {error}") from None
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"the strength has to be a finite number, not of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= STRENGTH_LIMIT:  # NaN neither
        raise ValueError(f"the strength has to lie from {-STRENGTH_LIMIT:g} to {STRENGTH_LIMIT:g}, not {number:g}")
    return number


def nearest(word: object, known: Iterable[str], count: int = 1) -> str:
    """``; did you mean 'one' or 'other'?`` with the known words that come nearest, upper or lower case; or nothing."""
    folded: dict[str, str] = {}
    for name in known:
        folded.setdefault(name.casefold(), name)
    near = difflib.get_close_matches(str(word).casefold(), folded, n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(folded[name]) for name in near)}?" if near else ""


def check_file_name(name: str, ending: str = "") -> None:
    """Do nothing if a file of this name, with its ending, can be made on Linux, macOS and Windows alike.

    Raises:
        ValueError: it cannot; one line that says why.
    """
    shown = _shown(name)
    forbidden = next((sign for sign in name if sign in _FORBIDDEN or unicodedata.category(sign) in _UNSEEN), None)
    if forbidden is not None or not name.strip(". "):
        why = "" if forbidden is None else f": {forbidden!r} cannot stand in one"
        raise ValueError(f"a file name without folders is expected, not {shown}{why}")
    if name.endswith((".", " ")):
        raise ValueError(f"a file name that ends in a point or a space is none on Windows: {shown}")
    if name.partition(".")[0].rstrip().casefold() in _RESERVED:
        raise ValueError(f"Windows keeps the name {shown} for a device: choose another")
    length = len((name + ending).encode("utf-8", "surrogatepass"))
    if length > NAME_LIMIT:
        whole = f" with {ending}" if ending else ""
        raise ValueError(f"{shown} has {length} bytes{whole}, and a file name at most {NAME_LIMIT}: choose a shorter one")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
