"""Real scenes, roughly painted: what a judge of objects has to have seen beside the clean drawings.

Whoever has only ever seen clean drawings tells them apart by their finest details. An eye still names a fox that was
smeared, bent and posterised, and such are the faults of a small generator; prototypes of clean drawings no longer do.
So the judge learns from real scenes twice, as they are drawn and in this manner. None of it comes from what is judged,
but for the autoencoder that all pictures of wadi-mini go through.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from trainer.mini import scenes
from wadi_core.pictures import to_tensor
from wadi_core.pipeline import OneStepPipeline

from .sets import DECODE_BATCH, decode, digest
from .streams import Stream

MEDIANS = (0, 0, 3, 5, 7)  # pixels of a median filter's window; 0 for none
BLURS = (0, 0, 1, 2, 3)  # pixels, standard deviation
BENDS = (0, 1, 2, 3)  # pixels, standard deviation of how far the points of a grid of 8 px are moved
NOISES = (0.0, 0.02, 0.05, 0.1)  # on the latents, of their variance


@dataclass(frozen=True)
class Rough:
    """Real scenes that were smeared, blurred and bent at random, with noise on their latents.

    Attributes:
        pipe: whose autoencoder they go through.
        name: for people.
        bfloat16: to encode and decode.
        stamp_of: a character's picture in another set of emoji.
        drawing: a hash of that set's pictures.
    """

    pipe: OneStepPipeline
    name: str = "rough"
    bfloat16: bool = True
    stamp_of: Callable[[str], Image.Image] | None = None
    drawing: str = ""

    def recipe(self) -> dict[str, Any]:
        chances = {"medians": MEDIANS, "blurs": BLURS, "bends": BENDS, "noises": NOISES}
        kept = {"source": "rough", "weights": digest([self.pipe.base.vae]), "bfloat16": self.bfloat16, **chances}
        return kept | ({"drawing": self.drawing} if self.drawing else {})

    @torch.no_grad()
    def images(self, stream: Stream, rows: range) -> Tensor:
        """(n, 3, h, w) in [-1, 1]; how rough a picture is depends on its seed alone."""
        vae = self.pipe.base.vae
        images = []
        for start in range(rows.start, rows.stop, DECODE_BATCH):
            part = range(start, min(start + DECODE_BATCH, rows.stop))
            painted, noises = zip(*(_paint(stream, index, self.stamp_of) for index in part), strict=True)
            batch = torch.cat(painted).to(self.pipe.device)
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.bfloat16):
                latents = vae.encode(batch).latent_dist.mean.float() * vae.config.scaling_factor
            images.append(decode(self.pipe, latents + torch.cat(noises).to(latents.device), self.bfloat16))
        return torch.cat(images)


def _paint(stream: Stream, index: int, stamp_of: Callable[[str], Image.Image] | None) -> tuple[Tensor, Tensor]:
    """A scene (1, 3, h, w) before it is encoded, and the noise (1, 4, h/8, w/8) for its latents, of variance 1 at first."""
    rng = random.Random(f"rough {stream.first + index}")
    dice = torch.Generator().manual_seed(rng.getrandbits(60))
    picture = scenes.draw(stream.varied(index), stamp_of=stamp_of)
    if size := rng.choice(MEDIANS):
        picture = picture.filter(ImageFilter.MedianFilter(size))
    if radius := rng.choice(BLURS):
        picture = picture.filter(ImageFilter.GaussianBlur(radius))
    painted = bent(picture, rng.choice(BENDS), dice)
    side = scenes.SIZE // scenes.GRID
    return painted, torch.randn(1, 4, side, side, generator=dice) * rng.choice(NOISES) ** 0.5


def bent(picture: Image.Image, pixels: float, dice: torch.Generator) -> Tensor:
    """(1, 3, h, w) of a square picture whose points are moved by so many pixels (standard deviation), smoothly."""
    image = to_tensor([picture])
    side = image.shape[-1]
    moves = torch.randn(1, 2, side // scenes.GRID + 1, side // scenes.GRID + 1, generator=dice) * (2 * pixels / side)
    field = F.interpolate(moves, size=(side, side), mode="bicubic").permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3)[None], [1, 3, side, side], align_corners=False)
    return F.grid_sample(image, still + field, padding_mode="border", align_corners=False)
