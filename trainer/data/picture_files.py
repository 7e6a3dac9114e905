"""Folders of pictures: which files they are, and how one is brought to the size it is judged at."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from wadi_core.files import refusal

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def pictures_in(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures in a folder and in those below it, by name.

    Raises:
        OSError: there is no such folder. ValueError: there is no picture in it. Both with one line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        raise refusal(folder, f"there is no picture in this folder ({', '.join(ENDINGS)})")
    return found


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
    try:
        with Image.open(path) as picture:
            return framed(picture.convert("RGB"), side)
    except (UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise refusal(path, "this is no picture that can be read") from error
    except OSError as error:
        raise refusal(path, f"this picture is damaged: {error}") from error


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
