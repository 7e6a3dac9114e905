"""One step in ComfyUI: the exact schedule as a model sampling, the sampler ``wadi_one_step``, and the nodes for them.

The noise that ComfyUI's samplers see is scaled by its own table, which ends at sigma 14.61464 for Stable Diffusion and
157.4 for PixArt. The student was trained at sigma_T / alpha_T = 14.55218 (alpha_T^2 = 0.0047) and t = 999. With a model
sampling whose table ends there ComfyUI's arithmetic is the formula of :class:`~wadi_core.schedule.OneStep`: the network
sees z itself, and the result is (z - sigma_T eps) / alpha_T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..wadi_core.schedule import OneStep, check_latents
from . import pixart
from .model import has_other_lorad, layout_of, prediction_type
from .notices import Notice, message
from .schema import MAXIMUM_SEED, schema, seed_input, size_input
from .sizes import PIXELS, SMALLEST, native_size, notices_on

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

SAMPLER = "wadi_one_step"
NOT_ONE_STEP = Notice(
    "warn_no_weights",
    "No one-step weights are known on this model, and a multi-step network gives a blur in one step: put Load LoRaD before "
    "this node, or One-Step Model after a complete one-step network.",
)
OTHER_SCHEDULE = Notice(
    "note_schedule",
    "The LoRaD comes from Load LoRA, which reads no schedule: the released one (t = 999, alpha_T^2 = 0.0047) is taken. "
    "One-Step Model sets another.",
)
CONTENT_UNUSED = Notice(
    "note_latent",
    "Only the size of the latent is used: one step starts from pure noise. A mask keeps what it does not cover.",
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


def made_one_step(model: ModelPatcher) -> tuple[ModelPatcher, list[Notice]]:
    """A MODEL that samples in one step, and what to say if nothing told that its weights do.

    Raises:
        ValueError: no network that LoRaD is made for; one line.
    """
    if is_one_step(model):
        return model, []
    layout_of(model)
    notice = OTHER_SCHEDULE if has_other_lorad(model) else NOT_ONE_STEP
    return with_one_step(model, OneStep(prediction_type=prediction_type(model))), [notice]


def picture_size(model: ModelPatcher, width: int, height: int) -> tuple[int, int]:
    """Width and height in pixels; 0 is the size that the MODEL was trained at.

    Raises:
        ValueError: too small for a picture; one line.
    """
    native = native_size(model) if 0 in (width, height) else 0
    width, height = width or native, height or native
    if min(width, height) < SMALLEST:
        raise ValueError(f"{width}x{height} is too small for a picture: set width and height to {SMALLEST} or more, or to 0")
    return width, height


def given(latent: dict[str, Any] | None, mask: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
    """The latents that are to be redrawn, one for each of ``count`` pictures, and where (1 is drawn anew); None without.

    Raises:
        ValueError: a mask and nothing that it could keep, or latents of another number; one line.
    """
    if latent is None:
        if mask is not None:
            raise ValueError("a mask keeps parts of a latent, and there is none: connect VAE Encode to the input latent")
        return None, None
    kept = latent["samples"]
    if len(kept) not in (1, count):
        raise ValueError(f"there are {len(kept)} latents for {count} pictures: set batch_size to {len(kept)}")
    mask = latent.get("noise_mask") if mask is None else mask
    if mask is not None:
        mask = comfy.sampler_helpers.prepare_mask(mask, (count, *kept.shape[1:]), torch.device("cpu"))
    return comfy.utils.repeat_to_batch_size(kept, count), mask


def prompt_notices(positive: list[Any], count: int) -> list[Notice]:
    """What to say of a prompt that holds several, for another number of pictures."""
    prompts = max((len(cond) for cond, _ in positive), default=1)
    if prompts in (1, count):
        return []
    text = f"The prompt has {prompts} lines for {count} pictures: connect Prompt Batch's count to batch_size."
    return [Notice("warn_prompts", text, {"prompts": prompts, "count": count})]


def seeds_from(seed: int, count: int) -> list[int]:
    """The seeds of a batch's pictures."""
    return [(seed + index) % (MAXIMUM_SEED + 1) for index in range(count)]


def sample(
    model: ModelPatcher,
    positive: list[Any],
    size: tuple[int, int],
    seeds: Sequence[int],
    kept: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Clean latents (n, 4, h/8, w/8) from one call of the network, a picture for each seed.

    Args:
        model: from :func:`made_one_step`.
        positive: a conditioning of ComfyUI's.
        size: width and height in pixels.
        seeds: of the noise. Each picture is what it is alone, whatever the others are.
        kept: (n, 4, h/8, w/8) what stays where the mask is 0, to the bit.
        mask: (n, 1 or 4, h/8, w/8), 1 where it is drawn anew.
    """
    width, height = size
    # ComfyUI's noise of a single picture, for each: what the core draws too, whatever the size of the batch.
    empty = torch.zeros(1, 4, height // PIXELS, width // PIXELS)
    z = torch.cat([comfy.sample.prepare_noise(empty, one) for one in seeds])
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)
    samples = guider.sample(
        z,
        torch.zeros_like(z) if kept is None or mask is None else kept.to(z),
        comfy.samplers.KSAMPLER(sample_wadi_one_step),
        one_step_sigmas(model),
        denoise_mask=mask,
        callback=latent_preview.prepare_callback(model, 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seeds[0],
    ).to(comfy.model_management.intermediate_device())
    if kept is None or mask is None:
        return samples
    # ComfyUI has blended with the latent scaled there and back, which rounds.
    return torch.where(mask.to(samples) == 0, kept.to(samples), samples)


class OneStepModel(io.ComfyNode):
    """Exact sampling for a network that is a one-step student itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_OneStepModel",
            display_name="One-Step Model (complete network)",
            category="WaDi/sampling",
            description="Sets the exact sampling of a complete one-step network, released or merged. Not needed after "
            "Load LoRaD. For PixArt-alpha 256 it also corrects latent scale, positions and text length.",
            search_aliases=["model sampling", "one step", "single step", "turbo", "distilled"],
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
        return schema(
            node_id="WaDi_OneStepSampler",
            display_name="One-Step Sampler",
            category="WaDi/sampling",
            description="Makes latents in exactly one network call, without steps, scheduler, cfg or negative prompt. With a "
            "latent and a mask it redraws what the mask covers.",
            search_aliases=["one step", "single step", "onestep", "ksampler", "fast", "turbo", "inpaint"],
            inputs=[
                io.Model.Input("model", tooltip="A model with a one-step LoRaD, or from One-Step Model."),
                io.Conditioning.Input("positive", tooltip="The prompt. ControlNet and similar conditioning work as usual."),
                size_input("width"),
                size_input("height"),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Number of pictures in the network call."),
                seed_input(),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="A picture to redraw in part, from VAE Encode; its size is taken instead of width and height.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White is drawn anew, black is kept as it is in the latent. Goes before the latent's own mask.",
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
        latent: dict[str, Any] | None = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        model, notices = made_one_step(model)
        kept, noise_mask = given(latent, mask, batch_size)
        if kept is None:
            width, height = picture_size(model, width, height)
        else:
            height, width = (PIXELS * side for side in kept.shape[-2:])
            if noise_mask is None and kept.any():
                notices.append(CONTENT_UNUSED)
        notices += notices_on(model, width, height) + prompt_notices(positive, batch_size)
        made = sample(model, positive, (width, height), seeds_from(seed, batch_size), kept, noise_mask)
        return io.NodeOutput({"samples": made}, ui=message(notices=notices))


class OneStepCustomSampling(io.ComfyNode):
    """The two parts of one-step sampling for graphs of ComfyUI's custom sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_OneStepCustomSampling",
            display_name="One-Step Sampler and Sigmas",
            category="WaDi/sampling",
            description="SAMPLER and SIGMAS of one step, for Sampler Custom (cfg 1) and its Advanced form (Basic Guider).",
            search_aliases=["sigmas", "one step", "custom sampling", "sampler custom advanced"],
            inputs=[io.Model.Input("model", tooltip="A model with a one-step LoRaD, or from One-Step Model.")],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="One call of the network at the largest sigma."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The model's largest sigma, then 0."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher) -> io.NodeOutput:
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_wadi_one_step), one_step_sigmas(model))
