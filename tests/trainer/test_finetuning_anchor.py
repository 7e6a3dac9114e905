"""A finetuning run in which the one-step student is held to what its teacher, with what is learned, draws of the same noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from finetuning_runs import invert_config, make_place, personalize_config
from networks import make_networks
from torch import Tensor

from trainer.finetune import finetuning
from trainer.finetune.finetuning import ANCHOR, ONE_STEP, FinetuningRun
from trainer.invert import Inversion
from trainer.models.diffusion import anchor_loss
from trainer.personalize import Personalization, personalize
from wadi_core import LoRaD
from wadi_core.lorad.linear import attach, set_active

HELD = {"anchor_weight": 2.0, "anchor_every": 1, "anchor_steps": 2, "anchor_cells": 4, "anchor_guidance": 2.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def gradients(run: FinetuningRun, numbers: range, calls: int = 1) -> dict[str, Tensor]:
    run.anchor_step(numbers, calls)
    found = {name: parameter.grad for name, parameter in run.parameters.items() if parameter.grad is not None}
    for parameter in run.parameters.values():
        parameter.grad = None
    return found


def test_the_student_follows_the_teacher_as_the_formula_says(place: Path, tmp_path: Path) -> None:
    """Written out on a network of its own: DDIM by the bare base and what is learned, one step by all angles together."""
    run = Personalization(personalize_config(place, tmp_path, **HELD))
    run.train_step()  # both factors are other than zero from here
    numbers = range(2, 4)
    found, drawn = gradients(run, numbers), run.draw(ANCHOR, numbers)
    told = run.condition(run.examples.draw(0, numbers)[1]).text
    null = run.condition([""]).text.expand_as(told)

    unet, one_step = make_networks(place / "base")["unet"].requires_grad_(False), LoRaD.load(place / "one-step.safetensors")
    learned = {path: tuple(run.parameters[f"{path}.{part}"].detach() for part in "ab") for path in run.adapter.layers}
    attach(unet, {path: one_step.factors[key] for key, path in one_step.matched(unet).paths.items()}, ONE_STEP)
    attach(unet, learned, "own", trainable=True)
    set_active(unet, ["own"])
    levels, x, times = run.model.alphas_cumprod, drawn.z, (999, 499)
    with torch.no_grad():
        for now, following in zip(times, (499, None), strict=True):
            t = torch.tensor(now)
            eps, uncond = (unet(x, t, text).sample for text in (told, null))
            eps = uncond + 2.5 * (eps - uncond)
            x = (x - (1 - levels[now]).sqrt() * eps) / levels[now].sqrt()
            if following is not None:
                x = levels[following].sqrt() * x + (1 - levels[following]).sqrt() * eps
    set_active(unet, [ONE_STEP, "own"])
    x0 = one_step.one_step.x0(drawn.z, unet(drawn.z, torch.tensor(999), told).sample)
    (2.0 * anchor_loss(x0, x, 4).mean()).backward()
    for path in learned:
        layer = unet.get_submodule(path)
        for part, table in (("a", layer.lorad_a), ("b", layer.lorad_b)):
            torch.testing.assert_close(found[f"{path}.{part}"].float(), table["own"].grad, rtol=2e-3, atol=1e-4)


def test_only_what_is_learned_moves(place: Path, tmp_path: Path) -> None:
    run = Personalization(personalize_config(place, tmp_path, **HELD))
    before = {name: tensor.detach().clone() for name, tensor in run.network.named_parameters()}
    log = run.train_step()
    assert log["anchor"] > 0
    moved = {name for name, tensor in run.network.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved and all(".lorad_" in name and name.endswith(".finetuned") for name in moved)


@pytest.mark.parametrize("weight", [1e-6, 1e4])
def test_the_students_gradient_is_no_longer_than_the_teachers(place: Path, tmp_path: Path, weight: float) -> None:
    """Both have their say, and AdamW no reason to go far at once."""
    runs = [
        Personalization(personalize_config(place, tmp_path / name, max_grad_norm=1e9, **{**HELD, "anchor_weight": held}))
        for name, held in (("plain", 0.0), ("held", weight))
    ]
    told, both = (step_gradient(run) for run in runs)
    pull = gradients(runs[1], range(2))  # at the weights of the first step, which the spy did not let it take
    pull = torch.cat([pull[name].flatten() for name in runs[1].parameters if name in pull])
    assert (pull.norm() > told.norm()) == (weight > 1)
    torch.testing.assert_close(both, told + pull * (told.norm() / pull.norm()).clamp(max=1), rtol=1e-3, atol=1e-6)


def step_gradient(run: FinetuningRun) -> Tensor:
    """With which a step would update, which it does not do."""
    found = []

    def finish(take: bool) -> None:
        found.extend(parameter.grad.flatten() for parameter in run.parameters.values() if parameter.grad is not None)
        run.updater.optimizer.zero_grad(set_to_none=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.updater, "finish", finish)
        run.train_step()
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["word", "lora", "lorad"])
def test_words_and_adapters_are_held(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # Pictures of the same caption that stay, as a teacher's that has learned it.
    monkeypatch.setattr(finetuning, "teacher_pictures", lambda guided, noising, z, steps: torch.full_like(z, 0.5))
    alone = {**HELD, "anchor_weight": 1e4, "lr": 5e-3 if kind == "word" else 3e-2, "batch": 8}
    if kind == "word":
        run: FinetuningRun = Inversion(invert_config(place, tmp_path, steering=0.0, **alone))
    else:
        run = Personalization(personalize_config(place, tmp_path, adapter=kind, **alone))
    seen = range(1000, 1016)
    before = float(run.anchor_step(seen, 1))
    for parameter in run.parameters.values():
        parameter.grad = None
    for _ in range(15):
        run.train_step()
    after = float(run.anchor_step(seen, 1))
    assert after < (before if kind == "word" else 0.97 * before)  # a word has little to say about a picture


def test_every_second_sample_however_calls_are_cut(place: Path, tmp_path: Path) -> None:
    run = Personalization(personalize_config(place, tmp_path, batch=4, **{**HELD, "anchor_every": 2}))
    run.train_step()
    whole = gradients(run, range(4, 8))
    for number in range(4, 8):
        run.anchor_step(range(number, number + 1), 4)
    for name, parameter in run.parameters.items():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_in_the_last_steps_alone(place: Path, tmp_path: Path) -> None:
    run = Personalization(personalize_config(place, tmp_path, **{**HELD, "anchor_last": 1, "steps": 3}))
    assert ["anchor" in run.train_step() for _ in range(3)] == [False, False, True]


def test_checkpointing_computes_the_student_again_and_not_the_teacher(place: Path, tmp_path: Path) -> None:
    runs = [
        Personalization(personalize_config(place, tmp_path / str(on), gradient_checkpointing=on, recompute_rotation=on, **HELD))
        for on in (False, True)
    ]
    plain, again = (gradients(run, range(2)) for run in runs)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-6)


def test_prompts_of_their_own(place: Path, tmp_path: Path) -> None:
    prompts = [f"{animal} <R> a wall" for animal in ("a fox", "a cow", "a hen")]
    run = Personalization(personalize_config(place, tmp_path, **{**HELD, "anchor_prompts": prompts, "anchor_every": 2}))
    said = run.anchor_captions(range(0, 12, 2))
    assert sorted(said[:3]) == sorted(said[3:]) == sorted(prompts)
    plain = Personalization(personalize_config(place, tmp_path / "plain", **HELD))
    assert set(plain.anchor_captions(range(30))) == set(plain.examples.all_captions)


def test_a_held_run_goes_on_bit_for_bit(place: Path, tmp_path: Path) -> None:
    for name, steps in (("straight", 4), ("halved", 2), ("halved", 4)):
        personalize(personalize_config(place, tmp_path / name, steps=steps, **HELD))
    one, other = (LoRaD.load(tmp_path / name / "finetuned.safetensors") for name in ("straight", "halved"))
    assert all(torch.equal(x, y) for key in one.factors for x, y in zip(one.factors[key], other.factors[key], strict=True))
    assert "anchor" in (tmp_path / "straight" / "losses.csv").read_text().splitlines()[0]


def test_there_must_be_a_student_to_hold(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="anchor_weight: the one-step LoRaD is missing"):
        personalize_config(place, tmp_path, lorad="", **HELD)
