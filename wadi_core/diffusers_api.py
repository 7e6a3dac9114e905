"""What :class:`~.pipeline.OneStepPipeline` takes in the words of diffusers: prompts, generators, latents, devices.

Noise is drawn as diffusers draws it, so that a generator gives the picture that a stock pipeline makes of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from . import settings
from .negative import Negatives
from .settings import PictureSettings

Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator] | None"
Prompts: TypeAlias = "str | Sequence[str] | None"
Place: TypeAlias = "str | int | torch.device | torch.dtype | None"


def prompts_of(prompts: Prompts, prompt: Prompts, count: int) -> list[str]:
    """The prompts of a call: of its two names for them the one that was used, each ``count`` times in a row.

    Raises:
        ValueError: both names or none, no text, or a count that is none; one line.
    """
    if prompts is not None and prompt is not None:
        raise ValueError("prompts and prompt are two names for the same: give one of them")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"num_images_per_prompt must be a whole number from 1 on, not {count!r}")
    return [one for one in listed(prompt if prompts is None else prompts) for _ in range(count)]


def listed(prompts: Prompts) -> list[str]:
    """One or many prompts as a list.

    Raises:
        ValueError: there is none, or one that is no text; one line.
    """
    if isinstance(prompts, (bytes, bytearray, Mapping)) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be a text or a list of texts, not {type(prompts).__name__}")
    found = [prompts] if isinstance(prompts, str) else list(prompts)
    if not found:
        raise ValueError("a picture needs a prompt")
    for prompt in found:
        settings.check("prompt", prompt)
    return found


def negatives_of(negative: Negatives, count: int) -> Negatives:
    """Negative prompts of a call: where there is one for each prompt, each ``count`` times in a row."""
    if isinstance(negative, Sequence) and not isinstance(negative, (str, bytes, bytearray)) and len(negative) > 1:
        return [one for one in negative for _ in range(count)]
    return negative


def check_guidance(steps: int, guidance_scale: float | None) -> None:
    """Do nothing if a call asks for one step without a second pass for guidance, as is all there is.

    Raises:
        ValueError: it asks for more; one line.
    """
    if steps != 1:
        raise ValueError(f"a picture is one network call: num_inference_steps must be 1, not {steps}")
    if guidance_scale not in (None, 0, 1):
        raise ValueError(f"one step has no guidance: guidance_scale must be 1 (or 0), not {guidance_scale}")


def size_of(latents: Tensor, width: int | None, height: int | None, factor: int) -> tuple[int, int]:
    """Width and height of a picture from these latents.

    Raises:
        ValueError: they are no latents, or another size is asked for; one line.
    """
    if not isinstance(latents, Tensor) or latents.ndim != 4:
        raise ValueError("latents must be a tensor of (pictures, 4, height/8, width/8)")
    theirs = latents.shape[3] * factor, latents.shape[2] * factor
    if (width or theirs[0], height or theirs[1]) != theirs:
        raise ValueError(f"the latents are for {theirs[0]}x{theirs[1]} pixels, not for {width}x{height}")
    return theirs


def draw(
    generator: Generators, latents: Tensor | None, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The noise of a call, of ``shape``: the latents themselves, or what diffusers draws from the generators.

    Raises:
        ValueError: they do not fit the number of pictures or their size; one line.
    """
    if latents is not None:
        if latents.shape != shape:
            raise ValueError(f"latents of {shape} are needed for these pictures, not of {tuple(latents.shape)}")
        return latents.to(device, dtype)
    each = list(generator) if isinstance(generator, Sequence) else [generator]
    if not all(isinstance(one, torch.Generator) for one in each):
        raise ValueError("generator must be a torch.Generator or a list of them")
    if isinstance(generator, Sequence) and len(each) != shape[0]:
        raise ValueError(f"there are {shape[0]} pictures and {len(each)} generators: one for each is needed, or a single one")
    if wrong := next((one.device for one in each if one.device.type not in ("cpu", device.type)), None):  # type: ignore[union-attr]
        raise ValueError(f"a generator is on {wrong} and the pipeline on {device}: make it for the same device or for cpu")

    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(shape, generator=generator, device=device, dtype=dtype)  # type: ignore[arg-type]


def with_true_seeds(
    wanted: Sequence[PictureSettings], z: Tensor, generator: Generators, noise_of: Callable[[int], Tensor]
) -> list[PictureSettings]:
    """The settings with the seeds that give this very noise; without a seed where there is none.

    Only a generator's own first seed is tried: a generator that has been used before, or that draws a second picture,
    gives noise that no seed stands for.

    Args:
        z: (n, 4, h/8, w/8) the noise.
        noise_of: the noise (1, 4, h/8, w/8) of a seed.
    """
    each = [*generator] if isinstance(generator, Sequence) else [generator] * len(wanted)
    found = []
    for one, its_noise, source in zip(wanted, z, each, strict=True):
        seed = source.initial_seed() % 2**64 if source is not None else None
        true = seed is not None and torch.equal(noise_of(seed)[0].to(its_noise), its_noise)
        found.append(dataclasses.replace(one, seed=seed if true else None))
    return found


def device_and_dtype(
    places: Sequence[Place], device: Place = None, dtype: Place = None
) -> tuple[str | torch.device | None, torch.dtype | None]:
    """The device and the number format that ``.to(...)`` was given, in any order; None for what was not.

    Raises:
        ValueError: one of them twice; one line.
    """
    kinds = [place for place in (*places, dtype) if isinstance(place, torch.dtype)]
    devices = [place for place in (*places, device) if place is not None and not isinstance(place, torch.dtype)]
    if len(kinds) > 1 or len(devices) > 1:
        raise ValueError("one device and one dtype can be given, not several of a kind")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype such as torch.float16, not {dtype!r}")
    if not devices:
        return None, kinds[0] if kinds else None
    named = torch.device(devices[0]) if isinstance(devices[0], int) else devices[0]
    return named, kinds[0] if kinds else None  # type: ignore[return-value]
