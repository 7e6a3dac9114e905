"""wadi-mini's bare networks in the stock pipelines of diffusers."""

from __future__ import annotations

import copy
from typing import Any

from wadi_core import OneStepPipeline


def mini_parts() -> dict[str, Any]:
    """The components of ``StableDiffusionPipeline``, the network without its LoRaD."""
    from diffusers import DDIMScheduler

    bare = OneStepPipeline.from_pretrained("mini", lorad=[], device="cpu", precision="exact")
    return {
        "unet": bare.base.unet,
        "vae": bare.base.vae,
        "text_encoder": bare.base.text_encoder,
        "tokenizer": bare.base.tokenizer,
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stock(parts: dict[str, Any], kind: str = "StableDiffusionPipeline", copied: bool = True, **more: Any) -> Any:
    """A pipeline of diffusers, with a network of its own where ``copied``; parts given as ``...`` are left out."""
    import diffusers

    wanted = {**parts, "unet": copy.deepcopy(parts["unet"]) if copied else parts["unet"], **more}
    pipe = getattr(diffusers, kind)(**{name: part for name, part in wanted.items() if part is not ...})
    pipe.set_progress_bar_config(disable=True)
    return pipe
