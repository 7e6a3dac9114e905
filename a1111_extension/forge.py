"""How the sampler asks Forge and Forge Neo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backend.sampling.sampling_function import sampling_cleanup, sampling_function, sampling_prepare
from modules.script_callbacks import CFGDenoiserParams
from torch import Tensor

from wadi_core.schedule import OneStep

from . import sampler, sigma


def register() -> None:
    """Put the sampler into the program's lists; once, however often it is called."""
    sampler.register(OneStepSampler)


class OneStepDenoiser(sigma.OneStepDenoiser):
    def ask(self, asked: CFGDenoiserParams, composition: Any) -> tuple[Tensor, Tensor]:
        denoised, conditional, _ = sampling_function(self, denoiser_params=asked, cond_scale=1.0, cond_composition=composition)
        return denoised, conditional


class OneStepSampler(sigma.OneStepSampler):
    denoiser = OneStepDenoiser

    def prepare(self, unet: Any, x: Tensor) -> None:
        sampling_prepare(unet, x=x)

    def clean_up(self, unet: Any) -> None:
        sampling_cleanup(unet)

    @contextmanager
    def predicting(self, unet: Any, one_step: OneStep) -> Iterator[Any]:
        predictor = unet.model.predictor
        sigmas, log_sigmas, returned = predictor.sigmas, predictor.log_sigmas, predictor.prediction_type
        predictor.set_sigmas(sigma.ending_at(sigmas, one_step))
        predictor.prediction_type = one_step.prediction_type
        try:
            yield predictor
        finally:
            predictor.sigmas, predictor.log_sigmas, predictor.prediction_type = sigmas, log_sigmas, returned

    def number_format(self, unet: Any) -> torch.dtype:
        return unet.model.computation_dtype
