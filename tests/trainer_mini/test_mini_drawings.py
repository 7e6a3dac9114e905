"""The drawings that come with the project: scenes are, to the bit, those that the font Noto Color Emoji gave."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFont

from trainer.mini import drawings, scenes

ROOT = Path(__file__).resolve().parents[2]


def digest(pictures: Iterable[Image.Image]) -> str:
    total = hashlib.sha256()
    for picture in pictures:
        total.update(repr((picture.mode, picture.size)).encode() + picture.tobytes())
    return total.hexdigest()


def slim(thing: scenes.Thing) -> bool:
    """Whether Pillow's releases differ in how they make this drawing smaller: from 13 on, across first and then down."""
    width, height = scenes.glyph(thing.character).size
    return width < 0.62 * height


def plans(kind: str) -> Iterator[scenes.Scene]:
    """Scenes of a kind; each caption, place, size and background is decided by its seed."""
    if kind == "each object":
        for thing in scenes.things():
            yield from (scenes.scene(1000 * part + thing.index, pair=False, only=thing) for part in range(3))
    else:
        choices = {"pair": True, "held": True} if kind == "held out" else {}
        yield from (scenes.scene(seed, **choices) for seed in range(500))


@pytest.fixture
def fresh() -> Iterator[None]:
    """What was read of the drawings is forgotten, before and after."""
    for read in (scenes._drawings, scenes.glyph):
        read.cache_clear()
    yield
    for read in (scenes._drawings, scenes.glyph):
        read.cache_clear()


# ---------------------------------------------------------------- as the font drew them

# These values were recorded with the font itself, version 2.042, before its drawings were kept here.


def test_drawings_are_those_of_the_font() -> None:
    found = digest(scenes.glyph(thing.character) for thing in scenes.things())
    assert found == "542347acfd9d4adb75a129127d7494d68d9ce47ee344f52e387703b30292c166"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("each object", "ff29b46c85ff5e6b928b09490506c0992690d259e9e529d0e7235610199bfd68"),
        ("any", "802d6758a94a89af3a53a06a947c663a0420c81c42bd61c12d32d634cbbc9c86"),
        ("held out", "d1792c9d9decabdb55471e05014a0c220ee89f8187e2508593a35ff89295b72f"),
    ],
)
def test_scenes_are_those_of_the_font(kind: str, expected: str) -> None:
    shown = [plan for plan in plans(kind) if not any(slim(item.thing) for item in plan.placed)]
    assert len(shown) > 300
    assert digest(map(scenes.draw, shown)) == expected


@pytest.mark.parametrize(
    ("canvas", "expected"),
    [
        ({"scale": 3}, "ba9458427f3ef72387bb3f05f77e2c56cb456e379ae9d34d0c11d3a629bfee08"),
        ({"width": 192, "height": 160, "scale": 2}, "3068122cdbf06b64198a3443a482a05d12d11361ffaf848984c33297350f77f9"),
    ],
)
def test_large_scenes_are_those_of_the_font(canvas: dict[str, int], expected: str) -> None:
    assert digest(scenes.draw(scenes.scene(seed), **canvas) for seed in range(100)) == expected


# ---------------------------------------------------------------- the file


def test_the_file_has_every_drawing_and_its_licence() -> None:
    with zipfile.ZipFile(scenes.DRAWINGS) as archive:
        names = archive.namelist()
        licence = archive.read("drawings.md").decode()
    assert names == ["drawings.md", *(f"{scenes.code_points(thing.character)}.png" for thing in scenes.things())]
    assert licence.splitlines() == drawings.LICENCE.read_text(encoding="utf-8").splitlines()
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence and "Copyright 2013-2022 Google Inc." in licence
    assert scenes.DRAWINGS.stat().st_size < 1_100_000


def test_nothing_but_what_makes_the_file_reads_a_font() -> None:
    sources = [path for folder in ("wadi_core", "trainer", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    reading = [path.name for path in sources if any(sign in path.read_text("utf-8") for sign in (".ttf", "truetype("))]
    assert reading == ["drawings.py"]


def test_scenes_are_drawn_without_any_font(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scenes.draw(scenes.scene(5)).tobytes()
    scenes.glyph.cache_clear()
    monkeypatch.setattr(ImageFont, "truetype", lambda *_, **__: pytest.fail("a font was read"))
    assert scenes.draw(scenes.scene(5)).tobytes() == expected


def test_a_file_that_is_missing_damaged_or_older_is_told(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "drawings.zip"
    monkeypatch.setattr(scenes, "DRAWINGS", file)
    with pytest.raises(OSError, match="drawings.zip"):
        scenes.glyph("🐶")
    whole = Path(drawings.__file__).with_name("drawings.zip").read_bytes()
    for damaged in (whole[:1000], whole[: len(whole) // 2], b"", b"version https://git-lfs.github.com/spec/v1"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"drawings.zip: damaged \(.*\); take it from the project again"):
            scenes.glyph("🐶")
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="drawings.zip: there is no drawing of 🜁"):
        scenes.glyph("🜁")


# ---------------------------------------------------------------- making it anew


def test_pixels_come_back_to_the_bit(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    few = rng.integers(0, 256, (256, 4), np.uint8)[rng.integers(0, 256, (30, 20))]
    many = rng.integers(0, 256, (30, 20, 4), np.uint8)  # more colours than a palette has
    one = np.full((3, 5, 4), 7, np.uint8)
    pictures = {name: Image.fromarray(pixels) for name, pixels in {"1f436": few, "1f431": many, "1f42d": one}.items()}
    for name in ("first.zip", "second.zip"):
        drawings.write(tmp_path / name, pictures)
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()
    monkeypatch.setattr(scenes, "DRAWINGS", tmp_path / "first.zip")
    for name, picture in pictures.items():
        found = scenes.glyph(chr(int(name, 16)))
        assert (found.mode, found.size, found.tobytes()) == ("RGBA", picture.size, picture.tobytes())


@pytest.mark.parametrize(
    ("font", "why"),
    [
        (Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), "this is not Noto Color Emoji"),
        (ROOT / "README.md", "this is no font with bitmaps of 109 pixels"),
        (ROOT / "nowhere.ttf", "there is no such file"),
    ],
)
def test_another_font_makes_no_file(
    font: Path, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["drawings", "--font", str(font), "--output", str(tmp_path / "drawings.zip")])
    assert drawings.main() == 1
    told = capsys.readouterr().err
    assert told.startswith(f"drawings: {font}: {why}") and told.count("\n") == 1
    assert not list(tmp_path.iterdir())
