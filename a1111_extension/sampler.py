"""The sampler "WaDi one-step" of A1111: one call of the network for a batch, without the unconditional branch.

It stands on the program's samplers that see pure noise (k-diffusion's see it multiplied by sigma), and calls all that
other extensions hang on. Steps, CFG scale and denoising strength change nothing here: the panel tells so and writes the
true values into the infotext.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from modules import devices, prompt_parser, sd_samplers, sd_samplers_common, shared
from modules.script_callbacks import (
    AfterCFGCallbackParams,
    CFGDenoisedParams,
    CFGDenoiserParams,
    cfg_after_cfg_callback,
    cfg_denoised_callback,
    cfg_denoiser_callback,
)
from modules.sd_samplers_timesteps import CFGDenoiserTimesteps, CompVisSampler, CompVisTimestepsDenoiser
from torch import Tensor

from wadi_core.schedule import OneStep, check_latents
from wadi_core.settings import SAMPLER as NAME

from . import host, inner, large, negative, schedule

ALIASES = ["wadi", "wadi_one_step"]
OPTIONS = {"no_sdxl": True}


def register(constructor: Callable[[Any], Any] | None = None) -> None:
    """Put the sampler into every list of the program, replacing the one of an earlier "Reload UI".

    Args:
        constructor: makes a sampler for a loaded model; A1111's own by default.
    """
    data = sd_samplers_common.SamplerData(NAME, constructor or OneStepSampler, ALIASES, OPTIONS)
    sd_samplers.all_samplers[:] = [other for other in sd_samplers.all_samplers if other.name != NAME] + [data]
    sd_samplers.all_samplers_map[NAME] = data
    sd_samplers.set_samplers()
    sd_samplers.get_sampler_and_scheduler.cache_clear()


def begin(p: Any) -> OneStep:
    """The schedule to sample a generation with; what there is to know about it is told and written into the infotext.

    Raises:
        ValueError: the adapters on the network disagree, or it is no network that is drawn with in this way; one line.
    """
    host.layout()
    found = schedule.in_force()
    for note in found.notes:
        host.tell(p, note)
    p.extra_generation_params["WaDi"] = str(found)
    return found.schedule


def total_weight(parts: list[tuple[int, float]]) -> float:
    """What the weights of a prompt's parts, joined by AND, add up to.

    Raises:
        ValueError: nothing positive, so there is no mean of them; one line.
    """
    total = sum(weight for _, weight in parts)
    if total <= 0:
        raise ValueError("in one step the weights of the parts of a prompt, joined by AND, must add up to more than 0")
    return total


def weighted_mean(rows: Tensor, composition: list[list[tuple[int, float]]]) -> Tensor:
    """What the network returned for the parts of each prompt, as one for each picture.

    Args:
        rows: (m, c, h, w).
        composition: for each picture, (row, weight) of its parts.

    Raises:
        ValueError: as of :func:`total_weight`.
    """
    nothing = rows.new_zeros(())
    means = [sum((rows[row] * (weight / total_weight(parts)) for row, weight in parts), nothing) for parts in composition]
    return torch.stack(means)


def sample_one_step(
    denoiser: Any, z: Tensor, one_step: OneStep, extra_args: dict[str, Any], callback: Callable[[dict[str, Any]], None]
) -> Tensor:
    """x0 (n, 4, h, w) from standard normal noise z of the same shape, in the form that the program knows of samplers."""
    x = one_step.network_input(z)
    prediction = denoiser(x, x.new_full((len(x),), float(one_step.timestep)), **extra_args)
    x0 = check_latents(one_step.x0(x.float(), prediction), x.dtype)
    denoiser.sampler.last_latent = x0
    sd_samplers_common.store_latent(x0)
    callback({"i": 0, "x": x0})
    return x0


class OneStepDenoiser(CFGDenoiserTimesteps):
    """Asks the network for the prompts alone, and returns what it returns: noise, or v."""

    @property
    def inner_model(self) -> CompVisTimestepsDenoiser:
        if self.model_wrap is None:
            self.model_wrap = CompVisTimestepsDenoiser(shared.sd_model)
        return self.model_wrap

    def forward(self, x: Tensor, timestep: Tensor, cond: Any, uncond: Any, image_cond: Tensor) -> Tensor:
        """One call of the network.

        Args:
            x: (n, 4, h, w).
            timestep: (n,).
            cond, uncond: the program's schedules of prompts and of negative prompts.
            image_cond: of inpainting and similar networks, else of no meaning.
        """
        state = shared.state
        if state.interrupted or state.skipped:
            raise sd_samplers_common.InterruptedException
        composition, text = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        unwanted = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        owner = torch.tensor([picture for picture, parts in enumerate(composition) for _ in parts], device=x.device)
        asked = CFGDenoiserParams(
            x[owner], image_cond[owner], timestep[owner], state.sampling_step, state.sampling_steps, text, unwanted, self
        )
        cfg_denoiser_callback(asked)
        told = {"c_crossattn": [asked.text_cond], "c_concat": [asked.image_cond]}
        with negative.steered(self.p, asked.text_uncond, owner.tolist()):
            rows = self.inner_model(asked.x, asked.sigma, cond=told)
        # Others expect the unconditional rows behind the conditional ones, as where the program skips that branch.
        firsts = rows[[parts[0][0] for parts in composition]]
        seen = CFGDenoisedParams(torch.cat([rows, firsts]), state.sampling_step, state.sampling_steps, self.inner_model)
        cfg_denoised_callback(seen)
        done = AfterCFGCallbackParams(weighted_mean(rows, composition), state.sampling_step, state.sampling_steps)
        cfg_after_cfg_callback(done)
        self.step += 1
        return done.x


class FromNoise(sd_samplers_common.Sampler):
    """For samplers that know no other point of the process than pure noise."""

    def sample_img2img(
        self,
        p: Any,
        x: Tensor,
        noise: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Tensor | None = None,
    ) -> Tensor:
        """As ``sample``, from the noise and not from the latents ``x`` of the given picture.

        With a mask the program puts the kept part of ``x`` back afterwards; before the step it would be no noise.
        """
        if inner.is_one(p):
            return inner.sample(p, x, noise, conditioning, unconditional_conditioning, image_conditioning)
        self.model_wrap_cfg.init_latent = x
        return self.sample(p, noise, conditioning, unconditional_conditioning, steps, image_conditioning)


class OneStepSampler(FromNoise, CompVisSampler):
    """The sampler's object for one pass."""

    def __init__(self, sd_model: Any) -> None:
        super().__init__(sample_one_step, sd_model)
        self.model_wrap_cfg = OneStepDenoiser(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def sample(
        self,
        p: Any,
        x: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Tensor | None = None,
    ) -> Tensor:
        """Clean latents (n, 4, h, w) from the noise ``x``; ``steps`` changes nothing."""
        one_step = begin(p)
        self.initialize(p)
        # What the network sees is what must be taken away again: the noise in the network's own number format.
        z = x.to(devices.dtype_unet)
        self.last_latent = x
        self.sampler_extra_args = {
            "cond": conditioning,
            "uncond": unconditional_conditioning,
            "image_cond": image_conditioning,
        }

        def run() -> Tensor:
            return self.func(self.model_wrap_cfg, z, one_step, self.sampler_extra_args, self.callback_state)

        with large.enlarged(p, x):
            samples = self.launch_sampling(1, run)
        self.add_infotext(p)
        return samples
