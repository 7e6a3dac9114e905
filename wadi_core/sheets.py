"""Contact sheets: pictures in a grid, with words beside the rows, over the columns or under each picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

CELL = 256  # pixels: where pictures are collected nothing larger is shown
LIMIT = 16384  # pixels of the longer side
MARGIN = 4
LINE = 16  # height of a caption under a picture
TITLE, BESIDE = 22, 190  # height of the titles, width of the captions beside the rows


def contact_sheet(
    rows: Sequence[Sequence[Image]],
    captions: Sequence[str] = (),
    titles: Sequence[str] = (),
    below: Sequence[Sequence[str]] = (),
) -> Image:
    """Pictures in a grid whose cells have the size of the largest one.

    Args:
        rows: of pictures; they may be of different lengths.
        captions: left of each row.
        titles: over each column.
        below: of each picture, in the order of ``rows``.

    Raises:
        ValueError: there are no pictures.
    """
    from PIL import Image, ImageDraw, ImageFont

    pictures = [picture for row in rows for picture in row]
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    wide, high = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    left, top = MARGIN + (BESIDE if captions else 0), MARGIN + (TITLE if titles else 0)
    width, height = wide + MARGIN, high + MARGIN + (LINE if below else 0)
    sheet = Image.new("RGB", (left + max(len(row) for row in rows) * width, top + len(rows) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column, title in enumerate(titles):
        pen.text((left + column * width, MARGIN + 1), _shortened(title, wide, pen, font), fill="black", font=font)
    for index, row in enumerate(rows):
        y = top + index * height
        if captions:
            pen.multiline_text((MARGIN, y), _folded(captions[index], BESIDE - MARGIN, pen, font), fill="black", font=font)
        for column, picture in enumerate(row):
            x = left + column * width
            sheet.paste(picture, (x + (wide - picture.width) // 2, y + (high - picture.height) // 2))
            if below:
                pen.text((x, y + high + 2), _shortened(below[index][column], wide, pen, font), fill="black", font=font)
    return sheet


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
        """The sheet, whose cells are square.

        Args:
            columns: pictures in a row; by default about as many as there are rows.

        Raises:
            ValueError: there are no pictures.
        """
        from PIL import Image

        columns = columns or max(1, math.ceil(math.sqrt(len(self._cells))))
        captioned = any(caption for _, caption in self._cells)
        longest = max(columns, math.ceil(len(self._cells) / columns))
        room = LIMIT // longest - MARGIN - (LINE if captioned else 0)
        side = max(1, min(room, max((max(picture.size) for picture, _ in self._cells), default=1)))
        pictures = []
        for picture, _ in self._cells:
            small = picture.copy()
            small.thumbnail((side, side))
            cell = Image.new("RGB", (side, side), "white")
            cell.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
            pictures.append(cell)
        starts = range(0, len(pictures), columns)
        words = [[caption for _, caption in self._cells[start : start + columns]] for start in starts]
        return contact_sheet([pictures[start : start + columns] for start in starts], below=words if captioned else ())


def _plain(text: str) -> str:
    """A text on one line, as the built-in font can write it: it knows Latin letters only."""
    return " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")


def _shortened(text: str, width: int, pen: ImageDraw, font: FreeTypeFont | ImageFont) -> str:
    """As much of a text as fits."""
    text = _plain(text)
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def _folded(text: str, width: int, pen: ImageDraw, font: FreeTypeFont | ImageFont) -> str:
    """A text in lines that fit."""
    lines = [""]
    for word in _plain(text).split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if pen.textlength(longer, font=font) <= width else [lines[-1], word]
    return "\n".join(lines)
