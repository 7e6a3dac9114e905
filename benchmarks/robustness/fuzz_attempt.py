"""One damaged file: made from its number alone, read, used, and judged by the contract of every reader.

A reader succeeds, or raises ValueError or OSError with one printable line that names the file. It warns in few lines,
leaves no file behind and none open, and what it read can be used.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import random
import shutil
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wadi_core.files import one_line

from .damage import ANY
from .fuzz_kinds import KINDS, Wrong
from .fuzz_samples import Sample

READ, REFUSED, UNFIT, FAILED = "read", "refused", "unfit", "failed"
LONGEST = 600  # characters of a message
WARNINGS = 3  # lines that a reader may say of one file


@dataclass(frozen=True)
class Attempt:
    """What came of one damaged file.

    Attributes:
        outcome: ``read`` and used; ``refused`` by the reader; ``unfit``: read, and refused where it was to be used;
            ``failed``: outside the contract.
        damage: what was done to it.
        why: the message, or what is wrong.
    """

    outcome: str
    damage: str
    why: str = ""


@functools.cache
def samples(kind: str) -> list[Sample]:
    """The good files of a kind, made once."""
    return KINDS[kind].samples()


def damaged(kind: str, index: int) -> tuple[Sample, bytes, str, str]:
    """Damaged file number ``index``: the good file, its bytes now, its name, and what was done to it."""
    rng = random.Random(f"{kind}:{index}")
    sample = rng.choice(samples(kind))
    name, way = sample.name, rng.choice(list(sample.damages))
    content, done = sample.damages[way](rng, sample.content), [way.strip()]
    while rng.random() < 0.3:  # what is no good file any more takes only what is done to bytes
        way = rng.choice(list(ANY))
        content, done = ANY[way](rng, content), [*done, way]
    if rng.random() < 0.02:  # a file of this kind under another one's ending
        other = Path(rng.choice(samples(kind)).name).suffix
        name, done = Path(name).stem + other, [*done, f"as {other}"]
    return sample, content, name, " + ".join(done)


def attempt(kind: str, index: int, folder: Path) -> Attempt:
    """Damage a file, read it and judge what comes.

    Args:
        folder: empty, and empty again afterwards.
    """
    sample, content, name, damage = damaged(kind, index)
    path = folder / name
    files = {**sample.beside, name: content}
    for other, text in files.items():
        (folder / other).write_bytes(text)
    try:
        with _heard() as said:
            outcome, why = _tried(kind, path)
        if outcome != FAILED:
            wrong = _left_over(folder, files) or next((line for line in said if line), "")
            wrong = wrong or ("it says too much: " + " | ".join(said) if len(said) > WARNINGS else "")
            outcome, why = (FAILED, wrong) if wrong else (outcome, why)
    finally:
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return Attempt(outcome, damage, why)


def check_good_files(kind: str, folder: Path) -> None:
    """Read and use the good files of a kind; that also imports what its reader needs.

    Raises:
        ValueError: one is not read; nothing can be said of damaged ones then.
    """
    for sample in samples(kind):
        for other, text in {**sample.beside, sample.name: sample.content}.items():
            (folder / other).write_bytes(text)
        outcome, why = _tried(kind, folder / sample.name)
        if outcome != READ:
            raise ValueError(f"{kind}: a good file is not read: {why}")
        shutil.rmtree(folder)
        folder.mkdir()


def _tried(kind: str, path: Path) -> tuple[str, str]:
    """Outcome and message of reading and using a file."""
    stage = REFUSED
    try:
        found = KINDS[kind].read(path)
        stage = UNFIT
        KINDS[kind].use(found)
    except (ValueError, OSError) as error:
        message = str(error)
        wrong = _not_a_line(message) or ("" if stage == UNFIT or path.name in message else "it does not name the file")
        return (FAILED, f"{wrong}: {type(error).__name__}: {message[:200]!a}") if wrong else (stage, message)
    except Wrong as error:
        return FAILED, f"read, but {error}"
    except Exception as error:  # whatever it is, it is what is looked for
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        return FAILED, one_line(f"{'in use: ' if stage == UNFIT else ''}{type(error).__name__} at {place}: {error}")
    return READ, ""


def _not_a_line(message: str) -> str:
    if not message.strip():
        return "an empty message"
    if len(message) >= LONGEST:
        return f"a message of {len(message)} characters"
    return "" if message.isprintable() else "a message that is no printable line"


class _Ears(logging.Handler):
    """Collects what is wrong with each message, and "" for one that is as it should be."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        wrong = _not_a_line(text) or ("" if record.name.startswith("wadi") else f"a warning of {record.name}")
        self.said.append(f"{wrong}: {text[:200]!a}" if wrong else "")


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What is said meanwhile through logging and warnings, as :class:`_Ears` judges it."""
    ears, root = _Ears(), logging.getLogger()
    kept, root.handlers = root.handlers, [ears]
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield ears.said
    finally:
        root.handlers = kept
    ears.said += [f"a warning of Python: {one_line(warning.message)[:200]}" for warning in warned]


def _left_over(folder: Path, files: dict[str, bytes]) -> str:
    """What lies in the folder, or is open, that was not before."""
    more = sorted(set(os.listdir(folder)) - set(files))
    if more:
        return f"left behind: {more[0]!a}"
    if changed := [name for name, content in files.items() if (folder / name).read_bytes() != content]:
        return f"changed: {changed[0]}"
    if _open_in(folder):
        gc.collect()  # a reader that stopped halfway may be part of a circle
        return "a file is left open" if _open_in(folder) else ""
    return ""


def _open_in(folder: Path) -> bool:
    """Whether this process has a file of the folder open, where the system tells."""
    place = Path("/proc/self/fd")
    if not place.is_dir():
        return False
    for handle in os.listdir(place):
        try:
            if os.readlink(place / handle).startswith(str(folder)):
                return True
        except OSError:  # the handle of this very listing
            continue
    return False
