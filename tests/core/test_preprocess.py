"""Control maps: edges without a network, detectors where they are installed, the command, and what is refused."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from wadi_core import cli, images, maps, packages, preprocess


def square(width: int = 96, height: int = 64) -> Image.Image:
    """A red square on green."""
    picture = Image.new("RGB", (width, height), (40, 160, 60))
    ImageDraw.Draw(picture).rectangle((20, 16, 59, 47), fill=(220, 30, 30))
    return picture


def noisy(width: int, height: int, blur: float = 0) -> Image.Image:
    """Random colours, blurred."""
    pixels = np.random.default_rng(10).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    return ImageOps.autocontrast(picture.filter(ImageFilter.GaussianBlur(blur))) if blur else picture


def refused(*arguments: object, **options: object) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        preprocess.run(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is made here -----------------------------------------------------------------------------------------------


def test_canny_finds_the_edges() -> None:
    found = preprocess.run(square(), "canny")
    assert (found.mode, found.size) == ("RGB", (96, 64))
    edges = np.asarray(found)
    assert set(np.unique(edges)) == {0, 255}
    drawn = edges[:, :, 0] > 0
    near = np.zeros((64, 96), bool)
    near[14:50, 18:62] = True
    near[18:46, 22:58] = False
    assert drawn[near].sum() > 100 and not drawn[~near].any()
    faint = Image.blend(square(), Image.new("RGB", (96, 64), (40, 160, 60)), 0.95)
    assert not np.asarray(preprocess.canny(faint)).any() and np.asarray(preprocess.canny(faint, 5, 10)).any()


@pytest.mark.parametrize("thresholds", [(100, 200), (0, 0), (20, 60), (50, 50), (5, 1000)], ids=str)
def test_canny_is_opencvs_pixel_for_pixel(thresholds: tuple[int, int]) -> None:
    cv2 = pytest.importorskip("cv2")
    for picture in (square(), noisy(131, 96), noisy(131, 96, blur=2), noisy(7, 5), noisy(1, 9), noisy(1, 1)):
        pixels = np.array(picture)
        assert (maps.canny(pixels, *thresholds) == cv2.Canny(pixels, *thresholds)[:, :, None]).all()


@pytest.mark.parametrize("kind", preprocess.PLAIN)
def test_plain_kinds_take_any_picture(kind: str) -> None:
    """Of any size, and of one colour: there is nothing to be seen in it."""
    for size in ((1, 1), (3, 130), (96, 64)):
        found = preprocess.run(Image.new("RGB", size, (9, 200, 77)), kind)
        assert (found.mode, found.size) == ("RGB", size)
        if kind == "invert":
            continue
        expected = (9, 200, 77) if kind in ("shuffle", "tile", "blur") else (0, 0, 0)
        assert abs(np.asarray(found).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("kind", "detector"), [("shuffle", "ContentShuffleDetector"), ("lineart-standard", "LineartStandardDetector")]
)
def test_maps_are_near_those_of_controlnet_aux(kind: str, detector: str) -> None:
    detector = getattr(pytest.importorskip("controlnet_aux"), detector, None)
    if detector is None:
        pytest.skip("this version of controlnet_aux does not have it")
    picture = noisy(192, 128, blur=3)
    np.random.seed(3)
    size = {"image_resolution": 128} if kind == "shuffle" else {}
    theirs = np.asarray(detector()(picture, output_type="pil", detect_resolution=128, **size).convert("RGB")).astype(int)
    ours = np.asarray(preprocess.run(picture, kind, seed=3)).astype(int)
    assert theirs.std() > 10 and abs(theirs - ours).mean() < 1 and abs(theirs - ours).max() < 16


def test_soft_edges_are_where_the_edges_are() -> None:
    soft, strokes = (np.asarray(preprocess.run(square(), kind)) for kind in ("softedge-standard", "scribble-standard"))
    edge, inside, outside = (slice(30, 34), slice(18, 23)), (slice(30, 34), slice(38, 42)), (slice(30, 34), slice(85, 92))
    for found in (soft, strokes):
        assert found[edge].max() > 150 and found[inside].max() < 30 and found[outside].max() < 30
    assert set(np.unique(maps.strokes(np.array(square())))) == {0, 255}
    assert len(np.unique(soft)) > 20


@pytest.mark.parametrize("kind", ["tile", "blur"])
def test_details_are_gone_and_the_rest_is_there(kind: str) -> None:
    picture = noisy(128, 128)
    before, found = (np.asarray(one).astype(float) for one in (picture, preprocess.run(picture, kind)))
    assert found.std() < 0.4 * before.std() and abs(found.mean() - before.mean()) < 2


def test_invert_and_transparency() -> None:
    picture = square()
    found = np.asarray(preprocess.run(picture, "invert")).astype(int)
    assert (found + np.asarray(picture) == 255).all()
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (np.asarray(preprocess.run(clear, "invert")) == 0).all()  # transparent is white
    assert preprocess.run(clear.convert("LA"), "invert").mode == "RGB"


def test_fit_cuts_what_does_not_fit() -> None:
    assert preprocess.fit(square(), 32, 64).size == (32, 64)
    assert preprocess.fit(square(200, 100), 100, 50).getpixel((2, 2)) == (40, 160, 60)


def test_unknown_kinds_and_thresholds() -> None:
    assert "are of the kinds canny, invert, shuffle" in refused(square(), "crayon")
    assert "not 200 and 100" in refused(square(), "canny", low=200, high=100)
    assert "from 0 to 1000" in refused(square(), "canny", high=1 << 20)


# --- detectors of controlnet_aux -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [name for name, kind in preprocess.KINDS.items() if kind.files])
def test_what_is_missing_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = preprocess.KINDS[kind].files
    monkeypatch.delenv(preprocess.MODELS, raising=False)
    message = refused(square(), kind)
    assert all(name in message for name in files) and "WADI_PREPROCESSORS" in message and "Annotators" in message
    message = refused(square(), kind, models=tmp_path)
    assert message.startswith(f"{tmp_path}: {', '.join(files)} is missing")
    monkeypatch.setenv(preprocess.MODELS, str(tmp_path))
    assert refused(square(), kind).startswith(str(tmp_path))
    for name in files:
        (tmp_path / name).write_bytes(b"not weights")
    assert "no pickle of plain tensors" in refused(square(), kind)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    torch.save({}, tmp_path / "ControlNetHED.pth")
    assert refused(square(), "softedge", models=tmp_path) == (
        f"control maps need more: the package controlnet_aux is not installed: {packages.install('.[control]')}"
    )


def test_shuffle_comes_from_its_seed() -> None:
    before = np.random.get_state()[1].copy()
    one, same, other = (np.asarray(preprocess.run(square(), "shuffle", seed=seed)) for seed in (1, 1, 2))
    assert one.shape == (64, 96, 3)
    assert (one == same).all() and (one != other).any()
    assert (np.random.get_state()[1] == before).all()


def test_lines_without_a_network() -> None:
    drawing = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(drawing).line((10, 32, 80, 32), fill="black", width=3)
    found = preprocess.run(drawing, "lineart-standard")
    assert (found.mode, found.size) == ("RGB", (96, 64))
    lines = np.asarray(found)[:, :, 0].astype(int)
    assert lines[30:35, 30:60].mean() > lines[:10].mean() + 50


@pytest.mark.parametrize(
    ("kind", "module", "network", "wrap"),
    [
        ("scribble", "controlnet_aux.hed", "ControlNetHED_Apache2", False),
        ("softedge-pidinet", "controlnet_aux.pidi", "pidinet", True),
        ("lineart", "controlnet_aux.lineart", "Generator", False),
        ("mlsd", "controlnet_aux.mlsd", "MobileV2_MLSD_Large", False),
    ],
)
def test_detectors_load_from_a_folder(kind: str, module: str, network: str, wrap: bool, tmp_path: Path) -> None:
    """With random weights in files of their names."""
    pytest.importorskip("controlnet_aux")
    made = getattr(importlib.import_module(module), network)(*((3, 1, 3) if network == "Generator" else ()))
    state = made.state_dict()
    for name in preprocess.KINDS[kind].files:
        torch.save({"state_dict": state} if wrap else state, tmp_path / name)
    found = preprocess.run(square(), kind, models=tmp_path)
    assert (found.mode, found.size) == ("RGB", (96, 64))


# --- the command -----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_writes_a_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    square().save(tmp_path / "in.jpg")
    target = tmp_path / "new" / "map.png"
    assert run(capsys, "preprocess", tmp_path / "in.jpg", "-o", target, "--kind", "canny") == (0, f"{target}\n", "")
    assert Image.open(target).size == (96, 64)
    words = ("preprocess", tmp_path / "in.jpg", "-o", target, "--kind", "canny", "--width", 64, "--height", 128)
    assert run(capsys, *words)[0] == 0 and Image.open(target).size == (64, 128)


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    square().save(tmp_path / "in.jpg", exif=exif)
    assert images.read(tmp_path / "in.jpg").size == (64, 96)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    square().save(tmp_path / "in.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "in.png").read_bytes()[:120])

    def says(*words: object, status: int = 1) -> str:
        ended, out, error = run(capsys, "preprocess", *words)
        assert (ended, out, error.count("\n")) == (status, "", 1)
        return error

    out = ("-o", tmp_path / "map.png")
    assert "there is no such file" in says(tmp_path / "none.png", *out, "--kind", "canny")
    assert "this is no picture" in says(tmp_path / "text.png", *out, "--kind", "canny")
    assert "cannot be read" in says(tmp_path / "cut.png", *out, "--kind", "canny")
    assert "must end in .png" in says(tmp_path / "in.png", "-o", tmp_path / "map.jpg", "--kind", "canny")
    assert "divisible by 8" in says(tmp_path / "in.png", *out, "--kind", "canny", "--width", 100)
    assert "dpt_hybrid-midas" in says(tmp_path / "in.png", *out, "--kind", "depth", "--models", tmp_path)
    assert "invalid choice" in says(tmp_path / "in.png", *out, "--kind", "crayon", status=2)
    assert not (tmp_path / "map.png").exists()
