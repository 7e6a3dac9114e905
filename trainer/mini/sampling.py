"""Pictures from the parts of a small Stable Diffusion: many guided steps, or one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wadi_core.pictures import to_pictures
from wadi_core.thirdparty import DiffusersNetwork, DiffusersScheduler, Tokenizer


def make_scheduler() -> DiffusersScheduler:
    """Stable Diffusion's noise schedule with DDIM steps that begin at t = 999."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def tokenize(tokenizer: Tokenizer, captions: Sequence[str]) -> Tensor:
    """(n, 77) token ids, padded as the text encoder expects."""
    return tokenizer(list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def many_steps(unet: DiffusersNetwork, z: Tensor, text: Tensor, null: Tensor, steps: int = 25, guidance: float = 3.0) -> Tensor:
    """DDIM with classifier-free guidance from z at t = 999 to x0. ``text`` and ``null``: (n, 77, width)."""
    scheduler = make_scheduler()
    scheduler.set_timesteps(steps)
    both = torch.cat([text, null.expand_as(text)])
    x = z
    for t in scheduler.timesteps:
        with torch.autocast(x.device.type, torch.bfloat16):
            eps, eps_null = unet(x.repeat(2, 1, 1, 1), t, both).sample.float().chunk(2)
        x = scheduler.step(eps_null + guidance * (eps - eps_null), t, x).prev_sample
    return x


@torch.no_grad()
def decode(vae: DiffusersNetwork, latents: Tensor) -> list:
    """Scaled latents (n, 4, h, w) as PIL pictures."""
    with torch.autocast(latents.device.type, torch.bfloat16):
        images = vae.decode(latents / vae.config.scaling_factor).sample
    return to_pictures(images)
