"""Make the file of the drawings that scenes are composed of, from the font Noto Color Emoji. Nothing else needs the font.

python -m trainer.mini.drawings --font NotoColorEmoji.ttf [--output trainer/mini/drawings.zip]
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wadi_core.files import atomic_write, existing_file, one_line, refusal
from wadi_core.output import take_any_text

from . import scenes

STRIKE = 109  # the one size at which the font stores its bitmaps
WIDEST = 136  # pixels of such a bitmap
LICENCE = Path(__file__).with_name("drawings.md")
DATE = (1980, 1, 1, 0, 0, 0)  # the same file whenever it is made


def drawn(font: Path) -> dict[str, Image.Image]:
    """Every object as the font draws it, RGBA and cropped, by its code points.

    Raises:
        OSError, ValueError: the font cannot be read or is another, or Pillow cannot join characters; one line.
    """
    existing_file(font)
    try:
        face = ImageFont.truetype(font, STRIKE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise refusal(font, f"this is no font with bitmaps of {STRIKE} pixels ({error})") from error
    pictures = {}
    for thing in scenes.things():
        canvas = Image.new("RGBA", (4 * STRIKE, 2 * STRIKE))
        ImageDraw.Draw(canvas).text((20, 20), thing.character, font=face, embedded_color=True)
        pictures[scenes.code_points(thing.character)] = canvas.crop(canvas.getbbox())
    alike = len(pictures) - len({picture.tobytes() for picture in pictures.values()})
    if alike:
        raise refusal(font, f"this is not Noto Color Emoji: {alike} objects have no drawing of their own")
    if max(picture.width for picture in pictures.values()) > WIDEST:
        raise refusal(font, "joined characters fall apart: this Pillow needs the libraries Raqm and FriBiDi")
    return pictures


def as_png(picture: Image.Image) -> bytes:
    """A PNG file with the very pixels of an RGBA picture; with a palette if there are few enough colours."""
    pixels = np.asarray(picture)
    colours, indices = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    file = io.BytesIO()
    if len(colours) > 256:
        picture.save(file, "PNG", optimize=True)
    else:
        few = Image.frombytes("P", picture.size, indices.astype(np.uint8).tobytes())
        few.putpalette(colours[:, :3].tobytes())
        few.save(file, "PNG", optimize=True, transparency=colours[:, 3].tobytes())
    return file.getvalue()


def write(path: Path, pictures: Mapping[str, Image.Image]) -> None:
    """Write the drawings and their licence as one archive."""
    files = {LICENCE.name: LICENCE.read_bytes()} | {f"{name}.png": as_png(picture) for name, picture in pictures.items()}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, DATE), content)


def main() -> int:
    take_any_text()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf, with bitmaps (version 2.042 was used)")
    parser.add_argument("--output", type=Path, default=scenes.DRAWINGS)
    arguments = parser.parse_args()
    try:
        write(arguments.output, drawn(arguments.font))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"drawings: {one_line(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
