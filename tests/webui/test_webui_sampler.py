"""The one-step sampler of A1111 against the core's formula; the program is stood in for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from webui_stand_ins import host_modules, standing_in

from wadi_core.schedule import OneStep
from wadi_core.settings import SAMPLER

CALLS: list[tuple[Tensor, Tensor, Tensor]] = []


def network(x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """A network whose prediction depends on all that it is given."""
    text = cond["c_crossattn"][0]
    CALLS.append((x, t, text))
    return 0.3 * x + text.mean((1, 2)).reshape(-1, 1, 1, 1)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Any]:
    """The module of the sampler, and the program's modules around it."""
    CALLS.clear()
    modules = host_modules(tmp_path, network)
    with standing_in(modules) as extension:
        yield SimpleNamespace(sampler=extension("sampler"), **modules["modules"].__dict__)


def sampled(
    program: Any, composition: list[list[tuple[int, float]]], texts: Tensor, one_step: OneStep
) -> tuple[Tensor, Tensor]:
    """Noise, and what the sampler makes of it."""
    owner = SimpleNamespace(last_latent=None)
    denoiser = program.sampler.OneStepDenoiser(owner)
    z = torch.randn(len(composition), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps: list[dict[str, Any]] = []
    told = {"cond": (composition, texts), "uncond": torch.zeros_like(texts), "image_cond": torch.zeros(len(z), 5, 1, 1)}
    x0 = program.sampler.sample_one_step(denoiser, z, one_step, told, steps.append)
    assert owner.last_latent is x0 and program.seen["latent"] == [x0] and [step["i"] for step in steps] == [0]
    return z, x0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_call_gives_the_cores_latents(program: Any, kind: str) -> None:
    one_step = OneStep(alpha_T_squared=0.02, prediction_type=kind)
    texts = torch.arange(2.0).reshape(2, 1, 1).expand(2, 77, 4)
    z, x0 = sampled(program, [[(0, 1.0)], [(1, 1.0)]], texts, one_step)
    ((x, t, text),) = CALLS
    assert torch.equal(x, z) and t.tolist() == [999.0, 999.0] and text.shape == texts.shape
    prediction = 0.3 * z + torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    assert torch.equal(x0, one_step.x0(z, prediction))


def test_parts_of_a_prompt_are_one_call_and_their_mean(program: Any) -> None:
    texts = torch.tensor([2.0, 6.0]).reshape(2, 1, 1).expand(2, 77, 4)
    z, x0 = sampled(program, [[(0, 1.0), (1, 3.0)]], texts, OneStep())
    assert len(CALLS) == 1 and torch.equal(CALLS[0][0], z.expand(2, -1, -1, -1))
    assert torch.allclose(x0, OneStep().x0(z, 0.3 * z + 5.0), atol=1e-5)
    with pytest.raises(ValueError, match="must add up to more than 0"):
        sampled(program, [[(0, 1.0), (1, -1.0)]], texts, OneStep())


def test_what_other_extensions_hang_on_is_called(program: Any) -> None:
    sampled(program, [[(0, 1.0)]], torch.ones(1, 77, 4), OneStep())
    (asked,), (denoised,), (after,) = (program.seen[name] for name in ("denoiser", "denoised", "after"))
    assert asked.sigma.tolist() == [999.0] and asked.text_uncond is not None
    assert len(denoised.x) == 2  # the unconditional rows stand behind the conditional ones
    assert torch.equal(after.x, denoised.x[:1])


def test_interrupting_stops_before_the_network(program: Any) -> None:
    program.shared.state.interrupted = True
    with pytest.raises(program.sd_samplers_common.InterruptedException):
        sampled(program, [[(0, 1.0)]], torch.ones(1, 77, 4), OneStep())
    assert CALLS == []


def test_registering_again_adds_nothing(program: Any) -> None:
    for _ in range(3):
        program.sampler.register()
    assert program.sd_samplers.names == ["Euler", SAMPLER]
    assert program.sd_samplers.all_samplers_map[SAMPLER].constructor is program.sampler.OneStepSampler
