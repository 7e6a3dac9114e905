"""The sampler "WaDi one-step" of the programs that tell every network sigma and get clean latents back.

Forge and those that came of it reduce every network to that convention. With their table of sigmas ending at the
student's own, sigma_T / alpha_T, their arithmetic is the formula of :class:`~wadi_core.schedule.OneStep`: the network
sees z itself, and the result is (z - sigma_T eps) / alpha_T. How the programs are asked is in :mod:`.forge` and
:mod:`.reforge`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
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


def ending_at(sigmas: Tensor, one_step: OneStep) -> Tensor:
    """A table of sigmas that ends at the schedule's own.

    Below the end it is the network's own table, scaled: there ControlNet's start and end are looked up.
    """
    table = sigmas[: one_step.timestep + 1].double()
    return table * (one_step.sigma / table[-1])


def sample_one_step(
    denoiser: Any, x: Tensor, sigma: Tensor, extra_args: dict[str, Any], callback: Callable[[dict[str, Any]], None]
) -> Tensor:
    """x0 (n, 4, h, w) from noise of that shape as the program scales it, in the form that it knows of samplers."""
    x0 = check_latents(denoiser(x, sigma.expand(len(x)), **extra_args), x.dtype)
    denoiser.sampler.last_latent = x0
    sd_samplers_common.store_latent(x0)
    callback({"i": 0, "x": x0})
    return x0


class OneStepDenoiser(CFGDenoiserKDiffusion):
    """Asks the network for the prompts alone; the programs leave the unconditional branch out at a scale of 1."""

    def ask(self, asked: CFGDenoiserParams, composition: Any) -> tuple[Tensor, Tensor]:
        """One call of the network: clean latents, and those that other extensions have not changed."""
        raise NotImplementedError

    def forward(self, x: Tensor, sigma: Tensor, cond: Any, image_cond: Tensor) -> Tensor:
        """Clean latents (n, 4, h, w) from one call of the network.

        Args:
            x: (n, 4, h, w), noise as the program scales it.
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
        denoised, conditional = self.ask(asked, composition)
        done = AfterCFGCallbackParams(denoised if whole else conditional, state.sampling_step, state.sampling_steps)
        cfg_after_cfg_callback(done)
        self.step += 1
        return done.x


class OneStepSampler(sampler.FromNoise):
    """The sampler's object for one pass."""

    denoiser: type[OneStepDenoiser]

    def __init__(self, sd_model: Any) -> None:
        super().__init__(sample_one_step)
        self.model_wrap_cfg = self.denoiser(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def prepare(self, unet: Any, x: Tensor) -> None:
        """Have the program load what the pass needs."""
        raise NotImplementedError

    def clean_up(self, unet: Any) -> None:
        """What the program does after a pass."""
        raise NotImplementedError

    def predicting(self, unet: Any, one_step: OneStep) -> AbstractContextManager[Any]:
        """The program's predictor with a table as of :func:`ending_at`, that takes the network's answers as the schedule."""
        raise NotImplementedError

    def number_format(self, unet: Any) -> torch.dtype:
        """The type of the numbers that the network computes with."""
        raise NotImplementedError

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
        with self.predicting(unet, one_step) as predictor, large.enlarged(p, x), negative.steered_by_texts(p):
            self.prepare(unet, x)
            sigma = predictor.sigma_max.to(x)
            # What the network sees is what must be taken away again: the noise in the network's own number format.
            z = x.to(self.number_format(unet)).to(x.dtype)
            scaled = predictor.noise_scaling(sigma, z, torch.zeros_like(z), max_denoise=one_step.input_scale == "one")

            def run() -> Tensor:
                return self.func(self.model_wrap_cfg, scaled, sigma, self.sampler_extra_args, self.callback_state)

            try:
                samples = self.launch_sampling(1, run)
            finally:
                self.clean_up(unet)
        self.add_infotext(p)
        return samples
