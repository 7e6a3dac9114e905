"""Millions of prompts without holding them: a table on the disk that any row can be read from.

Whatever file the prompts come in, they are written once, one after the other, into a table of this project's own, and
after that a row is two short reads. Nothing stays in memory but a handful of numbers, and a second start finds the
table there. It is made anew when the source changes. The file:

    8 bytes   "WADIPRM1"
    8 bytes   how many prompts, as all numbers little-endian
    8 bytes   where the index begins
    32 bytes  a hash of all prompts
    ...       the prompts, UTF-8
    ...       the index: first and last byte + 1 of each prompt, 8 bytes each
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from wadi_core.files import atomic_write, one_line, refusal

from .prompt_files import files_of, read_prompts, repeats_prompts

logger = logging.getLogger("wadi")

MAGIC = b"WADIPRM1"
HEADER = struct.Struct("<8sQQ32s")
PLACE = struct.Struct("<QQ")
BLOCK = 4096  # prompts that are written at once


def cache_folder() -> Path:
    """Where tables are kept: ``$WADI_CACHE``, or the folder of what a user's programs can make again.

    Raises:
        OSError: this user has neither; one line.
    """
    if chosen := os.environ.get("WADI_CACHE"):
        return Path(chosen) / "prompts"
    windows = sys.platform == "win32"
    caches = os.environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME")
    try:
        folder = Path(caches) if caches else Path.home() / ("AppData/Local" if windows else ".cache")
    except RuntimeError as error:  # in a container, a user by number alone
        raise FileNotFoundError("this user has no home to keep prompts in: set WADI_CACHE to a folder for them") from error
    return folder / "wadi" / "prompts"


@dataclass(frozen=True)
class PromptTable:
    """Prompts on the disk.

    Attributes:
        path: of the table.
        count: how many there are.
        digest: a hash of all prompts in their order, as hexadecimal digits.
        index: where in the file the index begins.
    """

    path: Path
    count: int
    digest: str
    index: int

    @classmethod
    def of(
        cls, source: str | os.PathLike[str], field: str | None = None, cache: str | os.PathLike[str] | None = None
    ) -> PromptTable:
        """The table of a source, made now if it is not there or the source has changed since.

        Args:
            source, field: as for :func:`.prompt_files.read_prompts`.
            cache: folder of the table; the user's cache by default.

        Raises:
            OSError, ValueError: the source cannot be read or holds no prompt; one line.
        """
        folder = Path(cache) if cache else cache_folder()
        path = folder / f"{_fingerprint(Path(source), field)}.prompts"
        if (table := cls._open(path)) is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = f"no folder for prompts can be made ({error.strerror}); set WADI_CACHE to one that can"
                raise type(error)(one_line(f"{folder}: {why}")) from error
            write(path, read_prompts(source, field), once=repeats_prompts(source))
            table = cls._open(path)
        if table is None:
            raise refusal(path, "this table of prompts was damaged as soon as it was written; is the disk at fault?")
        if not table.count:
            kind = "folder" if os.path.isdir(source) else "file"
            raise refusal(source, f"there is no prompt in this {kind}{f' under {field!r}' if field else ''}")
        return table

    @classmethod
    def _open(cls, path: Path) -> PromptTable | None:
        """A table that is whole; None where there is none."""
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(HEADER.size)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(start) < HEADER.size:
            return None
        magic, count, index, digest = HEADER.unpack(start)
        whole = magic == MAGIC and size == index + count * PLACE.size
        return cls(path, count, digest.hex(), index) if whole else None

    def read(self, rows: Iterable[int]) -> list[str]:
        """The prompts of some rows.

        Raises:
            OSError, ValueError: the file is gone or damaged; one line.
        """
        # Opened anew each time: nothing is shared with a forked process, and Windows lets go of the file. Not mapped:
        # what a random order touches of a mapping would count as this process's memory.
        with open(self.path, "rb", buffering=0) as file:
            return [self._one(file, row) for row in rows]

    def _one(self, file: object, row: int) -> str:
        if not 0 <= row < self.count:
            raise IndexError(f"row {row} of {self.count} prompts")
        file.seek(self.index + row * PLACE.size)
        first, last = PLACE.unpack(file.read(PLACE.size))
        file.seek(first)
        try:
            return file.read(last - first).decode()
        except UnicodeDecodeError:
            raise refusal(self.path, "this table of prompts is damaged; remove it and it is made again") from None


def write(path: Path, prompts: Iterable[str], once: bool = False) -> None:
    """Write a table.

    Args:
        prompts: in the order of its rows.
        once: leave out what was there before. Told by 64 bits of a hash: of two million prompts, one is lost to a
            coincidence with a chance of 1 in 10 million.
    """
    lengths, marks, total = array("Q"), array("Q"), hashlib.sha256()
    left = iter(prompts)
    with atomic_write(path) as file:
        file.write(bytes(HEADER.size))
        # JSON can hold half of a surrogate pair, which is no text: it becomes a question mark.
        while block := [prompt.encode("utf-8", "replace") for prompt in islice(left, BLOCK)]:
            data = b"".join(block)
            file.write(data)
            total.update(data)
            lengths.extend(map(len, block))
            if once:
                marks.extend(_mark(prompt) for prompt in block)
        ends = np.cumsum(np.array(lengths, "<u8"), dtype="<u8") + np.uint64(HEADER.size)
        index = np.stack([ends - np.array(lengths, "<u8"), ends], axis=1)
        if once:
            firsts = np.sort(np.unique(np.array(marks), return_index=True)[1])
            logger.info("%d of %d prompts are left, each one once", len(firsts), len(index))
            index = index[firsts]
        places = index.tobytes()
        file.write(places)
        total.update(places)
        file.seek(0)
        file.write(HEADER.pack(MAGIC, len(index), HEADER.size + sum(lengths), total.digest()))


def _mark(prompt: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(prompt, digest_size=8).digest(), "little")


def _fingerprint(source: Path, field: str | None) -> str:
    """A name that changes when a source does: of its path, and of size and time of every file."""
    total = hashlib.sha256(json.dumps([MAGIC.decode(), str(source.resolve()), field]).encode())
    for path, status in _statuses(source):
        total.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()[:24]


def _statuses(source: Path) -> Iterator[tuple[Path, os.stat_result]]:
    if source.is_dir():
        yield from ((path, path.stat()) for path in files_of(source))
    elif source.exists():
        yield source, source.stat()
