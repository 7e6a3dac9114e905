"""Forge: LoRaD as a weight calculator and a loader of files, and the sampler "WaDi one-step".

Forge reduces every network to one convention: it is told sigma, and what comes back is the clean latent. With its table
of sigmas ending at the student's own, sigma_T / alpha_T, its arithmetic is the formula of
:class:`~wadi_core.schedule.OneStep`: the network sees z itself, and the result is (z - sigma_T eps) / alpha_T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backend.patcher import lora as lora_patcher
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

from wadi_core.lorad.format import LORAD_ENDINGS
from wadi_core.lorad.rotation import rotate_
from wadi_core.schedule import OneStep, check_latents

from . import large, sampler

KIND = "lorad"  # of a patch


class Factors:
    """The factors of a layer, as Forge carries them in its list of patches.

    In an object of its own, because Forge casts the tensors of patches to its computing type, and in half precision
    small angles would be lost.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a = a
        self.b = b


class Loader:
    """Reads LoRaD files; what it does not know is left to Forge's own loaders behind it."""

    def load_lora(self, lora: dict[str, Tensor], to_load: dict[str, str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Patches by the name of the weight that they change, and the tensors for which there is no such weight.

        Args:
            lora: the tensors of a file.
            to_load: keys of layers in files -> names of weights.
        """
        patches: dict[str, Any] = {}
        first, second = LORAD_ENDINGS
        taken = set()
        for key, weight in to_load.items():
            if key + first in lora and key + second in lora:
                patches[weight] = (KIND, Factors(lora[key + first], lora[key + second]))
                taken |= {key + first, key + second}
        rest = {name: tensor for name, tensor in lora.items() if name not in taken}
        if not rest:
            return patches, rest
        others = [loader for loader in lora_patcher.lora_collection_priority if not is_ours(loader)]
        more, rest = next(loader for loader in others if hasattr(loader, "load_lora")).load_lora(rest, to_load)
        return {**patches, **more}, rest


def is_ours(loader: Any) -> bool:
    """Whether a loader in Forge's list is this module's, also one from before a "Reload UI"."""
    return type(loader).__name__ == Loader.__name__ and type(loader).__module__ == Loader.__module__


def turn(weight: Tensor, strength: float, factors: Factors) -> Tensor:
    """Forge's weight calculator for LoRaD: ``weight`` (out, in), which is Forge's own copy, turned in place."""
    if weight.shape != (factors.a.shape[0], 2 * factors.b.shape[1]):
        raise ValueError(f"a LoRaD of shape {(factors.a.shape[0], 2 * factors.b.shape[1])} on a weight {tuple(weight.shape)}")
    return rotate_(weight, [(factors.a, factors.b, strength)])


def register() -> None:
    """Add calculator, loader and sampler to Forge's lists; once, however often it is called."""
    lora_patcher.extra_weight_calculators[KIND] = turn
    others = [loader for loader in lora_patcher.lora_collection_priority if not is_ours(loader)]
    lora_patcher.lora_collection_priority[:] = [Loader(), *others]
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
        unet = shared.sd_model.forge_objects.unet  # it is another one in every pass
        predictor = unet.model.predictor
        with table_of(predictor, one_step), large.enlarged(p, x):
            sampling_prepare(unet, x=x)
            sigma = predictor.sigma_max.to(x)
            # What the network sees is what must be taken away again: the noise in the network's own number format.
            z = x.to(unet.model.computation_dtype).to(x.dtype)
            scaled = predictor.noise_scaling(sigma, z, torch.zeros_like(z), max_denoise=one_step.input_scale == "one")

            def run() -> Tensor:
                return self.func(self.model_wrap_cfg, scaled, sigma, self.sampler_extra_args, self.callback_state)

            try:
                samples = self.launch_sampling(1, run)
            finally:
                sampling_cleanup(unet)
        self.add_infotext(p)
        return samples
