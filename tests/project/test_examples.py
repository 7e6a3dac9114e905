"""The programs in examples/: short, listed, and each of them draws."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pipeline_kit import largest_difference

from wadi_core import OneStepPipeline, mini
from wadi_core.scheduler import OneStepScheduler

FOLDER = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
pytestmark = pytest.mark.usefixtures("no_network")


def run(name: str, place: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """What an example leaves in its variables, run in an empty folder; its pictures lie in ``outputs``."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="example")


def drawn(place: Path) -> dict[str, Image.Image]:
    found = {path.stem: Image.open(path) for path in sorted((place / "outputs").iterdir())}
    for picture in found.values():
        assert picture.size == (128, 128) and np.asarray(picture).std() > 10
    return found


def test_each_is_short_and_in_the_list() -> None:
    listed = re.findall(r"^\| \[(\w+)\.py\]", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == NAMES
    assert {name: lines for name in NAMES if (lines := len((FOLDER / f"{name}.py").read_text().splitlines())) >= 40} == {}


def test_text_to_image_as_a_program(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, "-m", "examples.text_to_image"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    made = drawn(tmp_path)
    ours = OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")
    theirs = ours(["a red apple", "a cat"], generator=torch.Generator().manual_seed(7)).images
    assert list(made) == ["text-to-image-0", "text-to-image-1"]
    assert all(largest_difference(one, other) <= 1 for one, other in zip(made.values(), theirs, strict=True))


def test_negative_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("negative_prompt", tmp_path, monkeypatch)
    ours = OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")
    asked = [
        {},
        {"negative_prompt": "a bicycle"},
        {"negative_prompt": "a bicycle", "negative_scale": 1.0, "negative_method": "nasa"},
    ]
    for name, more in zip(("with-both", "without", "subtracted"), asked, strict=True):
        assert (
            largest_difference(drawn(tmp_path)[f"negative-{name}"], ours("a cat and a bicycle", seed=7, **more).images[0]) <= 1
        )


def test_controlnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("controlnet", tmp_path, monkeypatch)
    made = drawn(tmp_path)
    ours = OneStepPipeline.from_pretrained("mini", device="cpu", control="mini", precision="exact")
    edges = made["controlnet-edges"].convert("RGB")
    theirs = ours("a red apple", seed=7, control_image=edges, control_scale=0.8).images[0]
    assert largest_difference(made["controlnet"], theirs) <= 1


def test_inpaint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("inpaint", tmp_path, monkeypatch)
    made = drawn(tmp_path)
    halves = [made[name].crop((0, 0, 48, 128)) for name in ("inpaint-before", "inpaint-after")]
    assert largest_difference(*halves) > 60
    kept = [np.asarray(made[name].crop((80, 0, 128, 128)), dtype=int) for name in ("inpaint-before", "inpaint-after")]
    assert np.abs(kept[0] - kept[1]).mean() < 10  # but for what the autoencoder loses
    assert isinstance(left["inpaint"].scheduler, OneStepScheduler)


def test_ip_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("ip_adapter", tmp_path, monkeypatch)
    assert largest_difference(*drawn(tmp_path).values()) > 5


def test_peft_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("peft_training", tmp_path, monkeypatch)
    trained = np.asarray(Image.open(tmp_path / "outputs" / "square.png"), dtype=float)
    before = np.asarray(
        OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")("a sks square", seed=7).images[0], dtype=float
    )
    assert redness(trained) > redness(before) + 10


def redness(picture: np.ndarray) -> float:
    """How much brighter red is than blue, on average."""
    return float((picture[..., 0] - picture[..., 2]).mean())


def test_several_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("several_adapters", tmp_path, monkeypatch)
    made = drawn(tmp_path)
    ours = OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")
    assert largest_difference(made["subject-0.0"], ours("a sks hibiscus", seed=3).images[0]) <= 1
    ours.set_lorad([mini.lorad_path(), (left["SUBJECT"], 1.0)])
    assert largest_difference(made["subject-1.0"], ours("a sks hibiscus", seed=3).images[0]) <= 1
    assert largest_difference(made["subject-0.0"], made["subject-1.0"]) > 20


def test_hot_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("hot_swap", tmp_path, monkeypatch)
    made = drawn(tmp_path)
    ours = OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")
    for name, strength in (("half", 0.5), ("most", 0.8), ("all", 1.0)):
        ours.set_lorad((mini.lorad_path(), strength))
        assert largest_difference(made[f"hot-swap-{name}"], ours("a red apple", seed=7).images[0]) <= 1


def test_server_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run("server", tmp_path, monkeypatch)
    made = Image.open(io.BytesIO(left["draw"]("a red apple", 7)))
    theirs = OneStepPipeline.from_pretrained("mini")("a red apple", seed=7).images[0]
    assert made.format == "PNG" and largest_difference(made, theirs) <= 1


def test_webcam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "frames").mkdir()
    for number in range(2):
        frame = Image.new("RGB", (320, 240), "white")
        ImageDraw.Draw(frame).ellipse((60 + 60 * number, 60, 180 + 60 * number, 180), fill="red")
        frame.save(tmp_path / "frames" / f"{number}.png")
    run("webcam", tmp_path, monkeypatch, "frames")
    made = drawn(tmp_path)
    assert list(made) == ["frame-0000", "frame-0001"] and largest_difference(*made.values()) > 20
