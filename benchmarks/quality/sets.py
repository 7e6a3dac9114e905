"""Sets of pictures, real and generated, and their features, each in a :class:`~trainer.data.tensor_cache.Store`.

What decides a set's pictures: weights, settings, seeds, what draws the scenes. Latents are kept beside the features:
they are what takes time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from trainer.data.tensor_cache import Store
from trainer.evaluation.features import LiteFeatures
from trainer.mini import scenes
from trainer.mini.sampling import make_scheduler
from wadi_core.pictures import to_tensor
from wadi_core.pipeline import OneStepPipeline, noise

from .streams import Stream

GRAIN_SEED = 1 << 40  # far from the seeds of noises that pictures are made of
DECODE_BATCH = 16
SAMPLERS = ("dpm", "ddim")


def digest(modules: Iterable[torch.nn.Module]) -> str:
    """A hash of all weights of some networks: names, shapes and values."""
    total = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            total.update(f"{name}{tuple(tensor.shape)}".encode())
            total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


@dataclass(frozen=True)
class Real:
    """Drawn scenes."""

    name: str = "real"

    def recipe(self) -> dict[str, Any]:
        return {"source": "real"}

    def images(self, stream: Stream, rows: range) -> Tensor:
        """(n, 3, h, w) in [-1, 1]."""
        return to_tensor([scenes.draw(stream.varied(index)) for index in rows])


@dataclass(frozen=True)
class Reconstructed:
    """Real pictures through the autoencoder and back: what no generator of its latents can surpass."""

    pipe: OneStepPipeline
    name: str = "autoencoder"
    bfloat16: bool = True  # to decode

    def recipe(self) -> dict[str, Any]:
        return {"source": "autoencoder", "weights": digest([self.pipe.base.vae]), "bfloat16": self.bfloat16}

    @torch.no_grad()
    def images(self, stream: Stream, rows: range) -> Tensor:
        """(n, 3, h, w) in [-1, 1]."""
        vae = self.pipe.base.vae
        parts = Real().images(stream, rows).split(DECODE_BATCH)
        means = torch.cat([vae.encode(part.to(self.pipe.device)).latent_dist.mean for part in parts])
        return decode(self.pipe, means * vae.config.scaling_factor, self.bfloat16)


@dataclass(frozen=True)
class Generated:
    """What a pipeline makes as it stands, with or without a LoRaD fused in.

    Attributes:
        pipe: in float32.
        name: for people.
        steps: 1 is the one-step formula, without guidance.
        guidance, sampler: for more than one step.
        bfloat16: to decode, and for more than one step. One step stays in float32: it multiplies what the network
            is wrong by 14.6.
        batch: pictures a network call.
    """

    pipe: OneStepPipeline
    name: str
    steps: int = 1
    guidance: float = 3.0
    sampler: str = "dpm"
    bfloat16: bool = True
    batch: int = 64

    def recipe(self) -> dict[str, Any]:
        weights = digest([self.pipe.base.unet, self.pipe.base.vae, self.pipe.base.text_encoder])
        if self.steps == 1:
            kept = vars(self.pipe.one_step)
        else:
            kept = {key: getattr(self, key) for key in ("guidance", "sampler")}
        return {"source": "generated", "weights": weights, "steps": self.steps, "bfloat16": self.bfloat16, **kept}

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the pictures."""
        return self.pipe.native_size

    def network(self, stream: Stream, rows: range) -> Callable[..., Any]:
        """What is called for some pictures: the U-Net, or something around it."""
        return self.pipe.base.unet

    def pictures(self, latents: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] of scaled latents."""
        return decode(self.pipe, latents, self.bfloat16)

    def latents(self, stream: Stream, rows: range) -> Tensor:
        """x0 (n, 4, h/8, w/8) float32 on the CPU; picture i has the noise of seed ``stream.first + i``."""
        made = []
        for start in range(rows.start, rows.stop, self.batch):
            part = range(start, min(start + self.batch, rows.stop))
            z = noise([stream.first + index for index in part], *self.size).to(self.pipe.device)
            captions, unet = stream.captions(part), self.network(stream, part)
            if self.steps == 1:
                x0 = one_step(self.pipe, captions, z, unet)
            else:
                x0 = many_steps(self.pipe, captions, z, self.steps, self.guidance, self.sampler, self.bfloat16, unet)
            made.append(x0.float().cpu())
        return torch.cat(made)


Source: TypeAlias = Real | Reconstructed | Generated


@torch.no_grad()
def one_step(pipe: OneStepPipeline, captions: list[str], z: Tensor, unet: Callable[..., Any] | None = None) -> Tensor:
    """x0 (n, 4, h, w) from noise of that shape and one network call, of the pipeline's own U-Net or of another."""
    unet = unet or pipe.base.unet
    x = pipe.one_step.network_input(z)
    prediction = unet(x, pipe.one_step.timestep, encoder_hidden_states=pipe.encode(captions)).sample
    return pipe.one_step.x0(x, prediction)


@torch.no_grad()
def many_steps(
    pipe: OneStepPipeline,
    captions: list[str],
    z: Tensor,
    steps: int = 25,
    guidance: float = 3.0,
    sampler: str = "dpm",
    bfloat16: bool = True,
    unet: Callable[..., Any] | None = None,
) -> Tensor:
    """x0 (n, 4, h, w) from noise at t = 999 and many steps with classifier-free guidance, both halves in one batch."""
    unet = unet or pipe.base.unet
    scheduler = make_sampler(sampler)
    scheduler.set_timesteps(steps)
    text = pipe.encode([*captions, ""])
    both = torch.cat([text[:-1], text[-1:].expand(len(captions), -1, -1)])
    x = z
    for t in scheduler.timesteps:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=bfloat16):
            eps, eps_null = unet(x.repeat(2, 1, 1, 1), t, encoder_hidden_states=both).sample.float().chunk(2)
        x = scheduler.step(eps_null + guidance * (eps - eps_null), t, x).prev_sample
    return x


def make_sampler(name: str) -> Any:
    """A diffusers scheduler over Stable Diffusion's noise levels that begins at t = 999 and ends without noise.

    ``ddim``, or ``dpm``: DPM-Solver++ of second order.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    levels = {key: make_scheduler().config[key] for key in ("beta_start", "beta_end", "beta_schedule", "timestep_spacing")}
    if name == "ddim":
        return DDIMScheduler(**levels, clip_sample=False, set_alpha_to_one=True)
    return DPMSolverMultistepScheduler(**levels, algorithm_type="dpmsolver++", solver_order=2)


@torch.no_grad()
def decode(pipe: OneStepPipeline, latents: Tensor, bfloat16: bool = True) -> Tensor:
    """Scaled latents as pictures (n, 3, h, w) in [-1, 1], rounded to eight bits as real ones are, on the CPU."""
    vae = pipe.base.vae
    images = []
    for part in (latents / vae.config.scaling_factor).to(pipe.device).split(DECODE_BATCH):
        with torch.autocast(part.device.type, torch.bfloat16, enabled=bfloat16):
            images.append(vae.decode(part).sample.float().cpu())
    return ((torch.cat(images).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def store_of(work: str | os.PathLike[str], source: Source, stream: Stream) -> Store:
    """The folder of what a source makes of a stream."""
    return Store(work, f"{stream.name}-{source.name}", source.recipe() | stream.recipe())


def images_of(work: str | os.PathLike[str], source: Source, stream: Stream, count: int) -> Tensor:
    """The first ``count`` pictures of a stream, (count, 3, h, w) in [-1, 1]; for a few of them."""
    if not isinstance(source, Generated):
        return source.images(stream, range(count))
    return source.pictures(_latents(store_of(work, source, stream), source, stream, count))


def feature_set(work: str | os.PathLike[str], eye: LiteFeatures, source: Source, stream: Stream, count: int) -> np.ndarray:
    """Features (count, 1280) of the first ``count`` pictures of a stream."""

    def look(images: Tensor, rows: range) -> Tensor:
        return eye(images, grain_seeds(stream, rows))

    return measured(work, source, stream, count, f"features-grain-{eye.grain:g}", look)


def grain_seeds(stream: Stream, rows: range) -> list[int]:
    """Of the grain that pictures of a stream are looked at with."""
    return [GRAIN_SEED + stream.first + index for index in rows]


def measured(
    work: str | os.PathLike[str],
    source: Source,
    stream: Stream,
    count: int,
    kind: str,
    measure: Callable[[Tensor, range], Tensor],
) -> np.ndarray:
    """What ``measure`` finds in the first ``count`` pictures of a stream, a row for each.

    Args:
        kind: names what is found; other measures need other names.
        measure: takes pictures (n, 3, h, w) in [-1, 1] and their indices.
    """
    store = store_of(work, source, stream)
    latents = _latents(store, source, stream, count) if isinstance(source, Generated) else None

    def look(rows: range) -> Tensor:
        if latents is None:
            images = source.images(stream, rows)
        else:
            images = source.pictures(latents[rows.start : rows.stop])
        return measure(images, rows)

    return store.collect(kind, count, look).numpy()


def _latents(store: Store, source: Generated, stream: Stream, count: int) -> Tensor:
    return store.collect("latents", count, lambda rows: source.latents(stream, rows))
