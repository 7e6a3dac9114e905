"""Files of odd pictures for the tests, written by Pillow or byte by byte."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
# How an upright picture lies in a file whose EXIF tag says that it has to be turned: the inverse of that turn.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def corners() -> Image.Image:
    """48x32 with three corners of their own colour, by which each way to lie is known."""
    picture = Image.new("RGB", (48, 32), WHITE)
    for left, top, colour in ((0, 0, RED), (24, 0, GREEN), (0, 16, BLUE)):
        picture.paste(colour, (left, top, left + 24, top + 16))
    return picture


def oriented(kind: str, value: int, **options: Any) -> bytes:
    """:func:`corners` as a file that has to be turned upright."""
    exif = Image.Exif()
    exif[0x0112] = value
    turn = STORED[value]
    picture = corners() if turn is None else corners().transpose(turn)
    return saved(picture, kind, exif=exif, **options)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file, where the Pillow that is installed writes this kind."""
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def flat(mode: str, colour: Any, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def grey(values: Any, kind: Any) -> Image.Image:
    """A picture of these rows of numbers."""
    return Image.fromarray(np.array(values, kind))


def palette(transparency: int | bytes, kind: str) -> bytes:
    """Two colours, green and blue; the green one is transparent."""
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([*GREEN, *BLUE])
    picture.paste(1, (4, 0, 8, 8))
    return saved(picture, kind, transparency=transparency)


def frames(kind: str, **options: Any) -> bytes:
    """Red, then blue."""
    return saved(flat("RGB", RED), kind, save_all=True, append_images=[flat("RGB", BLUE)], **options)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(colours: int, depth: int, rows: list[bytes], width: int, height: int | None = None, key: bytes = b"") -> bytes:
    """A PNG byte by byte; ``key`` is the content of its tRNS chunk."""
    header = struct.pack(">IIBBBBB", width, len(rows) if height is None else height, depth, colours, 0, 0, 0)
    trns = chunk(b"tRNS", key) if key else b""
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + trns + pixels + chunk(b"IEND", b"")


def shorts(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def broken_exif() -> bytes:
    """A whole JPEG whose EXIF block is noise."""
    data = saved(corners(), "JPEG", quality=95)
    block = b"Exif\0\0" + b"XX*\0" + bytes(range(40))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


def noise(kind: str) -> bytes:
    """A file of some kilobytes that no encoder makes small."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8))
    return saved(picture, kind)


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
