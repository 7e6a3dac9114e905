"""Train the ControlNet of wadi-mini: edges (canny) steer the multi-step teacher, which stays as it is.

    python -m trainer.mini.controlnet --config trainer/configs/mini-controlnet.yaml

The one-step student is never seen here: it is steered by what was learned for its teacher. The latents are the
teacher's own (trainer.mini.latents); their scenes are drawn once more, each from its seed, and their edges kept as
bits. Of scenes with two objects some captions name only one, so that the map has something of its own to say.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from wadi_core import base as bases
from wadi_core import pictures
from wadi_core.control import Steered, Steering
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.pictures import to_tensor
from wadi_core.pipeline import noise
from wadi_core.sheets import contact_sheet
from wadi_core.thirdparty import DiffusersNetwork, Tokenizer

from ..engine.logs import Progress
from ..engine.muon import ENDS
from ..settings import cli
from ..settings.fields import FilePath
from . import scenes
from .denoising import Denoising, DenoisingConfig
from .edges import agreement, control_maps, edges, pack, unpack
from .init import freeze_samplers
from .latents import SHARD, read_shards, tell_now_and_then
from .sampling import decode, make_scheduler, many_steps, tokenize

logger = logging.getLogger("wadi")

SHEET_FIRST, SHEET_SCENES = 30_000_000, 10  # seeds of scenes that are in no shard
FOREIGN = 0.1  # mean square difference from which on latents are some other autoencoder's


@dataclass
class ControlNetConfig(DenoisingConfig):
    """Settings of the ControlNet's training."""

    output: FilePath = "runs/mini-controlnet"
    base: FilePath = "mini"  # or the teacher's folder in diffusers layout
    latents: FilePath = "runs/mini-latents"
    maps: FilePath = "runs/mini-control-maps"
    steps: int = 6000
    lr: float = 3e-4  # of Muon: the copied layers are trained already
    warmup: int = 100
    decay_steps: int = 2000
    high_noise_fraction: float = 0.5  # the noisy end is where places are decided
    last_share: float = 0.1
    part_share: float = 0.3  # of the captions: only one of two objects is named


def make_controlnet(unet: DiffusersNetwork) -> DiffusersNetwork:
    """A ControlNet that begins as a copy of the U-Net's first half and adds nothing yet."""
    from diffusers import ControlNetModel

    controlnet = ControlNetModel.from_unet(unet)
    freeze_samplers(controlnet)
    return controlnet


def told_in_part(plan: scenes.Scene, which: int) -> str:
    """A caption that names one object of two; of one object, its own caption."""
    return plan.placed[which % 2].thing.phrase if len(plan.placed) > 1 else plan.caption


@dataclass
class Scenes:
    """What is learned from, a row for each scene.

    Attributes:
        latents: (n, 4, 16, 16) float16.
        maps: (n, 128, 16) uint8, edges as bits.
        ids, part_ids: (n, 77) tokens of the caption, and of the one that leaves an object out.
        first: seed of the first row's scene.
    """

    latents: Tensor
    maps: Tensor
    ids: Tensor
    part_ids: Tensor
    first: int = 0

    @classmethod
    def read(cls, config: ControlNetConfig, tokenizer: Tokenizer) -> Scenes:
        """The shards of a folder of latents; maps that are not there yet are drawn and kept.

        Raises:
            ValueError: there are no latents, or a file of maps is damaged; one line.
        """
        latents, captions = read_shards(Path(config.latents))
        maps, parts, indices = [], [], []
        for path in sorted(Path(config.latents).glob("shard-*.safetensors")):
            indices.append(index := int(path.stem.partition("-")[2]))
            kept = Path(config.maps) / f"maps-{index:03d}.safetensors"
            if not kept.exists():
                make_maps(index, kept)
            with safe_open(kept, framework="pt") as file:
                maps.append(file.get_tensor("maps"))
                parts += json.loads(file.metadata()["captions"])
        ids, part_ids = tokenize(tokenizer, captions), tokenize(tokenizer, parts)
        return cls(latents, torch.cat(maps), ids, part_ids, indices[0] * SHARD)

    def __len__(self) -> int:
        return len(self.latents)


def make_maps(index: int, path: Path) -> None:
    """Draw the scenes of one shard of latents again and write their edges, and captions that leave an object out."""
    maps, captions = [], []
    logger.info("%s: drawing and finding edges", path.name)
    with Progress(SHARD, unit="scene") as progress:
        for done in range(SHARD):
            seed = index * SHARD + done
            plan = scenes.scene(seed)
            captions.append(told_in_part(plan, random.Random(seed).randrange(2)))
            maps.append(pack(edges([scenes.draw(plan)])))
            tell_now_and_then(progress, done + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {"maps": torch.cat(maps)}, {"captions": json.dumps(captions)})


@torch.no_grad()
def check_latents(vae: DiffusersNetwork, data: Scenes) -> None:
    """Raises ValueError if the latents are none that this autoencoder makes of the scenes."""
    images = to_tensor([scenes.draw(scenes.scene(data.first + row)) for row in range(4)])
    own = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    if own.shape[1:] != data.latents.shape[1:] or (own - data.latents[:4].float()).square().mean() > FOREIGN:
        raise ValueError("the latents were made by another autoencoder than the base's: make them again")


@dataclass
class Batch:
    """Rows of one step: clean latents (n, 4, h, w), edges (n, 3, 8h, 8w), tokens (n, 77)."""

    x0: Tensor
    maps: Tensor
    ids: Tensor


def draw_batch(data: Scenes, null: Tensor, config: ControlNetConfig) -> Batch:
    """Scenes at random, each mirrored or not with its map, captions left out or shortened by chance."""
    chosen = torch.randint(0, len(data), (config.batch,))
    x0, maps = data.latents[chosen].float(), unpack(data.maps[chosen])
    if config.mirror:
        mirrored = torch.rand(config.batch) < 0.5
        x0 = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(3), x0)
        maps = torch.where(mirrored.view(-1, 1, 1), maps.flip(2), maps)
    lot = torch.rand(config.batch)[:, None]
    ids = torch.where(lot < config.uncond_prob + config.part_share, data.part_ids[chosen], data.ids[chosen])
    return Batch(x0, control_maps(maps), torch.where(lot < config.uncond_prob, null, ids))


def predict(base: bases.Base, controlnet: nn.Module, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
    """eps (n, 4, h, w) of the steered teacher; gradients reach the ControlNet alone."""
    with torch.no_grad():
        rows, back = batch.ids.unique(dim=0, return_inverse=True)
        text = base.text_encoder(rows).last_hidden_state[back]
    # No layer of the U-Net learns, so of its first half, which the ControlNet does not reach, nothing is kept.
    return Steered(base.unet, [Steering(controlnet, batch.maps)])(x, t, text).sample


@dataclass
class Sheet:
    """Scenes that training never shows, drawn anew from their edges and from captions that tell them in part."""

    originals: list[Image.Image]
    maps: Tensor
    captions: list[str]

    @classmethod
    def make(cls) -> Sheet:
        plans = [scenes.scene(SHEET_FIRST + row, pair=row % 2 == 1) for row in range(SHEET_SCENES)]
        originals = [scenes.draw(plan) for plan in plans]
        captions = [told_in_part(plan, row // 2) for row, plan in enumerate(plans)]
        return cls(originals, edges(originals), captions)

    @torch.no_grad()
    def draw(self, base: bases.Base, controlnet: nn.Module, guidance: float = 3.0) -> tuple[Image.Image, dict[str, float]]:
        """Originals, maps, 25 guided steps, and one step of the teacher; and how well the edges of both agree."""
        ids = tokenize(base.tokenizer, [*self.captions, ""])
        text = base.text_encoder(ids).last_hidden_state
        unet = Steered(base.unet, [Steering(controlnet, control_maps(self.maps))])
        z = noise(range(len(self.maps)), *base.native_size)
        many = decode(base.vae, many_steps(unet, z, text[:-1], text[-1:], guidance=guidance))
        alpha_bar = make_scheduler().alphas_cumprod[999]
        eps = unet(z, 999, text[:-1]).sample
        one = decode(base.vae, (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt())
        shown = pictures.to_pictures(control_maps(self.maps) * 2 - 1)
        figures = {
            name: agreement(edges(made), self.maps).mean().item() for name, made in (("f1_25_steps", many), ("f1_1_step", one))
        }
        return contact_sheet([self.originals, shown, many, one]), figures


def run(config: ControlNetConfig) -> None:
    """Train to the end, going on from the newest checkpoint of ``config.output``."""
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(config.seed)
    base = bases.load(config.base, torch.device("cpu"), torch.float32)
    data = Scenes.read(config, base.tokenizer)
    check_latents(base.vae, data)
    null = tokenize(base.tokenizer, [""])[0]
    controlnet = make_controlnet(base.unet).train()
    for network in (base.unet, controlnet):  # at 16x16 latents faster on a CPU than the fused kernel
        network.set_attn_processor(AttnProcessor())
    # What is read out of the ControlNet begins at zero: there is nothing yet for Muon to make orthogonal.
    training = Denoising(controlnet, controlnet, config, (*ENDS, "controlnet_down_blocks", "controlnet_mid_block"))
    shown = Sheet.make()

    def draw() -> tuple[Tensor, Batch]:
        batch = draw_batch(data, null, config)
        return batch.x0, batch

    training.run(
        draw,
        lambda x, t, batch: predict(base, controlnet, batch, x, t),
        lambda: shown.draw(base, training.average),
        "wadi-mini ControlNet",
    )
    training.average.save_pretrained(training.output / "controlnet")


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, ControlNetConfig, run))
