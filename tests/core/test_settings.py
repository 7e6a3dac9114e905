"""The description of a picture: its limits, its JSON, its line for people; and what becomes of it in a PNG file."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wadi_core import pictures, schedule, settings, sheets
from wadi_core.settings import Adapter, PictureSettings, Settings
from wadi_core.sheets import ContactSheet

FULL = PictureSettings(
    prompt="a cat, and: a dog",
    seed=7,
    width=640,
    height=512,
    base="sd15.safetensors",
    lorad=(Adapter("one-step.safetensors", 1.0, "ab" * 32), Adapter("style.safetensors", -0.25)),
    alpha_T_squared=0.0047,
    timestep=999,
    prediction_type="epsilon",
    dtype="bfloat16",
)


def test_json_brings_everything_back() -> None:
    assert PictureSettings.from_json(FULL.to_json()) == FULL
    assert json.loads(FULL.to_json())["version"] == settings.VERSION
    assert "\n" not in dataclasses.replace(FULL, prompt="two\nlines").to_json()


@given(st.text(), st.integers(0, 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False))
def test_json_brings_any_prompt_seed_and_strength_back(prompt: str, seed: int, strength: float) -> None:
    one = dataclasses.replace(FULL, prompt=prompt, seed=seed, lorad=(Adapter("a", strength),))
    assert PictureSettings.from_json(one.to_json()) == one


def test_what_earlier_versions_wrote_is_read() -> None:
    text = (
        '{"prompt": "a cat", "seed": 3, "width": 128, "height": 64, "base": "mini", "lorad": [], "control": [], "hires": null, '
        '"alpha_T_squared": 0.0047, "timestep": 999, "prediction_type": "epsilon", "dtype": "float32", "version": 1}'
    )
    found = PictureSettings.from_json(text)
    assert (found.prompt, found.seed, found.width, found.height, found.hires) == ("a cat", 3, 128, 64, None)
    assert list(json.loads(found.to_json())) == [
        name for name in settings.FIELDS if name != "input_scale"
    ]  # in the order that files have always had


def test_what_was_not_asked_for_is_the_networks_own() -> None:
    own = {"alpha_T_squared": 0.01, "timestep": 900, "prediction_type": "v_prediction", "dtype": "float32"}
    found = Settings("a cat", 7, width=72, hires="shrink", dtype="float16").resolved(width=512, height=640, **own)
    assert found == PictureSettings("a cat", 7, width=72, height=640, hires="shrink", **own | {"dtype": "float16"})
    assert FULL.resolved(width=64, height=64, **own) == FULL


@pytest.mark.parametrize("name", ["width", "height", "alpha_T_squared", "timestep", "prediction_type", "dtype"])
def test_a_picture_without_a_value_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be known of a picture"):
        dataclasses.replace(FULL, **{name: None})
    values = json.loads(FULL.to_json())
    with pytest.raises(ValueError, match=f"^{name} must be known of a picture"):
        PictureSettings.from_json(json.dumps(values | {name: None}))
    del values[name]
    with pytest.raises(ValueError, match="a field is unknown, is missing or has another form"):
        PictureSettings.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must lie from 0"),
        ({"seed": 2**64}, "seed must lie from 0"),
        ({"seed": "7"}, "seed must be of type int"),
        ({"seed": True}, "seed must be of type int"),
        ({"width": 513}, "try 512 or 520"),
        ({"height": 56}, "height must lie from 64"),
        ({"alpha_T_squared": 0.0}, "alpha_T_squared must lie from 1e-08 to below 1"),
        ({"alpha_T_squared": 1e-9}, "alpha_T_squared must lie from 1e-08 to below 1"),
        ({"alpha_T_squared": float("nan")}, "alpha_T_squared must lie from"),
        ({"timestep": 1000}, "timestep must lie from 0"),
        ({"prediction_type": "sample"}, "prediction_type must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"lorad": ("a.safetensors",)}, "lorad must hold adapters"),
        ({"version": 2}, "version must lie"),
    ],
)
def test_values_outside_their_limits_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        dataclasses.replace(FULL, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "[" * 100_000,
        '{"version": 2, "news": 1}',
        '{"unknown": 1}',
        '{"lorad": 3}',
        '{"lorad": [3]}',
        '{"lorad": [{"name": "a"}]}',
        '{"lorad": [{"file": "a", "strength": NaN}]}',
        '{"lorad": [{"file": "a", "strength": 1' + "0" * 400 + "}]}",
        '{"seed": 1e3}',
    ],
)
def test_other_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        PictureSettings.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_newer_version_is_named() -> None:
    with pytest.raises(ValueError, match="version 2, this program knows 1: update it"):
        PictureSettings.from_json('{"version": 2, "control": []}')


def test_the_line_for_people_is_read_by_a1111s_rules() -> None:
    text = FULL.to_infotext("wadi 1.0")
    prompt, line = text.split("\n")
    # The pattern by which that program takes such a line apart.
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line)
    found = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    assert prompt == FULL.prompt
    assert found == {
        "Steps": "1",
        "Sampler": "WaDi one-step",
        "CFG scale": "1",
        "Seed": "7",
        "Size": "640x512",
        "Model": "sd15.safetensors",
        "LoRaD": "one-step.safetensors: 1, style.safetensors: -0.25",
        "alpha_T squared": "0.0047",
        "Timestep": "999",
        "Prediction type": "epsilon",
        "Number format": "bfloat16",
        "Version": "wadi 1.0",
    }
    assert "LoRaD" not in dataclasses.replace(FULL, lorad=()).to_infotext("wadi")


def test_limits_agree_with_the_schedule() -> None:
    assert settings.PREDICTION_TYPES == schedule.PREDICTION_TYPES
    assert settings.FIELDS["alpha_T_squared"].metadata["least"] == schedule.SMALLEST_ALPHA
    assert all(settings.help_of(name) for name in settings.FIELDS)


def test_png_files_carry_settings_and_are_whole(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 8), (10, 20, 30))
    path = tmp_path / "new" / "p.png"
    pictures.save(picture, path, FULL)
    assert pictures.read_settings(path) == FULL
    with Image.open(path) as read:
        assert read.tobytes() == picture.tobytes() and read.info["parameters"].startswith(FULL.prompt)
    assert [one.name for one in path.parent.iterdir()] == ["p.png"]

    pictures.save(picture, path)
    with pytest.raises(ValueError, match="does not say how it was made"):
        pictures.read_settings(path)
    path.write_text("no picture")
    with pytest.raises(ValueError, match="no picture"):
        pictures.read_settings(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": -1}', '{"version": 99}', '{"lorad": [{"file": "a", "strength": NaN}]}'])
def test_settings_that_are_none_are_refused_with_the_pictures_name(tmp_path: Path, text: str) -> None:
    said = PngInfo()
    said.add_text(pictures.JSON_KEY, text)
    path = tmp_path / "p.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=said)
    with pytest.raises(ValueError) as caught:
        pictures.read_settings(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.png"
    pictures.save(Image.new("RGB", (8, 8)), path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pictures.save(Image.new("RGB", (9, 9)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_where_pictures_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path, kind, message in (
        (tmp_path / "p.jpg", ValueError, "must end in .png"),
        (tmp_path, ValueError, "must end in .png"),
        (tmp_path / "file" / "p.png", OSError, "is not a folder"),
        (tmp_path / "file" / "deep" / "p.png", OSError, "is not a folder"),
    ):
        with pytest.raises(kind, match=message):
            pictures.check_writable(path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match="this is a folder"):
        pictures.check_writable(tmp_path / "folder.png")
    pictures.check_writable(tmp_path / "new" / "deep" / "p.png")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder.png"]

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(OSError, match="Read-only file system"):
        pictures.check_writable(tmp_path / "p.png")


def test_contact_sheets() -> None:
    sheet = ContactSheet()
    with pytest.raises(ValueError, match="at least one picture"):
        sheet.draw()
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90), (0, 120, 120)]
    for colour in colours:
        sheet.add(Image.new("RGB", (512, 256), colour), "ein sehr langer Text über 日本 " * 20)
    drawn = sheet.draw(columns=3)
    cell = sheets.CELL + sheets.MARGIN
    assert drawn.size == (4 + 3 * cell, 4 + 2 * (cell + sheets.LINE))
    for index, colour in enumerate(colours):
        row, column = divmod(index, 3)
        middle = (4 + column * cell + 128, 4 + row * (cell + sheets.LINE) + 128)
        assert drawn.getpixel(middle) == colour
    assert drawn.getpixel((drawn.width - 60, drawn.height - 60)) == (255, 255, 255)


def test_a_sheet_with_words_beside_the_rows() -> None:
    red, blue = Image.new("RGB", (64, 48), (200, 0, 0)), Image.new("RGB", (64, 48), (0, 0, 200))
    words = ["ein Hund 犬 auf einem sehr langen Weg nach Hause und zurück", ""]
    sheet = sheets.contact_sheet([[red, blue], [blue]], words, ["one 一", "two"])
    left, top = sheets.MARGIN + sheets.BESIDE, sheets.MARGIN + sheets.TITLE
    assert sheet.size == (left + 2 * 68, top + 2 * 52)
    assert sheet.getpixel((left + 68 + 32, top + 24)) == (0, 0, 200) == sheet.getpixel((left + 32, top + 52 + 24))
    assert sheet.getpixel((left + 68 + 32, top + 52 + 24)) == (255, 255, 255)
    for box in ((0, top, left, top + 48), (left, 0, left + 60, top)):
        assert min(sheet.crop(box).convert("L").getextrema()) < 128
    with pytest.raises(ValueError, match="at least one picture"):
        sheets.contact_sheet([[]])


def test_a_sheet_of_many_pictures_stays_a_picture() -> None:
    sheet = ContactSheet()
    for _ in range(400):
        sheet.add(Image.new("RGB", (128, 128)))
    assert sheet.draw().size == (4 + 20 * 132, 4 + 20 * 132)
    assert max(sheet.draw(columns=400).size) <= sheets.LIMIT
