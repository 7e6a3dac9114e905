"""What makes the pictures of an evaluation: a base, with or without a LoRaD, in one step or in many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from wadi_core import base as bases
from wadi_core.files import one_line
from wadi_core.lorad.adapter import check_together, fuse
from wadi_core.pipeline import find_device, find_dtype, load_adapters, noise
from wadi_core.schedule import OneStep, check_latents
from wadi_core.thirdparty import DiffusersScheduler

from .base_models import Model, PixArt, StableDiffusion, is_pixart, local_base, weights_key

if TYPE_CHECKING:
    from PIL.Image import Image

    from wadi_core.pipeline import Adapters


class Generator(Protocol):
    """Anything that makes pictures can be evaluated."""

    def recipe(self) -> dict[str, Any]:
        """All that decides its pictures besides prompt and seed, as plain values."""
        ...

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """A picture of each prompt, from the noise of its seed."""
        ...


@dataclass(frozen=True)
class ModelGenerator:
    """A base model as it stands.

    Attributes:
        model: with its network on the device.
        one_step: where the one step starts, and what the network returns.
        size: width and height in pixels.
        steps: 1 is the one-step formula, without guidance; more are those of DPM-Solver++.
        guidance: classifier-free guidance scale, for more than one step.
        dtype: of the network.
    """

    model: Model
    one_step: OneStep
    size: tuple[int, int]
    steps: int = 1
    guidance: float = 3.0
    dtype: torch.dtype = torch.float32

    def recipe(self) -> dict[str, Any]:
        made_with = dataclasses.asdict(self.one_step) if self.steps == 1 else {"guidance": self.guidance}
        weights = [weights_key(self.model.network), weights_key(self.model.vae), self.model.encoder_key]
        return {"weights": weights, "size": self.size, "steps": self.steps, "dtype": str(self.dtype), **made_with}

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        return self.model.decode(self.latents(prompts, seeds))

    def latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(n, 4, h/8, w/8) clean latents, one for each prompt and seed."""
        z = noise(seeds, *self.size).to(self.model.device)
        return self._one(prompts, z) if self.steps == 1 else self._many(prompts, z)

    @torch.no_grad()
    def _one(self, prompts: Sequence[str], z: Tensor) -> Tensor:
        # The network's own number format, for the formula too: what it sees is what must be taken away again.
        x = self.one_step.network_input(z.to(self.dtype))
        t = torch.full((len(x),), self.one_step.timestep, device=x.device)
        prediction = self.model.call(self.model.network, x, t, self._condition(prompts))
        return check_latents(self.one_step.x0(x.float(), prediction), self.dtype)

    @torch.no_grad()
    def _many(self, prompts: Sequence[str], x: Tensor) -> Tensor:
        scheduler = make_sampler(self.model.alphas_cumprod, self.one_step.prediction_type)
        scheduler.set_timesteps(self.steps)
        both = self._condition(prompts).joined(self._condition([""]))
        for t in scheduler.timesteps:
            doubled, times = x.repeat(2, 1, 1, 1).to(self.dtype), t.to(x.device).repeat(2 * len(x))
            cond, uncond = self.model.call(self.model.network, doubled, times, both).float().chunk(2)
            x = scheduler.step(uncond + self.guidance * (cond - uncond), t, x).prev_sample
        return x

    def _condition(self, prompts: Sequence[str]) -> Any:
        condition = self.model.encode(prompts)
        return dataclasses.replace(condition, text=condition.text.to(self.dtype))


def make_sampler(alphas_cumprod: Tensor, prediction_type: str) -> DiffusersScheduler:
    """DPM-Solver++ of second order over a base's own noise levels; begins at the last one."""
    from diffusers import DPMSolverMultistepScheduler

    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    kind: type[Any] = DPMSolverMultistepScheduler
    return kind(
        trained_betas=(1 - alphas_cumprod / before).tolist(),
        prediction_type=prediction_type,
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",
    )


def load_generator(
    base: str,
    lorad: Adapters = None,
    device: str | None = None,
    dtype: str | None = None,
    side: int | None = None,
    steps: int = 1,
    guidance: float = 3.0,
    alpha_T_squared: float | None = None,
) -> ModelGenerator:
    """A base with adapters fused into it.

    Args:
        base: ``mini``, a diffusers folder (Stable Diffusion or PixArt-alpha), or a single-file checkpoint.
        lorad: as :meth:`~wadi_core.OneStepPipeline.set_lorad` takes it; ``None`` is the bare base.
        device, dtype: by default a GPU, if there is one, in float16; else the CPU in float32.
        side: of the pictures in pixels, by default the base's own size.
        steps, guidance: as for :class:`ModelGenerator`.
        alpha_T_squared: says that the base is a one-step network itself, and where it starts.

    Raises:
        OSError, ValueError: something is missing, damaged or does not fit; one line.
    """
    place = find_device(device)
    kind = find_dtype(dtype, place)
    stack = load_adapters(lorad)
    model, own = _load_base(base)
    if alpha_T_squared is not None:
        own = OneStep(alpha_T_squared, prediction_type=own.prediction_type if own else _prediction_type(model))
    active = [(adapter, kept.strength) for adapter, kept in stack if kept.strength]
    for adapter, _ in active:
        adapter.matched(model.network).check()
    schedule = check_together(adapter for adapter, _ in active)
    if isinstance(model, StableDiffusion):
        model.base.check_one_step(schedule)
    if schedule and own:
        raise ValueError("a one-step LoRaD is made for a multi-step base, and this base is a one-step network already")
    one_step = schedule or own
    if one_step is None:
        if steps == 1:
            raise ValueError(
                one_line(f"{base}: one step of a multi-step base gives a blur: name its --lorad, or take --steps 25")
            )
        one_step = OneStep(prediction_type=_prediction_type(model))
    model.network.to(place, kind)
    fuse(model.network, active, keep_backup=False)
    model.place_helpers(place, kind, offload=False)
    size = (side, side) if side else model.native_size
    if any(pixels % bases.FACTOR for pixels in size):
        raise ValueError(f"a side of {size[0]} pixels is not divisible by {bases.FACTOR}")
    return ModelGenerator(model, one_step, size, steps, guidance, kind)


def _load_base(base: str) -> tuple[Model, OneStep | None]:
    """A base on the CPU, and its one step where it is a one-step network itself."""
    base = local_base(base)
    if base != "mini" and is_pixart(base):
        return PixArt(Path(base)), None
    loaded = bases.load(base, torch.device("cpu"), torch.float32)
    return StableDiffusion(loaded, bases.find(base).settings), loaded.one_step


def _prediction_type(model: Model) -> str:
    return model.base.prediction_type if isinstance(model, StableDiffusion) else "epsilon"
