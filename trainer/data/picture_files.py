"""Folders of pictures: which files they are, in which order, and how one is brought to the size it is judged at."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wadi_core import images
from wadi_core.files import one_line, refusal

from ..engine.checkpoints import LOCK

logger = logging.getLogger("wadi")

CAPTION_ENDINGS = (".txt", ".caption")  # the first wins
# Folders and files that systems and programs put beside pictures, in small letters; so is all that begins with a dot.
SYSTEM = {
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__",
}  # fmt: skip
# Pictures by their endings, of which it depends on Pillow whether they are read.
OTHER_PICTURES = {
    ".ai", ".arw", ".avif", ".clip", ".cr2", ".cr3", ".dng", ".emf", ".eps", ".exr", ".hdr", ".heic", ".heif", ".hif", ".jp2",
    ".jxl", ".jxr", ".kra", ".nef", ".ora", ".orf", ".pdf", ".pef", ".ps", ".psb", ".raf", ".raw", ".rw2", ".srw", ".svg",
    ".svgz", ".wmf", ".xcf",
}  # fmt: skip
NAMES_SHOWN = 3

HIDDEN = "hidden or the system's"
UNREADABLE = "of a kind that Pillow does not read here"
OTHER = "no picture"
OF_A_RUN = "written by a run"
ALONE = "a caption without a picture"
NO_FILE = "no ordinary file or a broken link"
TWICE = "a link to what is in already, or to a folder above"

_CHECKPOINT = re.compile(r"step-\d{8}\.pt")
_SET = re.compile(r".*-[0-9a-f]{12}")  # a folder of trainer/store.py
_SHOWN = re.compile(r"(sheet-\d+|losses)\.png")
_SETTINGS = ("save_every:", "sheet_every:", "max_skipped:")  # keys of every run's config.yaml
_NUMBER = re.compile(r"(\d+)")


@dataclass
class Listing:
    """What there is in a folder of pictures and in those below it.

    Attributes:
        folder: its path.
        pictures: as people count: 2.png before 10.png.
        captions: picture -> the files of its name that may hold its captions, the one that wins first.
        left_out: why -> names, or endings where the kind of file is what matters.
    """

    folder: Path
    pictures: list[Path] = field(default_factory=list)
    captions: dict[Path, list[Path]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        """In one line how much was found, and what was left out and why."""
        number = len(self.pictures)
        found = f"{number} picture{'s' * (number != 1)}, {len(self.captions)} with a caption of its own"
        missed = [f"{len(names)} {why} ({_some(names)})" for why, names in self.left_out.items()]
        return one_line(f"{self.folder}: {found}; left out: {', '.join(missed) or 'nothing'}")


def listing(folder: str | os.PathLike[str]) -> Listing:
    """Look through a folder and those below it, also where one is a link.

    Raises:
        OSError: there is no such folder, or one cannot be read. ValueError: there is no picture. Both with one line.
    """
    folder = Path(folder)
    if folder.is_file():
        raise NotADirectoryError(one_line(f"{folder}: this is a file; name the folder of pictures"))
    if not folder.is_dir():
        raise FileNotFoundError(one_line(f"{folder}: there is no such folder of pictures"))
    found, readable = Listing(folder), images.endings()
    texts: dict[Path, list[Path]] = {}
    for path in _files(folder, found.left_out):
        ending = path.suffix.lower()
        if ending in readable:
            found.pictures.append(path)
        elif ending in CAPTION_ENDINGS:
            texts.setdefault(path.with_suffix(""), []).append(path)
        else:
            why = UNREADABLE if ending in OTHER_PICTURES else OTHER
            found.left_out.setdefault(why, []).append(ending or path.name)
    found.pictures.sort(key=lambda path: counting_order(path.relative_to(folder)))
    for path in found.pictures:
        if beside := texts.get(path.with_suffix("")):
            found.captions[path] = sorted(beside, key=lambda text: CAPTION_ENDINGS.index(text.suffix.lower()))
    taken = {text for own in found.captions.values() for text in own}
    if alone := [text.name for own in texts.values() for text in own if text not in taken]:
        found.left_out[ALONE] = sorted(alone)
    if not found.pictures:
        raise refusal(folder, f"there is no picture in this folder ({str(found).removeprefix(f'{folder}: ')})")
    return found


def pictures_in(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures in a folder and in those below it, as people count; how many, and what is left out, is told.

    Raises:
        OSError, ValueError: as :func:`listing`.
    """
    found = listing(folder)
    logger.info("%s", found)
    return found.pictures


def counting_order(path: Path) -> tuple[object, ...]:
    """A sort key by which 2 comes before 10 on every machine, whatever its language."""
    names = [*path.parts[:-1], path.stem]
    return tuple(_counted(name) for name in names), path.suffix.lower(), path.parts


def _counted(name: str) -> tuple[str | int, ...]:
    """Text and numbers by turns: the parts of two names at the same place are of one type."""
    parts = _NUMBER.split(unicodedata.normalize("NFC", name).casefold())
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts))


def _files(folder: Path, left_out: dict[str, list[str]]) -> Iterator[Path]:
    """All files that may be looked at; what is left out is noted."""

    def fail(error: OSError) -> None:
        raise type(error)(one_line(f"{error.filename}: this folder cannot be read: {error.strerror}")) from error

    def leave_out(why: str, name: str) -> None:
        left_out.setdefault(why, []).append(name)

    entered: set[str] = set()
    above = set(map(str, Path(os.path.realpath(folder)).parents))
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(place)
        if (real := os.path.realpath(place)) in entered | above:
            leave_out(TWICE, here.name)
            folders.clear()
            continue
        entered.add(real)
        of_a_run = _is_of_a_run(here, names)
        if of_a_run and here != folder:
            leave_out(OF_A_RUN, f"{here.name}/")
            folders.clear()
            continue
        hidden = [name for name in (*folders, *names) if name.startswith(".") or name.lower() in SYSTEM]
        for name in sorted(hidden):
            leave_out(HIDDEN, name)
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(set(names) - set(hidden)):
            path = here / name
            if not path.is_file():
                leave_out(NO_FILE, name)
            elif of_a_run and _SHOWN.fullmatch(name):
                leave_out(OF_A_RUN, name)
            else:
                yield path


def _is_of_a_run(folder: Path, names: Sequence[str]) -> bool:
    """Whether a run writes here: by its checkpoints, its settings, its table, or as a set of an evaluation."""
    if any(_CHECKPOINT.fullmatch(name) for name in names) or {LOCK, "losses.csv"} <= {*names}:
        return True
    if "recipe.json" in names and _SET.fullmatch(folder.name):
        return True
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8") if "config.yaml" in names else ""
    except (OSError, UnicodeDecodeError):
        return False
    return all(any(line.startswith(key) for line in text.splitlines()) for key in _SETTINGS)


def _some(names: Sequence[str]) -> str:
    """Each name once, and no more than a few."""
    each = list(dict.fromkeys(names))
    return ", ".join([*each[:NAMES_SHOWN], *["..."] * (len(each) > NAMES_SHOWN)])


def fingerprint(paths: Sequence[Path]) -> str:
    """A hash that changes with the name, size or time of any file."""
    total = hashlib.sha256()
    for path in paths:
        status = path.stat()
        total.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()[:24]


def load(path: Path, side: int | None = None) -> Image.Image:
    """A picture as RGB; with ``side`` its middle square at that many pixels.

    Raises:
        OSError, ValueError: it cannot be read; one line.
    """
    return framed(images.read(path), side)


def framed(picture: Image.Image, side: int | None) -> Image.Image:
    """The middle square of a picture at ``side`` pixels (Lanczos); the picture itself without a side."""
    if side is None:
        return picture
    return middle_square(picture).resize((side, side), Image.Resampling.LANCZOS)


def middle_square(picture: Image.Image) -> Image.Image:
    """As much of a picture as a square takes, from its middle."""
    width, height = picture.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return picture.crop((left, top, left + short, top + short))


def to_bytes(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as uint8 (n, 3, h, w).

    Raises:
        ValueError: they are of several sizes; one line.
    """
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        both = " and ".join(f"{width}x{height}" for width, height in sizes[:2])
        raise ValueError(f"pictures of {both} pixels cannot be judged together: give their side with --side")
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
