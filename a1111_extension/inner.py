"""A pass that another extension draws within a generation, with a picture to begin with, as ADetailer does for each face.

Such a pass takes the prompt and the sampler of the generation, and none of this extension's hooks are called for it. One
step from pure noise would put a picture of its own there. So it is drawn with a sampler of many steps, at the steps and
the scale that were asked for, and without the one-step LoRaDs.
"""

from __future__ import annotations

import weakref
from typing import Any

from modules import extra_networks, sd_samplers
from torch import Tensor

from wadi_core.settings import SAMPLER as NAME

from . import catalog, host

SAMPLER, STEPS, SCALE = "Euler", 20, 7.0
TOLD = (
    f"the inner pass of another extension (such as ADetailer) is drawn with {SAMPLER} and without the one-step LoRaD: "
    f"{NAME} draws from pure noise alone; a sampler can be chosen in that extension"
)

_generation: weakref.ref[Any] | None = None


def within(p: Any) -> None:
    """Remember the generation that is going on, which is told of what is within it."""
    global _generation
    _generation = weakref.ref(p)


def is_one(p: Any) -> bool:
    """Whether the program's object for a generation was made by another extension."""
    return not hasattr(p, "wadi_passes")


def sample(
    p: Any, x: Tensor, noise: Tensor, conditioning: Any, unconditional_conditioning: Any, image_conditioning: Tensor | None
) -> Tensor:
    """Clean latents of the shape of ``x``, the latents of the given picture, which it begins with."""
    outer = _generation() if _generation else None
    host.tell(outer or p, TOLD)
    extra_networks.activate(p, _without_one_step(p.extra_network_data or {}))
    if hasattr(p.sd_model, "forge_objects_after_applying_lora"):  # in Forge a pass works on a copy of these
        p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora.shallow_copy()
    steps, scale = getattr(outer, "wadi_asked", (STEPS, SCALE))
    if p.steps == 1:
        p.steps = max(int(steps), STEPS)
    if p.cfg_scale == 1.0 and unconditional_conditioning is not None:
        p.cfg_scale = scale
    p.sampler_name = SAMPLER
    p.sampler = sd_samplers.create_sampler(SAMPLER, p.sd_model)
    return p.sampler.sample_img2img(
        p, x, noise, conditioning, unconditional_conditioning, image_conditioning=image_conditioning
    )


def _without_one_step(tags: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The program's own table of a prompt's tags, without those of one-step LoRaDs."""
    return {kind: [one for one in found if not _is_one_step(one)] for kind, found in tags.items()}


def _is_one_step(tag: Any) -> bool:
    file = catalog.file_of(str(tag.positional[0])) if tag.positional else None
    try:
        lorad = None if file is None else catalog.look(file)
    except (OSError, ValueError):  # such a file is not applied
        return False
    return lorad is not None and lorad.one_step is not None
