"""A student that is held to the coarse pictures which its teacher draws of the same noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from training import small_base, tiny, write_prompts

from trainer.data import random_draws
from trainer.distill.distillation import Distillation
from trainer.distill.roles import FAKE, STUDENT, TEACHER
from trainer.models.diffusion import anchor_loss, teacher_pictures

EXACT = {"precision": "fp64", "base_weights": "fp64"}
HELD = {"anchor_weight": 2.0, "anchor_steps": 3, "anchor_every": 3, "anchor_cells": 2}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Distillation]:
    folder = tmp_path_factory.mktemp("runs")
    base, prompts = small_base(folder / "base"), write_prompts(folder / "prompts.txt")

    def build(**changes: object) -> Distillation:
        return Distillation(tiny(base, prompts, folder, **{"batch": 4, "ema": 0.0, **EXACT, **changes}))

    return build


def learned(run: Distillation) -> dict[str, torch.Tensor]:
    for _ in range(2):
        run.train_step()
    return {f"{role} {name}": value for role in (STUDENT, FAKE) for name, value in run.roles.state(role).items()}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_teacher_draws_as_diffusers_does(make: Callable[..., Distillation], kind: str, steps: int) -> None:
    from diffusers import DDIMScheduler

    run = make()
    noising = dataclasses.replace(run.noising, prediction_type=kind)  # what a network says can be read either way
    z, condition = torch.randn(2, *run.latent_shape, dtype=torch.float64), run.encode(["a cat", "a dog"])
    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**levels, clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(steps)
    x = z
    for t in scheduler.timesteps:
        with torch.no_grad():
            predicted = run.roles.guided(TEACHER, x, t.expand(2), condition, run.null, 2.5)
        x = scheduler.step(predicted, t, x).prev_sample
    found = teacher_pictures(lambda x, t: run.roles.guided(TEACHER, x, t, condition, run.null, 2.5), noising, z, steps)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)  # the scheduler's noise levels are in float32


def test_only_what_is_coarse_is_held() -> None:
    wanted, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 2, 2)
    fine = torch.tensor([1.0, -1.0]).repeat(4)  # nothing, on average over a cell
    assert anchor_loss(wanted + fine, wanted, 4).max() < 1e-10
    x0 = (wanted + noise.repeat_interleave(4, 2).repeat_interleave(4, 3)).requires_grad_()
    loss = anchor_loss(x0, wanted, 2)
    torch.testing.assert_close(loss, noise.square().mean(dim=(1, 2, 3)))
    (grad,) = torch.autograd.grad(loss.sum(), x0)
    torch.testing.assert_close(grad, 2 * (x0 - wanted).detach() / wanted[0].numel())


def test_every_third_sample_is_held_however_calls_are_cut(make: Callable[..., Distillation]) -> None:
    free, held = learned(make()), learned(make(**HELD))
    cut = learned(make(**HELD, micro_batch=1))
    student = [name for name in free if name.startswith(STUDENT)]
    assert any(not torch.equal(free[name], held[name]) for name in student)
    assert all(torch.allclose(cut[name], held[name], rtol=1e-6, atol=1e-9) for name in held)


def test_it_is_let_go_as_the_rate_falls(make: Callable[..., Distillation]) -> None:
    falling = {"steps": 4, "decay_steps": 8}  # half of the way is done at the first step
    free = make(**falling).train_step()
    for end, share in ((1.0, 1.0), (0.2, 0.6), (0.0, 0.5)):
        held = make(**HELD, **falling, anchor_end=end).train_step()
        pull = held["student_loss"] - free["student_loss"]
        assert pull == pytest.approx(share * HELD["anchor_weight"] * held["anchor_loss"])


def test_from_coarse_to_fine(make: Callable[..., Distillation], monkeypatch: pytest.MonkeyPatch) -> None:
    run, ranges = make(steps=8, decay_steps=4, timestep_high=900, timestep_high_end=100), []
    drawn = run._draw

    def watched(purpose: int, numbers: range, low: int, high: int) -> random_draws.Draw:
        ranges.append((purpose, low, high))
        return drawn(purpose, numbers, low, high)

    monkeypatch.setattr(run, "_draw", watched)
    for _ in range(8):
        run.train_step()
    judged = [(low, high) for purpose, low, high in ranges if purpose == random_draws.STUDENT]
    assert judged == [(20, high) for high in (900, 900, 900, 900, 900, 700, 500, 300)]


def test_a_student_that_went_astray_comes_back(make: Callable[..., Distillation]) -> None:
    # Drawn in one step without guidance, what the teacher draws is what a student without angles draws.
    held = {"anchor_weight": 1000.0, "anchor_every": 1, "anchor_steps": 1, "anchor_cells": 4, "teacher_guidance": 1.0}
    run = make(**held, student_lr=0.05, batch=8, precision="fp32", base_weights="fp32")
    with torch.no_grad():
        for parameter in run.roles.parameters(STUDENT):
            parameter.normal_(std=0.5)
    found = [run.train_step()["anchor_loss"] for _ in range(20)]
    assert sum(found[-5:]) < 0.5 * sum(found[:5])
