"""Pictures on the disk: PNG files that say how they were made, and contact sheets."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, files, images
from .files import atomic_write, one_line, refusal
from .settings import PictureSettings

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont
    from torch import Tensor

JSON_KEY = "wadi"  # text chunk with the settings as JSON
TEXT_KEY = "parameters"  # the same for people and A1111-style readers
CELL = 256  # pixels: a contact sheet shows nothing larger unless it is told so
SHEET_LIMIT = 16384  # pixels of its longer side
CAPTION_HEIGHT = 16
MARGIN = 4
THUMBNAIL = 256  # pixels


def to_pictures(images: Tensor) -> list[Image]:
    """(n, 3, h, w) with values from -1 to 1 as n RGB pictures; what lies outside is cut off.

    Raises:
        ValueError: NaN or Inf among the pixels, which would be drawn black; one line.
    """
    import torch
    from PIL import Image

    levels = check_pixels(images).float().add(1).mul(127.5).round().clamp(0, 255)
    array = levels.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]


def check_pixels(images: Tensor) -> Tensor:
    """The pixels themselves, if all of them are finite numbers.

    Raises:
        ValueError: NaN or Inf among them; one line.
    """
    if not images.isfinite().all():
        kind = str(images.dtype).removeprefix("torch.")
        why = "its autoencoder is damaged, or its numbers are too large for float16: try bf16 or fp32"
        raise ValueError(f"the picture has NaN or Inf among its pixels (in {kind}): {why}")
    return images


def to_tensor(pictures: Sequence[Image]) -> Tensor:
    """RGB pictures of one size as (n, 3, h, w) float32 with values from -1 to 1."""
    import numpy as np
    import torch

    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def thumbnail(picture: Image) -> str:
    """A picture as the data URI that model managers show."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def save(picture: Image, path: str | os.PathLike[str], settings: PictureSettings | None = None) -> None:
    """Write a PNG file, whole or not at all, with the settings in its text chunks; missing folders are made.

    Raises:
        OSError: it cannot be written; one line.
    """
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if settings is not None:
        chunks.add_text(TEXT_KEY, settings.to_infotext(f"wadi {__version__}"))
        chunks.add_text(JSON_KEY, settings.to_json())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        picture.save(file, "png", pnginfo=chunks)


def read_settings(path: str | os.PathLike[str]) -> PictureSettings:
    """What :func:`save` wrote beside a picture.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no picture, or says nothing of this kind. Both with a message of one line.
    """
    text = images.opened(path).info.get(JSON_KEY)
    if not isinstance(text, str):
        raise refusal(path, "this picture does not say how it was made")
    try:
        return PictureSettings.from_json(text)
    except ValueError as error:
        raise refusal(path, str(error)) from error


def numbered(path: str | os.PathLike[str], count: int) -> list[Path]:
    """Names for ``count`` pictures: the path itself for one, else ``name-0001.png`` and so on."""
    path = Path(path)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index:04d}{path.suffix}") for index in range(1, count + 1)]


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before the work whether a PNG file can be written there; nothing is left behind.

    A folder that does not exist yet is no hindrance: :func:`save` makes it.

    Raises:
        OSError: it cannot be written; one line.
        ValueError: its name does not end in ``.png``.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(one_line(f"{path}: pictures are written as PNG: the name must end in .png"))
    files.check_writable(path, makes_folders=True)


class ContactSheet:
    """Collects small copies of pictures and draws them in one, row by row, a caption under each.

    Args:
        cell: pixels: nothing larger is kept and shown.
    """

    def __init__(self, cell: int = CELL) -> None:
        self._cell = cell
        self._cells: list[tuple[Image, str]] = []

    def add(self, picture: Image, caption: str = "") -> None:
        """Take one more picture; only a small copy is kept."""
        small = picture.copy()
        small.thumbnail((self._cell, self._cell))
        self._cells.append((small, caption))

    def draw(self, columns: int | None = None) -> Image:
        """The sheet.

        Args:
            columns: pictures in a row; by default about as many as there are rows.

        Raises:
            ValueError: there are no pictures.
        """
        from PIL import Image, ImageDraw, ImageFont

        if not self._cells:
            raise ValueError("a contact sheet needs at least one picture")
        columns = columns or math.ceil(math.sqrt(len(self._cells)))
        rows = math.ceil(len(self._cells) / columns)
        below = CAPTION_HEIGHT if any(caption for _, caption in self._cells) else 0
        room = SHEET_LIMIT // max(columns, rows) - MARGIN - below
        side = max(1, min(room, max(max(picture.size) for picture, _ in self._cells)))
        width, height = side + MARGIN, side + MARGIN + below
        sheet = Image.new("RGB", (MARGIN + columns * width, MARGIN + rows * height), "white")
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
        for index, (picture, caption) in enumerate(self._cells):
            left, top = MARGIN + index % columns * width, MARGIN + index // columns * height
            if max(picture.size) > side:
                picture = picture.copy()
                picture.thumbnail((side, side))
            sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
            if below:
                pen.text((left, top + side + 2), _shortened(caption, side, pen, font), fill="black", font=font)
        return sheet


def _shortened(caption: str, width: int, pen: ImageDraw, font: FreeTypeFont | ImageFont) -> str:
    """As much of a caption as fits; the built-in font knows Latin letters only."""
    text = " ".join(caption.split()).encode("latin-1", "replace").decode("latin-1")
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."
