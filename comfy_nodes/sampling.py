"""One step in ComfyUI: the exact schedule as a model sampling, the sampler ``wadi_one_step``, and the nodes for them.

The noise that ComfyUI's samplers see is scaled by its own table, which ends at sigma 14.61464 for Stable Diffusion and
157.4 for PixArt. The student was trained at sigma_T / alpha_T = 14.55218 (alpha_T^2 = 0.0047) and t = 999. With a model
sampling whose table ends there ComfyUI's arithmetic is the formula of :class:`~wadi_core.schedule.OneStep`: the network
sees z itself, and the result is (z - sigma_T eps) / alpha_T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..wadi_core.negative import preset
from ..wadi_core.schedule import OneStep, check_latents
from . import pixart
from .model import layout_of, prediction_type
from .negative import with_negative
from .schema import MAXIMUM_SEED, schema

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

SAMPLER = "wadi_one_step"
NOT_ONE_STEP = (
    "this model has no one-step weights that are known here: with Load LoRaD, or One-Step Model for a complete one-step "
    "network, the picture becomes sharp; a multi-step network alone gives a blur in one step"
)


class OneStepSampling(comfy.model_sampling.ModelSamplingDiscrete):
    """A table of sigmas that ends at a student's own: its last index is the timestep that the network is told.

    Below the end it is Stable Diffusion's table, scaled; the student was never asked there, but ComfyUI's schedulers
    and ControlNet's start and end look there.
    """

    def __init__(self, one_step: OneStep) -> None:
        super().__init__()
        self.one_step = one_step
        table = self.sigmas[: one_step.timestep + 1].double()
        self.set_sigmas(table * (one_step.sigma / table[-1]))

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """Pure noise as a student was shown it: of variance 1, or of the variance that there is at its timestep."""
        full = max_denoise and self.one_step.input_scale == "one"
        return super().noise_scaling(sigma, noise, latent_image, full)


class OneStepEpsilon(OneStepSampling, comfy.model_sampling.EPS):
    """For a network that returns the noise."""


class OneStepV(OneStepSampling, comfy.model_sampling.V_PREDICTION):
    """For a network that returns v."""


def with_one_step(model: ModelPatcher, one_step: OneStep, native_size: int | None = None) -> ModelPatcher:
    """A MODEL that samples at a student's schedule; a PixArt model also gets what it needs at its native size.

    Args:
        native_size: pixels, where known; of PixArt only.
    """
    sampling = OneStepV if one_step.prediction_type == "v_prediction" else OneStepEpsilon
    prepared = model.clone()
    prepared.add_object_patch("model_sampling", sampling(one_step))
    if pixart.is_pixart(prepared):
        pixart.prepare(prepared, native_size or pixart.NATIVE_SIZE)
    return prepared


def is_one_step(model: ModelPatcher) -> bool:
    """Whether the MODEL samples at a student's schedule."""
    return isinstance(model.get_model_object("model_sampling"), OneStepSampling)


@torch.no_grad()
def sample_wadi_one_step(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """The clean latent from one call of the network at the largest sigma, as a sampler function of ComfyUI.

    z is the noise before ComfyUI scaled it and mixed it with the latent. So steps, scheduler, denoise and a latent that
    is not empty change nothing; a noise mask does its work.

    Args:
        model: what ComfyUI hands to samplers; its ``noise`` (n, c, h, w) is z.
        x: not used, it depends on steps, denoise and the latent.
        sigmas: only counted, to fill the progress bar.

    Raises:
        ValueError: there is no noise, or the network returned NaN or Inf; one line.
    """
    z = model.noise
    if not z.any():
        raise ValueError("one-step sampling turns noise into a picture, and there is none: switch add_noise on")
    sampling = model.inner_model.inner_model.model_sampling
    sigma = sampling.sigma_max.to(z)
    start = sampling.noise_scaling(sigma, z, torch.zeros_like(z), max_denoise=True)
    denoised = check_latents(model(start, sigma.expand(z.shape[0]), **(extra_args or {})), start.dtype)
    if callback is not None:
        callback({"x": start, "i": max(len(sigmas) - 2, 0), "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
    return denoised


def register() -> None:
    """Put ``wadi_one_step`` into the lists of every stock sampler node; a second time it does nothing."""
    setattr(comfy.k_diffusion.sampling, f"sample_{SAMPLER}", sample_wadi_one_step)
    if SAMPLER not in comfy.samplers.SAMPLER_NAMES:
        comfy.samplers.SAMPLER_NAMES.append(SAMPLER)


def one_step_sigmas(model: ModelPatcher) -> Tensor:
    """The sigmas of one step: the largest that the MODEL knows, then 0."""
    return torch.tensor([float(model.get_model_object("model_sampling").sigma_max), 0.0])


class OneStepModel(io.ComfyNode):
    """Exact sampling for a network that is a one-step student itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_OneStepModel",
            display_name="One-Step Model",
            category="WaDi/sampling",
            description="Sets the exact sampling of a complete one-step network, released or merged. Not needed after "
            "Load LoRaD. For PixArt-alpha 256 it also corrects latent scale, positions and text length.",
            search_aliases=["wadi", "one step", "single step", "model sampling", "turbo", "distilled"],
            inputs=[
                io.Model.Input("model", tooltip="A complete one-step network."),
                io.Float.Input(
                    "alpha_T_squared",
                    default=0.0047,
                    min=0.00001,
                    max=0.5,
                    step=0.0001,
                    round=0.0000001,
                    tooltip="Share of the signal at the last timestep: 0.0047 in the released networks.",
                ),
                io.Int.Input(
                    "timestep",
                    default=999,
                    min=0,
                    max=999,
                    tooltip="Timestep given to the network: 999 in the released networks.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same weights, sampled in one exact step.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, alpha_T_squared: float, timestep: int) -> io.NodeOutput:
        layout_of(model)
        return io.NodeOutput(with_one_step(model, OneStep(alpha_T_squared, timestep, prediction_type(model))))


class OneStepSampler(io.ComfyNode):
    """From a prompt to a latent in one call of the network."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def size(name: str) -> io.Int.Input:
            native = "512 for Stable Diffusion 1.5 and 2.1-base, 256 for PixArt-alpha, 128 for wadi-mini"
            return io.Int.Input(name, default=512, min=64, max=8192, step=8, tooltip=f"Pixels. Trained at {native}.")

        return schema(
            node_id="WaDi_OneStepSampler",
            display_name="One-Step Sampler",
            category="WaDi/sampling",
            description="Makes latents in exactly one network call, without steps, scheduler or cfg.",
            search_aliases=["wadi", "one step", "single step", "ksampler", "fast", "turbo"],
            inputs=[
                io.Model.Input("model", tooltip="A model with a one-step LoRaD, or from One-Step Model."),
                io.Conditioning.Input("positive", tooltip="The prompt. ControlNet and similar conditioning work as usual."),
                size("width"),
                size("height"),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Number of pictures in the network call."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAXIMUM_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the noise. Picture i of a batch uses seed + i and equals the picture made alone.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to keep out, in the same call, as Negative Prompt does with its default values.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Latents for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        width: int,
        height: int,
        batch_size: int,
        seed: int,
        negative: list[Any] | None = None,
    ) -> io.NodeOutput:
        if negative is not None:
            model = with_negative(model, negative, preset())
        notes = [] if is_one_step(model) else [NOT_ONE_STEP]
        if notes:
            layout_of(model)
            model = with_one_step(model, OneStep(prediction_type=prediction_type(model)))
        # ComfyUI's noise of a single picture, for each: what the core draws too, whatever the size of the batch.
        empty = torch.zeros(1, 4, height // 8, width // 8)
        seeds = [(seed + index) % (MAXIMUM_SEED + 1) for index in range(batch_size)]
        z = torch.cat([comfy.sample.prepare_noise(empty, one) for one in seeds])
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": positive})
        guider.set_cfg(1.0)
        samples = guider.sample(
            z,
            torch.zeros_like(z),
            comfy.samplers.KSAMPLER(sample_wadi_one_step),
            one_step_sigmas(model),
            callback=latent_preview.prepare_callback(model, 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        latent = {"samples": samples.to(comfy.model_management.intermediate_device())}
        return io.NodeOutput(latent, ui={"text": notes} if notes else None)


class OneStepCustomSampling(io.ComfyNode):
    """The two parts of one-step sampling for graphs of ComfyUI's custom sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_OneStepCustomSampling",
            display_name="One-Step Sampler and Sigmas",
            category="WaDi/sampling",
            description="SAMPLER and SIGMAS of one step, for Sampler Custom (cfg 1) and its Advanced form (Basic Guider).",
            search_aliases=["wadi", "one step", "sigmas", "custom sampling", "sampler custom advanced"],
            inputs=[io.Model.Input("model", tooltip="A model with a one-step LoRaD, or from One-Step Model.")],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="One call of the network at the largest sigma."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The model's largest sigma, then 0."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher) -> io.NodeOutput:
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_wadi_one_step), one_step_sigmas(model))
