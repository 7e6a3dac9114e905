"""The sampler "WaDi one-step" of Forge and Forge Neo.

Forge reduces every network to one convention: it is told sigma, and what comes back is the clean latent. With its table
of sigmas ending at the student's own, sigma_T / alpha_T, its arithmetic is the formula of
:class:`~wadi_core.schedule.OneStep`: the network sees z itself, and the result is (z - sigma_T eps) / alpha_T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backend.sampling.sampling_function import sampling_cleanup, sampling_function, sampling_prepare
from modules import prompt_parser, sd_samplers_common, shared
from modules.script_callbacks import (
    AfterCFGCallbackParams,
    CFGDenoiserParams,
    cfg_after_cfg_callback,
    cfg_denoiser_callback,
)
from modules.sd_samplers_kdiffusion import CFGDenoiserKDiffusion
from torch import Tensor

from wadi_core.schedule import OneStep, check_latents

from . import host, large, negative, sampler


def register() -> None:
    """Put the sampler into the program's lists; once, however often it is called."""
    sampler.register(OneStepSampler)


@contextmanager
def table_of(predictor: Any, one_step: OneStep) -> Iterator[None]:
    """Forge's table of sigmas ends at the schedule's own, and its network returns what the schedule says.

    Below the end it is the network's own table, scaled: there ControlNet's start and end are looked up.
    """
    sigmas, log_sigmas, returned = predictor.sigmas, predictor.log_sigmas, predictor.prediction_type
    table = sigmas[: one_step.timestep + 1].double()
    predictor.set_sigmas(table * (one_step.sigma / table[-1]))
    predictor.prediction_type = one_step.prediction_type
    try:
        yield
    finally:
        predictor.sigmas, predictor.log_sigmas, predictor.prediction_type = sigmas, log_sigmas, returned


def sample_one_step(
    denoiser: Any, x: Tensor, sigma: Tensor, extra_args: dict[str, Any], callback: Callable[[dict[str, Any]], None]
) -> Tensor:
    """x0 (n, 4, h, w) from noise of that shape as Forge scales it, in the form that the program knows of samplers."""
    x0 = check_latents(denoiser(x, sigma.expand(len(x)), **extra_args), x.dtype)
    denoiser.sampler.last_latent = x0
    sd_samplers_common.store_latent(x0)
    callback({"i": 0, "x": x0})
    return x0


class OneStepDenoiser(CFGDenoiserKDiffusion):
    """Asks the network for the prompts alone; Forge leaves the unconditional branch out at a scale of 1."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Any, image_cond: Tensor) -> Tensor:
        """Clean latents (n, 4, h, w) from one call of the network.

        Args:
            x: (n, 4, h, w), noise as Forge scales it.
            sigma: (n,).
            cond: the program's schedule of prompts.
            image_cond: of inpainting networks, else of no meaning.
        """
        state = shared.state
        if state.interrupted or state.skipped:
            raise sd_samplers_common.InterruptedException
        composition, text = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        # Of several parts joined by AND Forge returns the mean times the sum of their weights; the mean is what is meant.
        whole = all(sampler.total_weight(parts) == 1.0 for parts in composition)
        asked = CFGDenoiserParams(x, image_cond, sigma, state.sampling_step, state.sampling_steps, text, None, self)
        cfg_denoiser_callback(asked)
        denoised, conditional, _ = sampling_function(self, denoiser_params=asked, cond_scale=1.0, cond_composition=composition)
        done = AfterCFGCallbackParams(denoised if whole else conditional, state.sampling_step, state.sampling_steps)
        cfg_after_cfg_callback(done)
        self.step += 1
        return done.x


class OneStepSampler(sampler.FromNoise):
    """The sampler's object for one pass."""

    def __init__(self, sd_model: Any) -> None:
        super().__init__(sample_one_step)
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
        one_step = sampler.begin(p)
        self.initialize(p)
        self.model_wrap_cfg.mask = self.model_wrap_cfg.nmask = None  # what is kept is put back after the step
        self.last_latent = x
        self.sampler_extra_args = {"cond": conditioning, "image_cond": image_conditioning}
        unet = host.forge_unet()
        predictor = unet.model.predictor
        with table_of(predictor, one_step), large.enlarged(p, x), negative.steered_by_texts(p):
            sampling_prepare(unet, x=x)
            sigma = predictor.sigma_max.to(x)
            # What the network sees is what must be taken away again: the noise in the network's own number format.
            z = x.to(unet.model.computation_dtype).to(x.dtype)
            scaled = predictor.noise_scaling(sigma, z, torch.zeros_like(z), max_denoise=True)

            def run() -> Tensor:
                return self.func(self.model_wrap_cfg, scaled, sigma, self.sampler_extra_args, self.callback_state)

            try:
                samples = self.launch_sampling(1, run)
            finally:
                sampling_cleanup(unet)
        self.add_infotext(p)
        return samples
