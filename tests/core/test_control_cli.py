"""``generate`` with ControlNets and at sizes larger than native."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import control_networks
import networks
import pytest
from PIL import Image

from wadi_core import cli, pictures

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as a folder, a one-step adapter, a ControlNet in two forms, and control images."""
    place = tmp_path_factory.mktemp("place")
    folder, made = networks.write_base(place / "base")
    networks.random_lorad(made["unet"]).save(place / "one-step.safetensors")
    control_networks.write_forms(place / "controls", control_networks.random_controlnet(made["unet"]), folder)
    Image.new("RGB", (64, 64), "white").save(place / "map.png")
    Image.new("RGB", (128, 96), "white").save(place / "large.png")
    return place


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``generate`` in this process, and puts back what a command may change in it."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    common = ("--base", place / "base", "--lorad", place / "one-step.safetensors", "--device", "cpu")

    def run_command(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with warnings.catch_warnings():
            try:
                status = cli.main([str(word) for word in ("generate", "a cat", *common, *words)])
            except SystemExit as end:
                status = end.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run_command


def test_steered_pictures(run: Run, place: Path, tmp_path: Path) -> None:
    canny, ldm, image = place / "controls" / "canny", place / "controls" / "ldm.safetensors", place / "map.png"
    plain, one, two = (tmp_path / f"{name}.png" for name in ("plain", "one", "two"))
    assert run("-o", plain)[0] == 0
    assert run("-o", one, "--control", canny, "--control-image", image, "--control-scale", 0.5)[0] == 0
    words = ("--control", canny, "--control-image", image, "--control", ldm, "--control-image", image)
    assert run("-o", two, *words, "--control-scale", 0.25)[0] == 0
    (kept,) = pictures.read_settings(one).control
    assert (kept.file, kept.scale, kept.image) == ("canny", 0.5, "map.png")
    assert [kept.scale for kept in pictures.read_settings(two).control] == [0.25, 0.25]
    assert Image.open(plain).tobytes() != Image.open(one).tobytes()
    pairs = zip(Image.open(one).tobytes(), Image.open(two).tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1  # half of it twice is the whole


def test_larger_pictures(run: Run, place: Path, tmp_path: Path) -> None:
    size = ("--width", 128, "--height", 96)
    status, _, error = run("-o", tmp_path / "direct.png", *size)
    assert status == 0 and error == "wadi: 128x96 is larger than the 64x64 of this network: try --hires\n"
    assert run("-o", tmp_path / "hires.png", *size, "--hires")[::2] == (0, "")
    assert run("-o", tmp_path / "shrunk.png", *size, "--hires-method", "shrink")[::2] == (0, "")
    assert [pictures.read_settings(tmp_path / f"{name}.png").hires for name in ("direct", "hires", "shrunk")] == [
        None,
        "redilate",
        "shrink",
    ]
    assert len({Image.open(tmp_path / f"{name}.png").tobytes() for name in ("direct", "hires", "shrunk")}) == 3
    status, _, error = run("-o", tmp_path / "native.png", "--hires")
    assert status == 0 and "--hires changes nothing: 64x64 is no larger than the 64x64" in error


def test_control_of_a_larger_picture(run: Run, place: Path, tmp_path: Path) -> None:
    target = tmp_path / "p.png"
    words = ("--control", place / "controls" / "canny", "--control-image", place / "large.png", "--hires")
    assert run("-o", target, *words)[0] == 0
    assert Image.open(target).size == (128, 96)


def test_what_is_wrong_is_one_line(run: Run, place: Path, tmp_path: Path) -> None:
    target = tmp_path / "p.png"
    control, image = ("--control", place / "controls" / "canny"), ("--control-image", place / "map.png")

    def says(*words: object, status: int = 1) -> str:
        ended, _, error = run("-o", target, *words)
        assert (ended, error.count("\n")) == (status, 1), error
        assert not target.exists()
        return error

    assert "1 --control and 0 --control-image: each needs the other" in says(*control, status=2)
    assert "0 --control and 1 --control-image" in says(*image, status=2)
    assert "1 --control and 2 --control-scale" in says(*control, *image, "--control-scale", 1, "--control-scale", 2, status=2)
    assert "--control-scale goes with --control" in says("--control-scale", 1, status=2)
    assert "must lie from 0 to 4, not 9" in says(*control, *image, "--control-scale", 9)
    assert "64x64 and the picture 128x64" in says(*control, *image, "--width", 128, "--height", 64)
    assert "there is no such file" in says(*control, "--control-image", tmp_path / "none.png")
    assert "there is no such file" in says("--control", tmp_path / "none.safetensors", *image)
    assert "no ControlNet but a LoRaD adapter" in says("--control", place / "one-step.safetensors", *image)
    assert "too large for this network" in says("--width", 8192, "--height", 8192, "--hires")
    assert "divisible by 8" in says("--width", 100, "--hires")
