"""Reading pictures: one rule for all of them, whatever program wrote the file.

A picture is looked at in RGB, the way up that its file says (EXIF, mirrored ones too), where

- what is transparent lies on white,
- 16-bit grey keeps its range: 65535 is white. Integers of 32 bits are taken as 16-bit ones, and where they do not fit
  they are spread from the smallest (black) to the largest (white),
- floating point from 0 to 1 is black to white; values beyond that are spread likewise; NaN and Inf are refused,
- CMYK, YCbCr, LAB and HSV are converted as Pillow converts them,
- of several pictures in one file the first is taken, which is told.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import RefusedFile, existing_file, one_line, refusal

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("wadi")

LARGEST_AREA = 178_956_970  # pixels: from here on Pillow speaks of a decompression bomb
LARGEST_RATIO = 256  # of the sides: what is longer is a line, of which a square shows one colour
WHITE16 = 65535
# EPS would start another program; of MPEG no more than the header is read.
NEVER = {"EPS", "MPEG"}
LAYERED = {"MPO", "PSD", "ICO", "ICNS"}  # what is in the file besides belongs to the same picture

# What Pillow calls the seven ways to turn a picture upright, by the value of EXIF's tag.
_ORIENTATION = 0x0112
_TURNS: dict[Any, str] = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_SAY_ORIENTATION = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
# What is often found under the name of a picture that it is not: the bytes from a place on, and how to say it.
_OTHERS = (
    (4, b"ftyphe", "HEIC: save it as PNG or JPEG"),
    (4, b"ftypmif1", "HEIC: save it as PNG or JPEG"),
    (4, b"JXL ", "JPEG XL: save it as PNG or JPEG"),
    (0, b"\xff\x0a", "JPEG XL: save it as PNG or JPEG"),
    (0, b"%!PS", "PostScript: save it as PNG or JPEG"),
    (0, b"<", "a web page or a drawing in XML: save the picture itself"),
    (0, b"version https://git-lfs", "a pointer of Git LFS: get the file itself with git lfs pull"),
)
_FILE = "filename"  # key in a picture's ``info``


def formats() -> list[str]:
    """The formats that are read here, as Pillow names them; those of plug-ins that are loaded are among them."""
    from PIL import Image, ImageFile

    Image.init()
    return [
        name
        for name, (reader, _) in Image.OPEN.items()
        # A stub knows a format by name and hands its pictures to a program that nobody registered.
        if name not in NEVER and not (isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile))
    ]


def endings() -> frozenset[str]:
    """The endings of files that are read here, in small letters, with the dot."""
    from PIL import Image

    known = {*formats(), "MPO"}  # a kind of JPEG to its reader
    return frozenset(ending.lower() for ending, name in Image.registered_extensions().items() if name in known)


def read(path: str | os.PathLike[str]) -> Image:
    """A picture from the disk in RGB, by the rule of this module.

    Raises:
        OSError, ValueError: it is missing, no picture, damaged, or of an absurd size or shape; one line.
    """
    return plain(opened(path))


def opened(path: str | os.PathLike[str]) -> Image:
    """A picture from the disk, upright, in the colours and with the texts of its file.

    Raises:
        OSError, ValueError: as :func:`read`.
    """
    from PIL import Image, UnidentifiedImageError

    path = existing_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, and of damaged texts beside the pixels
            with Image.open(path, formats=formats()) as picture:
                _check_size(path, picture.size)
                found = _loaded(picture)
                several = picture.format not in LAYERED and getattr(picture, "is_animated", False)
    except RefusedFile:
        raise
    except UnidentifiedImageError as error:
        raise refusal(path, _no_picture(path)) from error
    except Image.DecompressionBombError as error:
        raise refusal(path, "this picture is absurdly large") from error
    except OSError as error:
        if error.errno is not None:
            raise type(error)(one_line(f"{path}: this picture cannot be read: {error.strerror}")) from error
        raise refusal(path, f"this picture is damaged and cannot be read: {error}") from error
    except Exception as error:  # Pillow's readers raise nearly anything over a damaged file
        raise refusal(path, f"this picture is damaged and cannot be read: {error or type(error).__name__}") from error
    if several:
        _tell_of_several(path)
    found.info[_FILE] = str(path)
    return found


def plain(picture: Image) -> Image:
    """A picture in RGB by the rule of this module; one that is so already is returned as it is.

    Raises:
        ValueError: it has no pixels, is of an absurd size or shape, or holds NaN or Inf; one line.
    """
    name = name_of(picture)
    where = name or "a picture in memory"
    _check_size(where, picture.size)
    try:
        found = _rgb(where, _upright(picture))
    except RefusedFile:
        raise
    except Exception as error:  # of Pillow's, over a mode or a transparent colour that makes no sense
        raise refusal(where, f"this picture of the mode {picture.mode} cannot be shown in RGB: {error}") from error
    if found is not picture:
        found.info = {_FILE: name}  # nothing that would turn it once more, or say that a colour is transparent
    return found


def name_of(picture: Image) -> str:
    """The file that a picture was read from, where that is known."""
    return os.fsdecode(getattr(picture, "filename", "") or picture.info.get(_FILE, ""))


def _loaded(picture: Any) -> Image:
    """The pixels of an opened file, upright."""
    # Pillow keeps the upper byte of 16-bit colours, and both of the colour that stands for transparent.
    halved = picture.mode == "RGB" and any("16B" in str(tile[3]) for tile in picture.tile)
    picture.load()
    key = picture.info.get("transparency")
    if halved and isinstance(key, tuple):
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    found = _upright(picture)
    found = found.copy() if found is picture else found
    for key in _SAY_ORIENTATION:  # or it would be turned once more
        found.info.pop(key, None)
    return found


def _upright(picture: Image) -> Image:
    from PIL import Image

    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION))
    except (SyntaxError, ValueError, TypeError, KeyError, EOFError, OSError, struct.error):
        turn = None  # damaged EXIF data; nothing is known then, and the pixels are whole
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


def _rgb(where: str, picture: Image) -> Image:
    from PIL import Image

    mode = picture.mode
    if mode == "La":  # as LA, with light that is already multiplied by its alpha; Pillow knows no way to RGB
        picture = picture.convert("LA")
    if mode == "F" or mode.startswith("I"):
        return _eight_bits(where, picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if mode == "RGB" else picture.convert("RGB")


def _eight_bits(where: str, picture: Image) -> Image:
    """Grey of more than 8 bits as RGB."""
    import numpy as np
    from PIL import Image

    values = np.asarray(picture)
    key = picture.info.get("transparency")
    with np.errstate(invalid="ignore"):  # numpy warns of some NaN
        values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise refusal(where, "there are values in this picture that are NaN or Inf")
    low, high = values.min(), values.max()
    fits, white = (1.0, 1.0) if picture.mode == "F" else (WHITE16, WHITE16)
    if low < 0 or high > fits:
        white = max(high - low, np.finfo(np.float64).tiny)
    else:
        low = 0
    grey = np.rint((values - low) / white * 255).astype(np.uint8)
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _check_size(where: str | Path, size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise refusal(where, f"this picture has no pixels ({width}x{height})")
    if width * height > LARGEST_AREA:
        raise refusal(where, f"this picture is absurdly large ({width}x{height}); make it smaller first")
    if max(size) > LARGEST_RATIO * min(size):
        raise refusal(where, f"this picture is a line ({width}x{height}): one side is over {LARGEST_RATIO} times the other")


def _no_picture(path: Path) -> str:
    with open(path, "rb") as file:
        begin = file.read(32)
    if not begin:
        return "this file is empty"
    for place, mark, what in _OTHERS:
        if begin[place:].startswith(mark):
            return f"this is no picture that can be read here but {what}"
    return "this is no picture that can be read, or its beginning is damaged"


@functools.cache  # once for each file, however often it is read
def _tell_of_several(path: Path) -> None:
    logger.warning("%s", one_line(f"{path}: there are several pictures in this file; the first is taken"))
