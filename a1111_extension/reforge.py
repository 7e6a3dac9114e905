"""How the sampler asks reForge, which has A1111's object of a model and ComfyUI's network in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ldm_patched.modules.model_base import ModelType, model_sampling
from modules.script_callbacks import CFGDenoiserParams
from modules_forge.forge_sampler import forge_sample, sampling_cleanup, sampling_prepare
from torch import Tensor

from wadi_core.schedule import OneStep

from . import sampler, sigma


def register() -> None:
    """Put the sampler into the program's lists; once, however often it is called."""
    sampler.register(OneStepSampler)


class OneStepDenoiser(sigma.OneStepDenoiser):
    def ask(self, asked: CFGDenoiserParams, composition: Any) -> tuple[Tensor, Tensor]:
        asked.text_uncond = asked.text_cond  # looked at before a scale of 1 leaves it out
        denoised = forge_sample(self, asked, 1.0, composition)
        return denoised, denoised


class OneStepSampler(sigma.OneStepSampler):
    denoiser = OneStepDenoiser

    def prepare(self, unet: Any, x: Tensor) -> None:
        sampling_prepare(unet, x=x)

    def clean_up(self, unet: Any) -> None:
        sampling_cleanup(unet)

    @contextmanager
    def predicting(self, unet: Any, one_step: OneStep) -> Iterator[Any]:
        before = unet.model.model_sampling
        kind = ModelType.V_PREDICTION if one_step.prediction_type == "v_prediction" else ModelType.EPS
        predictor = model_sampling(unet.model.model_config, kind)
        predictor.set_sigmas(sigma.ending_at(before.sigmas, one_step))
        unet.model.model_sampling = predictor
        try:
            yield predictor
        finally:
            unet.model.model_sampling = before

    def number_format(self, unet: Any) -> torch.dtype:
        return unet.model.manual_cast_dtype or unet.model.get_dtype()
