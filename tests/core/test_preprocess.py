"""Control maps: edges without a network, detectors where they are installed, the command, and what is refused."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from wadi_core import cli, images, packages, preprocess


def square(width: int = 96, height: int = 64) -> Image.Image:
    """A red square on green."""
    picture = Image.new("RGB", (width, height), (40, 160, 60))
    ImageDraw.Draw(picture).rectangle((20, 16, 59, 47), fill=(220, 30, 30))
    return picture


def refused(*arguments: object, **options: object) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        preprocess.run(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is made here -----------------------------------------------------------------------------------------------


def test_canny_finds_the_edges() -> None:
    pytest.importorskip("cv2")
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


@pytest.mark.parametrize(("kind", "package"), [("canny", "cv2"), ("shuffle", "controlnet_aux")])
def test_a_missing_package_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert refused(square(), kind) == (
        f"control maps need more: the package {package} is not installed: {packages.install('.[control]')}"
    )


def test_shuffle_comes_from_its_seed() -> None:
    pytest.importorskip("controlnet_aux")
    before = np.random.get_state()[1].copy()
    one, same, other = (np.asarray(preprocess.run(square(), "shuffle", seed=seed)) for seed in (1, 1, 2))
    assert one.shape == (64, 96, 3)
    assert (one == same).all() and (one != other).any()
    assert (np.random.get_state()[1] == before).all()


def test_lines_without_a_network() -> None:
    aux = pytest.importorskip("controlnet_aux")
    if not hasattr(aux, "LineartStandardDetector"):
        assert "has no LineartStandardDetector: update it" in refused(square(), "lineart-standard")
        return
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
    pytest.importorskip("cv2")
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
