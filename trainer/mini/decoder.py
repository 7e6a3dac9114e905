"""Train the decoder of wadi-mini on a generator's latents, after the teacher has been trained.

    python -m trainer.mini.decoder --config trainer/configs/mini-decoder.yaml

Latents that a diffusion model has drawn are never quite those of a picture. A decoder that knows only the encoder's
paints every error, in one step the grain that rounding and haste leave above all; one that has seen such errors paints
the picture that was meant. So it learns here from latents of scenes that the teacher has painted over: noised to a
random t and guessed from there in one call, once more at half of t, and a noise of their own on top. The encoder, and
so every latent that the teacher has learned, stays as it is; so does the teacher.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi_core import pictures
from wadi_core.pictures import to_tensor
from wadi_core.thirdparty import DiffusersNetwork, Tokenizer

from ..settings import cli
from ..settings.fields import FilePath
from . import scenes
from .autoencoding import Autoencoding, Sheet, keep_layout
from .latents import read_shards
from .sampling import make_scheduler, tokenize
from .vae import crop_box

CELL = 8  # pixels of a latent's side
SHOWN = 12  # scenes of the sheet


@dataclass
class DecoderConfig:
    """Settings of the decoder's second training."""

    output: FilePath = "runs/mini-decoder"
    seed: int = 0
    vae: FilePath = "runs/mini-vae/vae"
    teacher: FilePath = "runs/mini-teacher"  # a folder with unet/ and text_encoder/
    latents: FilePath = "runs/mini-latents"
    tokenizer: FilePath = "wadi_core/mini/tokenizer"
    steps: int = 2000
    batch: int = 8
    crop: int = 64  # pixels
    whole_share: float = 0.5  # of the steps: on whole scenes, so many fewer that there are as many pixels
    lr: float = 5e-4  # of Muon
    adam_rate: float = 1e-4
    warmup: int = 20
    painted_share: float = 0.75  # of the latents: painted over by the teacher
    highest_timestep: int = 750  # to which these are noised at most
    noise: float = 0.3  # on all latents, standard deviation; how much of it a picture gets is random
    edge_weight: float = 1.0
    perception_weight: float = 0.25  # 0: pixels only
    save_every: int = 200


class Painter:
    """The teacher as one that spoils latents.

    Args:
        unet, text_encoder, tokenizer: its parts.
    """

    def __init__(self, unet: DiffusersNetwork, text_encoder: nn.Module, tokenizer: Tokenizer) -> None:
        self.unet, self.text_encoder, self.tokenizer = unet.eval(), text_encoder.eval(), tokenizer
        self.alpha_bar = make_scheduler().alphas_cumprod

    @torch.no_grad()
    def paint(self, x0: Tensor, captions: list[str], t: Tensor) -> Tensor:
        """x0 (n, 4, h, w) as guessed from x_t, and then from x_(t/2) of the guess; t (n,)."""
        text = self.text_encoder(tokenize(self.tokenizer, captions)).last_hidden_state
        for stage in (t, t // 2):
            a = self.alpha_bar[stage].view(-1, 1, 1, 1)
            x = a.sqrt() * x0 + (1 - a).sqrt() * torch.randn(x0.shape)
            with torch.autocast("cpu", torch.bfloat16):
                eps = self.unet(x, stage, text).sample
            x0 = (x - (1 - a).sqrt() * eps.float()) / a.sqrt()
        return x0


def make_painter(config: DecoderConfig) -> Painter:
    """The teacher of the settings' folder."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel.from_pretrained(config.teacher, subfolder="unet").float()
    unet.set_attn_processor(AttnProcessor())
    text_encoder = CLIPTextModel.from_pretrained(config.teacher, subfolder="text_encoder").float()
    return Painter(unet, text_encoder, CLIPTokenizer.from_pretrained(config.tokenizer))


def spoil(config: DecoderConfig, painter: Painter, x0: Tensor, captions: list[str]) -> Tensor:
    """Latents as a generator might have drawn them: most of them painted over, all of them with some noise."""
    t = torch.randint(0, config.highest_timestep + 1, (len(x0),))
    painted = torch.rand(len(x0), 1, 1, 1) < config.painted_share
    amount = config.noise * torch.rand(len(x0), 1, 1, 1)
    x0 = torch.where(painted, painter.paint(x0, captions, t), x0)
    return x0 + amount * torch.randn(x0.shape)


def cropped(latents: Tensor, boxes: list[tuple[int, int, int, int]]) -> Tensor:
    """The latents of crops whose edges, in pixels, are on the grid."""
    return torch.stack(
        [x[:, box[1] // CELL : box[3] // CELL, box[0] // CELL : box[2] // CELL] for x, box in zip(latents, boxes, strict=True)]
    )


def run(config: DecoderConfig) -> None:
    """Train to the end, going on from the newest checkpoint of ``config.output``.

    Raises:
        ValueError: the latents are not of the scenes as they are drawn today; one line.
    """
    from diffusers import AutoencoderKL

    latents, captions = read_shards(Path(config.latents))
    if captions[: len(captions) // 100 + 1] != [scenes.scene(seed).caption for seed in range(len(captions) // 100 + 1)]:
        raise ValueError(f"{config.latents}: these latents are of other scenes; make them anew with trainer.mini.latents")
    painter = make_painter(config)
    vae: DiffusersNetwork = AutoencoderKL.from_pretrained(config.vae).float().train()
    keep_layout(vae)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    scale = vae.config.scaling_factor
    training = Autoencoding(vae, config)
    first = latents[:SHOWN].float()
    torch.manual_seed(config.seed)
    spoilt = spoil(config, painter, first, captions[:SHOWN])
    drawn = [scenes.draw(scenes.scene(seed)) for seed in range(len(first))]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        # All chance of a step follows from its number, so a run that goes on needs no state of it.
        torch.manual_seed(config.seed * 1_000_003 + step)
        rng = random.Random(config.seed * 1_000_003 + step)
        # Crops are full of objects, but a GroupNorm sees the whole of what it is given: it must know scenes too.
        side = scenes.SIZE if rng.random() < config.whole_share else config.crop
        chosen = torch.randint(0, len(latents), (max(1, config.batch * config.crop**2 // side**2),)).tolist()
        plans = [scenes.scene(seed) for seed in chosen]
        boxes = [crop_box(rng, plan, side) for plan in plans]
        target = to_tensor([scenes.draw(plan).crop(box) for plan, box in zip(plans, boxes, strict=True)])
        x0 = spoil(config, painter, latents[chosen].float(), [captions[seed] for seed in chosen])
        latent = cropped(x0, boxes)
        if rng.random() < 0.25:
            latent, target = latent.flip(3), target.flip(3)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latent / scale).sample.float()
        return training.picture_loss(decoded, target)

    def sheet() -> Sheet:
        rows = [vae.decode(x / scale).sample for x in (first, spoilt)]
        return [drawn, *(pictures.to_pictures(row) for row in rows)], F.mse_loss(rows[1], to_tensor(drawn))

    if training.run(loss, sheet, "wadi-mini decoder"):
        vae.save_pretrained(training.output / "vae")


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, DecoderConfig, run))
