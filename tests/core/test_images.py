"""Reading pictures: every kind of file and what is seen of it, or the sentence with which it is refused.

Each row's name says what kind of input it is. All go through the trainer's ``load``, which is the core's ``read``; that
the other programs see the same is tested below.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import picture_makers as make
import pytest
import torch
from picture_makers import BLACK, BLUE, GREEN, GREY, RED, WHITE, flat, grey, png, saved, shorts
from PIL import Image

from trainer.data.picture_files import load
from wadi_core import cli, control, preprocess

NAN, INF = float("nan"), float("inf")
CMYK_RED, CYAN_HALF = (0, 255, 255, 0), (128, 0, 0, 0)


def seen(picture: Image.Image, *places: tuple[int, int]) -> list[tuple[int, ...]]:
    assert picture.mode == "RGB"
    return [tuple(np.asarray(picture)[y, x].tolist()) for x, y in places]


def close(one: list[tuple[int, ...]], other: list[tuple[int, ...]], within: int) -> bool:
    return bool(np.abs(np.array(one, int) - np.array(other, int)).max() <= within)


# ---------------------------------------------------------------- the way up


@pytest.mark.parametrize("value", make.STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pictures_are_turned_as_exif_says(kind: str, value: int, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {} if kind in ("PNG", "TIFF") else {"quality": 95}
    path = make.write(tmp_path, f"a.{kind.lower()}", make.oriented(kind, value, **options))
    found = load(path)
    assert found.size == (48, 32)
    assert close(seen(found, (8, 8), (40, 8), (8, 24), (40, 24)), [RED, GREEN, BLUE, WHITE], 12)


@pytest.mark.parametrize("value", [0, 9, 300])
def test_an_orientation_that_means_nothing_turns_nothing(value: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    found = load(make.write(tmp_path, "a.png", saved(make.corners(), "PNG", exif=exif)))
    assert seen(found, (8, 8), (40, 8)) == [RED, GREEN]


def test_damaged_exif_data_leaves_the_picture_as_it_is(tmp_path: Path) -> None:
    assert load(make.write(tmp_path, "a.jpg", make.broken_exif())).size == (48, 32)


# ---------------------------------------------------------------- what is seen: name, bytes, first pixel, last pixel

HALF_RED = (255, 127, 127)
FILES: dict[str, tuple[str, Callable[[], bytes], tuple[int, ...], tuple[int, ...]]] = {
    # Transparency.
    "RGBA PNG, green under alpha 0": ("png", lambda: saved(flat("RGBA", (*GREEN, 0)), "PNG"), WHITE, WHITE),
    "RGBA PNG, half transparent red": ("png", lambda: saved(flat("RGBA", (*RED, 128)), "PNG"), HALF_RED, HALF_RED),
    "RGBA PNG, opaque": ("png", lambda: saved(flat("RGBA", (*RED, 255)), "PNG"), RED, RED),
    "LA PNG, black under alpha 0": ("png", lambda: saved(flat("LA", (0, 0)), "PNG"), WHITE, WHITE),
    "palette PNG, one transparent colour": ("png", lambda: make.palette(0, "PNG"), WHITE, BLUE),
    "palette PNG, a table of alphas": ("png", lambda: make.palette(b"\x00\xff", "PNG"), WHITE, BLUE),
    "palette GIF, one transparent colour": ("gif", lambda: make.palette(0, "GIF"), WHITE, BLUE),
    "RGBA WebP": ("webp", lambda: saved(flat("RGBA", (*GREEN, 0)), "WEBP", lossless=True, exact=True), WHITE, WHITE),
    "RGBA TIFF": ("tif", lambda: saved(flat("RGBA", (*GREEN, 0)), "TIFF"), WHITE, WHITE),
    "RGBA TGA": ("tga", lambda: saved(flat("RGBA", (*GREEN, 0)), "TGA"), WHITE, WHITE),
    "RGBA ICO": ("ico", lambda: saved(flat("RGBA", (*GREEN, 0), (16, 16)), "ICO"), WHITE, WHITE),
    "RGBA DDS": ("dds", lambda: saved(flat("RGBA", (*GREEN, 0)), "DDS"), WHITE, WHITE),
    "RGBA JPEG 2000": ("jp2", lambda: saved(flat("RGBA", (*GREEN, 0)), "JPEG2000"), WHITE, WHITE),
    "grey PNG with tRNS": ("png", lambda: png(0, 8, [bytes([7, 9])], 2, key=shorts(7)), WHITE, (9, 9, 9)),
    "2-bit grey PNG with tRNS": ("png", lambda: png(0, 2, [b"\x10"], 2, key=shorts(0)), WHITE, (85, 85, 85)),
    "1-bit PNG with tRNS": ("png", lambda: png(0, 1, [b"\x80"], 2, key=shorts(1)), WHITE, BLACK),
    "RGB PNG with tRNS": ("png", lambda: png(2, 8, [bytes([0, 255, 0, 255, 0, 0])], 2, key=shorts(0, 255, 0)), WHITE, RED),
    "16-bit grey PNG with tRNS": ("png", lambda: png(0, 16, [shorts(5000, 32896)], 2, key=shorts(5000)), WHITE, GREY),
    "16-bit RGB PNG with tRNS": (
        "png", lambda: png(2, 16, [shorts(0, 65535, 0, 65535, 0, 0)], 2, key=shorts(0, 65535, 0)), WHITE, RED,
    ),
    "16-bit RGBA PNG": ("png", lambda: png(6, 16, [shorts(0, 65535, 0, 0, 65535, 0, 0, 65535)], 2), WHITE, RED),
    "16-bit grey PNG with alpha": ("png", lambda: png(4, 16, [shorts(0, 0, 32896, 65535)], 2), WHITE, GREY),
    # More than 8 bits.
    "16-bit grey PNG": ("png", lambda: saved(grey([[0, 32896]], np.uint16), "PNG"), BLACK, GREY),
    "16-bit grey PNG, white": ("png", lambda: saved(grey([[257, 65535]], np.uint16), "PNG"), (1, 1, 1), WHITE),
    "16-bit grey TIFF": ("tif", lambda: saved(grey([[0, 32896]], np.uint16), "TIFF"), BLACK, GREY),
    "16-bit grey TIFF, big-endian": ("tif", lambda: saved(grey([[0, 32896]], ">u2"), "TIFF"), BLACK, GREY),
    "16-bit grey JPEG 2000": ("jp2", lambda: saved(grey([[32896] * 8] * 8, np.uint16), "JPEG2000"), GREY, GREY),
    "16-bit PGM": ("pgm", lambda: b"P5 2 1 65535\n" + shorts(32896, 65535), GREY, WHITE),
    "16-bit RGB PNG": ("png", lambda: png(2, 16, [shorts(65535, 0, 0, 32896, 32896, 32896)], 2), RED, GREY),
    "32-bit integer TIFF, 16 bits used": ("tif", lambda: saved(grey([[0, 32896]], np.int32), "TIFF"), BLACK, GREY),
    "32-bit integer TIFF, beyond 16 bits": ("tif", lambda: saved(grey([[70000, 0, 140000]], np.int32), "TIFF"), GREY, WHITE),
    "32-bit integer TIFF, below 0": ("tif", lambda: saved(grey([[0, -50, 50]], np.int32), "TIFF"), GREY, WHITE),
    "float TIFF from 0 to 1": ("tif", lambda: saved(grey([[0.0, 128 / 255]], np.float32), "TIFF"), BLACK, GREY),
    "float TIFF from 0 to 0.5 is not spread": ("tif", lambda: saved(grey([[0.0, 0.5]], np.float32), "TIFF"), BLACK, GREY),
    "float TIFF from -1 to 1": ("tif", lambda: saved(grey([[0.0, -1.0, 1.0]], np.float32), "TIFF"), GREY, WHITE),
    "float TIFF from 0 to 1000": ("tif", lambda: saved(grey([[500.0, 0.0, 1000.0]], np.float32), "TIFF"), GREY, WHITE),
    "float TIFF, largest numbers": ("tif", lambda: saved(grey([[0.0, -3e38, 3e38]], np.float32), "TIFF"), GREY, WHITE),
    "float TIFF, one value beyond 1": ("tif", lambda: saved(grey([[7.0, 7.0]], np.float32), "TIFF"), BLACK, BLACK),
    "float PFM": ("pfm", lambda: saved(grey([[0.0, 1.0]], np.float32), "PPM"), BLACK, WHITE),
    # Fewer bits, other colours.
    "1-bit TIFF": ("tif", lambda: saved(flat("1", 1), "TIFF"), WHITE, WHITE),
    "1-bit BMP": ("bmp", lambda: saved(flat("1", 0), "BMP"), BLACK, BLACK),
    "8-bit grey PNG": ("png", lambda: saved(flat("L", 128), "PNG"), GREY, GREY),
    "palette BMP": ("bmp", lambda: saved(flat("RGB", RED).convert("P"), "BMP"), RED, RED),
    "CMYK TIFF": ("tif", lambda: saved(flat("CMYK", CMYK_RED), "TIFF"), RED, RED),
    "CMYK JPEG as Adobe inverts it": ("jpg", lambda: saved(flat("CMYK", CMYK_RED, (16, 16)), "JPEG", quality=100), RED, RED),
    "CMYK TIFF, half cyan": ("tif", lambda: saved(flat("CMYK", CYAN_HALF), "TIFF"), (127, 255, 255), (127, 255, 255)),
    "LAB TIFF": ("tif", lambda: saved(flat("LAB", (138, 209, 198)), "TIFF"), (251, 5, 4), (251, 5, 4)),
    "QOI": ("qoi", lambda: saved(flat("RGB", RED), "QOI"), RED, RED),
    "JPEG called .jfif": ("jfif", lambda: saved(flat("L", 128), "JPEG"), GREY, GREY),
    "PNG called .jpg": ("jpg", lambda: saved(flat("RGB", RED), "PNG"), RED, RED),
    # Several pictures, and sizes.
    "moving GIF": ("gif", lambda: make.frames("GIF"), RED, RED),
    "moving PNG": ("png", lambda: make.frames("PNG"), RED, RED),
    "moving WebP": ("webp", lambda: make.frames("WEBP", lossless=True), RED, RED),
    "TIFF of two pages": ("tif", lambda: make.frames("TIFF"), RED, RED),
    "one pixel": ("png", lambda: saved(flat("RGB", RED, (1, 1)), "PNG"), RED, RED),
    "256 times as wide as high": ("png", lambda: saved(flat("RGB", RED, (256, 1)), "PNG"), RED, RED),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_what_is_seen_of_a_file(kind: str, tmp_path: Path) -> None:
    ending, write, first, last = FILES[kind]
    found = load(make.write(tmp_path, f"a.{ending}", write()))
    exact = kind not in ("LAB TIFF", "CMYK JPEG as Adobe inverts it")
    assert close(seen(found, (0, 0), (found.width - 1, found.height - 1)), [first, last], 0 if exact else 3)


MEMORY = {
    "RGBa, multiplied by its alpha": (flat("RGBA", (*RED, 128)).convert("RGBa"), HALF_RED),
    "RGBa, all clear": (flat("RGBa", (0, 0, 0, 0)), WHITE),
    "La, multiplied by its alpha": (flat("LA", (0, 128)).convert("La"), (127, 127, 127)),
    "PA": (flat("PA", (0, 0)), WHITE),
    "HSV": (flat("RGB", RED).convert("HSV"), RED),
    "YCbCr": (flat("YCbCr", (76, 85, 255)), (254, 0, 0)),
    "RGBX": (flat("RGBX", (*RED, 0)), RED),
    "I": (grey([[32896]], np.int32), GREY),
    "I;16B": (flat("I;16B", 32896), GREY),
    "I;16N": (flat("I;16N", 32896), GREY),
    "F": (flat("F", 1.0), WHITE),
}


@pytest.mark.parametrize("mode", MEMORY)
def test_what_is_seen_of_a_picture_in_memory(mode: str) -> None:
    picture, colour = MEMORY[mode]
    negative = preprocess.run(picture, "invert")
    assert close(seen(negative, (0, 0)), [tuple(255 - value for value in colour)], 1 if "multiplied" in mode else 0)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a picture in memory: this picture has no pixels \(0x5\)"):
        preprocess.run(Image.new("RGB", (0, 5)), "invert")


@pytest.mark.parametrize(("kind", "told"), [("GIF", True), ("PNG", True), ("WEBP", True), ("TIFF", True), ("MPO", False)])
def test_several_pictures_in_a_file_are_told_once(kind: str, told: bool, tmp_path: Path, caplog) -> None:
    path = make.write(tmp_path, f"a.{kind.lower()}", make.frames(kind))
    with caplog.at_level(logging.WARNING, "wadi"):
        load(path)
        load(path)
    assert caplog.messages == [f"{path}: there are several pictures in this file; the first is taken"] * told


# ---------------------------------------------------------------- what is refused

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def flipped_bit() -> bytes:
    data = bytearray(make.noise("PNG"))
    data[len(data) // 2] ^= 1
    return bytes(data)


BOMB = png(2, 8, [], 100_000, 100_000)
REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "float with NaN": ("tif", lambda: saved(grey([[0.0, NAN]], np.float32), "TIFF"), "that are NaN or Inf"),
    "float with Inf": ("tif", lambda: saved(grey([[0.0, INF]], np.float32), "TIFF"), "that are NaN or Inf"),
    "float with -Inf": ("tif", lambda: saved(grey([[0.0, -INF]], np.float32), "TIFF"), "that are NaN or Inf"),
    "257 times as wide as high": ("png", lambda: saved(flat("L", 0, (257, 1)), "PNG"), r"is a line \(257x1\)"),
    "100000x1": ("png", lambda: saved(flat("L", 0, (100_000, 1)), "PNG"), r"is a line \(100000x1\)"),
    "1x60000": ("jpg", lambda: saved(flat("L", 0, (1, 60_000)), "JPEG"), r"is a line \(1x60000\)"),
    "decompression bomb": ("png", lambda: BOMB, "this picture is absurdly large"),
    "width of 0": ("png", lambda: png(2, 8, [b""], 0), "this is no picture that can be read"),
    "empty file": ("png", lambda: b"", "this file is empty"),
    "text called .png": ("png", lambda: b"no picture", "this is no picture that can be read"),
    "web page called .jpg": ("jpg", lambda: b"<!doctype html><html></html>", "a web page or a drawing in XML"),
    "pointer of Git LFS": ("png", lambda: LFS, "a pointer of Git LFS: .* git lfs pull"),
    "HEIC": ("heic", lambda: b"\0\0\0\x18ftypheic" + bytes(20), "no picture that can be read here but HEIC: save it as"),
    "HEIC called .jpg": ("jpg", lambda: b"\0\0\0\x18ftypmif1" + bytes(20), "but HEIC"),
    "JPEG XL in a container": ("jxl", lambda: b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "but JPEG XL"),
    "SVG drawing": ("svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a drawing in XML"),
    "JPEG XL": ("jxl", lambda: b"\xff\x0a" + bytes(20), "but JPEG XL: save it as PNG or JPEG"),
    "EPS, which would start a program": ("eps", lambda: saved(flat("RGB", RED), "EPS"), "but PostScript"),
    "EPS called .png": ("png", lambda: saved(flat("RGB", RED), "EPS"), "but PostScript"),
    "film": ("mpg", lambda: b"\0\0\1\xb3\x01\x00\x10" + bytes(30), "no picture that can be read"),
    "PNG with one wrong bit": ("png", flipped_bit, "damaged"),
}  # fmt: skip
REFUSED |= {
    f"{kind} cut in half": (kind.lower(), lambda kind=kind: make.noise(kind)[: len(make.noise(kind)) // 2], "damaged")
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "TGA", "PCX", "DDS", "QOI", "SGI")
}
REFUSED |= {
    f"first 30 bytes of a {kind}": (kind.lower(), lambda kind=kind: make.noise(kind)[:30], "damaged")
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF")
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_refused_by_name_in_one_line(kind: str, tmp_path: Path) -> None:
    ending, write, why = REFUSED[kind]
    path = make.write(tmp_path, f"a.{ending}", write())
    with pytest.raises((OSError, ValueError), match=why) as error:
        load(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and len(said) <= 400


def test_missing_files_folders_and_files_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, why in ((tmp_path, "this is a folder, a file is needed"), (tmp_path / "a.png", "there is no such file")):
        with pytest.raises(OSError, match=f"{path}: {why}"):
            load(path)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = make.write(tmp_path, "a.png", saved(flat("RGB", RED), "PNG"))
    monkeypatch.setattr(Image, "open", forbidden)
    with pytest.raises(PermissionError) as error:
        load(path)
    assert str(error.value) == f"{path}: this picture cannot be read: Permission denied"


def test_a_large_photograph_is_taken_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """108 megapixels are what telephones take; Pillow warns of a bomb there."""
    rows = zlib.compress(bytes(12_001 * 9_000), 1)
    data = png(0, 8, [], 12_000, 9_000).replace(make.chunk(b"IDAT", zlib.compress(b"")), make.chunk(b"IDAT", rows))
    assert load(make.write(tmp_path, "a.png", data)).size == (12_000, 9_000)
    assert not recwarn.list


# ---------------------------------------------------------------- the same for every program

ODD = {
    "sideways": ("jpg", lambda: make.oriented("JPEG", 6, quality=95)),
    "clear": ("png", lambda: make.palette(b"\x00\x80", "PNG")),
    "deep": ("png", lambda: saved(grey([[32896] * 48] * 32, np.uint16), "PNG")),
}


@pytest.mark.parametrize("kind", ODD)
def test_every_program_sees_the_same(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ending, write = ODD[kind]
    path = make.write(tmp_path, f"a.{ending}", write())
    expected = np.asarray(load(path))
    map_path = tmp_path / "map.png"
    assert cli.main(["preprocess", str(path), "-o", str(map_path), "--kind", "invert"]) == 0
    assert np.array_equal(255 - np.asarray(Image.open(map_path)), expected)
    with Image.open(path) as picture:
        height, width = expected.shape[:2]
        tensor = control.to_map(picture, width, height)
    assert torch.equal(tensor[0].permute(1, 2, 0), torch.from_numpy(expected.copy()).float() / 255)
