"""Folders of pictures: which files are taken, in which order, what is left out and that it is told."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import picture_makers as make
import pytest
import torch
from evaluation_kit import DUMMY, paint, read, run
from finetuning_runs import invert_config, make_place, personalize_config
from picture_makers import RED, flat, saved
from PIL import Image, features

from trainer import evaluate
from trainer.data.examples import Examples
from trainer.data.picture_files import listing, pictures_in
from trainer.invert import invert
from trainer.personalize import personalize

PNG = saved(flat("RGB", RED), "PNG")


def fill(folder: Path, *names: str, data: bytes = PNG) -> Path:
    for name in names:
        make.write(folder, name, data)
    return folder


def names_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in pictures_in(folder)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


# ---------------------------------------------------------------- which files, and in which order


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["10", "2", "1", "0"], ["0", "1", "2", "10"]),
        (["a10", "a9", "a", "b1"], ["a", "a9", "a10", "b1"]),
        (["img_2_10", "img_2_9", "img_10_1"], ["img_2_9", "img_2_10", "img_10_1"]),
        (["02", "1", "003"], ["1", "02", "003"]),
        (["B2", "a10", "A1"], ["A1", "a10", "B2"]),
        (["x²", "x10", "x2", "x½", "xⅣ"], ["x2", "x10", "x²", "x½", "xⅣ"]),
        (["x٣", "x١٠"], ["x٣", "x١٠"]),  # 3 and 10 in Arabic digits
        (["9" * 120, "1" + "0" * 121], ["9" * 120, "1" + "0" * 121]),
        (["2/1", "10/1", "2/10", "2/9"], ["2/1", "2/9", "2/10", "10/1"]),
        (["é2", "é10", "z1"], ["z1", "é2", "é10"]),
    ],
)
def test_names_are_sorted_as_people_count(given: list[str], expected: list[str], tmp_path: Path) -> None:
    fill(tmp_path, *(f"{name}.png" for name in given))
    assert names_in(tmp_path) == [f"{name}.png" for name in expected]


@pytest.mark.parametrize(
    "ending",
    ["png", "PNG", "jpg", "JPG", "Jpeg", "jfif", "jpe", "webp", "bmp", "gif", "tif", "TIFF", "avif", "jp2", "tga", "ico", "ppm",
     "qoi", "apng", "dds", "mpo"],
)  # fmt: skip
def test_every_ending_that_pillow_reads_is_taken_in_any_case(ending: str, tmp_path: Path) -> None:
    if ending == "avif" and not features.check("avif"):
        pytest.skip("this Pillow knows no AVIF")
    fill(tmp_path, f"a.{ending}", "b.png")
    assert names_in(tmp_path) == [f"a.{ending}", "b.png"]


HIDDEN = "hidden or the system's"
UNREADABLE = "of a kind that Pillow does not read here"
RUN = "written by a run"
SETTINGS = b"version: 1\nsave_every: 2\nsheet_every: 2\nmax_skipped: 3\n"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([".ipynb_checkpoints/0-checkpoint.png"], f"1 {HIDDEN} (.ipynb_checkpoints)"),
        (["._0.png"], f"1 {HIDDEN} (._0.png)"),
        ([".thumbnails/large/0.png", ".DS_Store"], f"2 {HIDDEN} (.DS_Store, .thumbnails)"),
        (["__MACOSX/0.png", "sub/__macosx/1.png"], f"2 {HIDDEN} (__MACOSX, __macosx)"),
        (["@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg"], f"1 {HIDDEN} (@eaDir)"),
        (["Thumbs.db", "desktop.ini"], f"2 {HIDDEN} (Thumbs.db, desktop.ini)"),
        (["$RECYCLE.BIN/0.png", "#recycle/1.png"], f"2 {HIDDEN} (#recycle, $RECYCLE.BIN)"),
        (["a.heic", "b.HEIC", "c.jxl"], f"3 {UNREADABLE} (.heic, .jxl)"),
        (["a.svg", "b.nef", "c.psb", "d.exr"], f"4 {UNREADABLE} (.svg, .nef, .psb, ...)"),
        (["a.mp4", "b.zip", "README"], "3 no picture (README, .mp4, .zip)"),
        (["notes.txt"], "1 a caption without a picture (notes.txt)"),
        (["run/step-00000002.pt", "run/sheet-000002.png"], f"1 {RUN} (run/)"),
        (["out/lesson/config.yaml", "out/lesson/losses.png"], f"1 {RUN} (lesson/)"),
        (["run/.lock", "run/losses.csv", "run/deep/0.png"], f"1 {RUN} (run/)"),
        (["e/pictures-0123456789ab/recipe.json", "e/pictures-0123456789ab/000000.png"], f"1 {RUN} (pictures-0123456789ab/)"),
    ],
)
def test_what_is_left_out_is_told(names: list[str], told: str, tmp_path: Path, caplog) -> None:
    fill(tmp_path, "0.png", "1.png")
    for name in names:
        make.write(tmp_path, name, SETTINGS if name.endswith("config.yaml") else PNG)
    with caplog.at_level(logging.INFO, "wadi"):
        assert names_in(tmp_path) == ["0.png", "1.png"]
    assert caplog.messages == [f"{tmp_path}: 2 pictures, 0 with a caption of its own; left out: {told}"]


def test_folders_that_only_look_like_a_runs_are_taken(tmp_path: Path) -> None:
    fill(tmp_path, "sheet-1.png", "food/recipe.json", "food/soup.png", "set/config.yaml", "set/losses.png")
    make.write(tmp_path, "plain/config.yaml", b"resolution: 512\nsave_every: 3\n")
    fill(tmp_path, "plain/0.png")
    assert names_in(tmp_path) == ["food/soup.png", "plain/0.png", "set/losses.png", "sheet-1.png"]


def test_in_a_folder_where_a_run_has_written_its_sheets_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path, "0.png", "step-00000002.pt", "sheet-000002.png", "losses.png")
    assert names_in(tmp_path) == ["0.png"]


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    assert names_in(fill(tmp_path / ".cache" / "@eaDir", "0.png")) == ["0.png"]


def test_pictures_made_by_an_evaluation_can_be_judged_again(tmp_path: Path) -> None:
    assert names_in(fill(tmp_path / "pictures-0123456789ab", "recipe.json", "000000.png")) == ["000000.png"]


# ---------------------------------------------------------------- links and folders that cannot be read


def test_links_are_followed_and_circles_are_told(tmp_path: Path) -> None:
    folder, other = fill(tmp_path / "dog", "0.png"), fill(tmp_path / "other", "1.png", "2.png")
    (folder / "linked.png").symlink_to(other / "1.png")
    (folder / "more").symlink_to(other, target_is_directory=True)
    (folder / "self").symlink_to(folder, target_is_directory=True)
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "broken.png").symlink_to(tmp_path / "nothing.png")
    found = listing(folder)
    assert [path.relative_to(folder).as_posix() for path in found.pictures] == [
        "0.png", "linked.png", "more/1.png", "more/2.png",
    ]  # fmt: skip
    assert "1 no ordinary file or a broken link (broken.png)" in str(found)
    assert "2 a link to what is in already, or to a folder above (self, up)" in str(found)
    (tmp_path / "door").symlink_to(folder, target_is_directory=True)
    assert len(pictures_in(tmp_path / "door")) == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(fill(tmp_path, "0.png") / "1.png")
    assert names_in(tmp_path) == ["0.png"]


def test_what_is_no_folder_of_pictures_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make.write(tmp_path, "a.png", PNG)
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "other", ".0.png", "b.heic")
    for folder, said in (
        (file, "this is a file; name the folder of pictures"),
        (tmp_path / "none", "there is no such folder of pictures"),
        (tmp_path / "empty", "there is no picture in this folder (0 pictures, 0 with a caption of its own; left out: nothing)"),
        (tmp_path / "other", f"left out: 1 {HIDDEN} (.0.png), 1 {UNREADABLE} (.heic))"),
    ):
        with pytest.raises((OSError, ValueError)) as error:
            pictures_in(folder)
        assert str(error.value).startswith(f"{folder}: ") and str(error.value).endswith(said)
    fill(tmp_path / "closed", "0.png", "below/1.png")
    scandir = os.scandir

    def guarded(path: str) -> object:
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError, match="below: this folder cannot be read: Permission denied"):
        pictures_in(tmp_path / "closed")


# ---------------------------------------------------------------- captions


def examples(folder: Path) -> Examples:
    return Examples.read(str(folder), ["a template"], lambda caption: None)


@pytest.mark.parametrize(
    ("texts", "captions"),
    [
        ({"0.txt": "a dog\n"}, ("a dog",)),
        ({"0.caption": "a dog\na red dog\n"}, ("a dog", "a red dog")),
        ({"0.CAPTION": "a dog\n"}, ("a dog",)),
        ({"0.TXT": "a dog\n"}, ("a dog",)),
        ({"0.txt": "a dog\n", "0.caption": "a cat\n"}, ("a dog",)),
        ({"0.txt": "\n", "0.caption": "a cat\n"}, ("a cat",)),
        ({"1.txt": "a dog\n"}, ("a template",)),
        ({"._0.txt": "\0\5\26"}, ("a template",)),
    ],
)
def test_captions_lie_beside_the_picture(texts: dict[str, str], captions: tuple[str, ...], tmp_path: Path) -> None:
    fill(tmp_path, "0.png")
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert examples(tmp_path).captions == (captions,)


def test_two_captions_that_differ_are_told(tmp_path: Path, caplog) -> None:
    fill(tmp_path, "0.png", "1.png")
    for name, text in (("0.txt", "a dog"), ("0.caption", "a cat"), ("1.txt", "a cow"), ("1.caption", "a cow\n")):
        (tmp_path / name).write_text(text)
    with caplog.at_level(logging.INFO, "wadi"):
        examples(tmp_path)
    assert caplog.messages == [
        f"{tmp_path}: 2 pictures, 2 with a caption of its own; left out: nothing",
        f"{tmp_path / '0.txt'}: its captions are taken; 0.caption beside it says others",
    ]


def test_pictures_of_one_name_share_their_caption(tmp_path: Path) -> None:
    fill(tmp_path, "0.png", "0.webp", "v1.5.png")
    (tmp_path / "0.txt").write_text("a dog\n")
    (tmp_path / "v1.5.txt").write_text("a cat\n")
    assert examples(tmp_path).captions == (("a dog",), ("a dog",), ("a cat",))


def test_an_empty_caption_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "0.png")
    (tmp_path / "0.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"0.png: this picture has no caption: write 0.txt beside it"):
        examples(tmp_path)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("learn", ["personalize", "invert"])
def test_a_run_whose_output_lies_among_its_pictures_goes_on(learn: str, tmp_path: Path, caplog) -> None:
    place = make_place(tmp_path)
    act, config = {"personalize": (personalize, personalize_config), "invert": (invert, invert_config)}[learn]
    folder = place / "pictures"
    with caplog.at_level(logging.INFO, "wadi"):
        act(config(place, folder / "run", steps=1, sheet_every=1))
        assert (folder / "run" / "sheet-000001.png").is_file() and (folder / "run" / "losses.png").is_file()
        act(config(place, folder / "run", steps=2, sheet_every=1))
        act(config(place, folder / "another", steps=1))
    told = [line for line in caplog.messages if line.startswith(f"{folder}: ")]
    assert told == [
        f"{folder}: 3 pictures, 1 with a caption of its own; left out: {missed}"
        for missed in (
            "1 hidden or the system's (.lock)",
            f"1 {RUN} (run/)",
            f"1 hidden or the system's (.lock), 1 {RUN} (run/)",
        )
    ]
    assert any(line.startswith("the run goes on from step 1 of 2") for line in caplog.messages)


def test_a_run_does_not_write_into_the_folder_that_it_reads(place: Path) -> None:
    with pytest.raises(ValueError, match="output: .* is the folder of pictures; name another, or one inside it"):
        personalize(personalize_config(place, place / "pictures"))
    assert not (place / "pictures" / ".lock").exists()


class Matched:
    """Stands in for a CLIP model: 1 where the prompt says the picture's grey level, else 0."""

    key = "matched"

    def __init__(self, *_: object) -> None: ...

    def __call__(self, pictures: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        pairs = zip(pictures, prompts, strict=True)
        return torch.tensor([float(prompt == f"grey {np.asarray(picture)[0, 0, 0]}") for picture, prompt in pairs])


def test_each_picture_is_scored_against_its_own_prompt(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(evaluate, "ClipScore", Matched)
    for number in range(12):
        make.write(tmp_path / "made", f"{number}.png", saved(flat("RGB", (number,) * 3, (64, 64)), "PNG"))
    prompts, real = tmp_path / "prompts.txt", paint(tmp_path / "real", 12)
    prompts.write_text("".join(f"grey {number}\n" for number in range(12)))
    words = ("--pictures", tmp_path / "made", "--real", real, "--extractor", DUMMY, "--prompts", prompts, "--clip", "stand-in")
    assert run(*words, "-o", tmp_path / "out") == 0
    assert read(tmp_path / "out")["figures"]["clip_score"] == 1
    told = [line for line in caplog.messages if "12 pictures, 0 with a caption of its own; left out: nothing" in line]
    assert [line.partition(":")[0] for line in told] == [str(real), str(tmp_path / "made")]
