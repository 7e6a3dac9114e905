"""Train the multi-step teacher of wadi-mini: text encoder and U-Net together, on latents made beforehand.

python -m trainer.mini.teacher --config trainer/configs/mini-teacher.yaml
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from wadi_core.pipeline import noise
from wadi_core.sheets import contact_sheet
from wadi_core.thirdparty import DiffusersNetwork, Tokenizer

from ..settings import cli
from ..settings.fields import FilePath
from . import scenes
from .denoising import Denoising, DenoisingConfig
from .init import freeze_samplers, skip_copying, start_as_identity
from .latents import read_shards
from .pointing import Pointing, all_places_to_look
from .sampling import decode, make_scheduler, many_steps, tokenize

SHEET_CAPTIONS = (
    "a red apple",
    "a cat and a bicycle",
    "a frog on top of a pizza",
    "a rocket on a black background",
    "a big fox",
    "a guitar",
    "a penguin above a birthday cake",
    "a tulip on a light blue background",
    "an alarm clock and a key",
    "a small red car on a green background",
)


@dataclass
class TeacherConfig(DenoisingConfig):
    """Settings of the teacher's training."""

    output: FilePath = "runs/mini-teacher"
    vae: FilePath = "runs/mini-vae/vae"
    latents: FilePath = "runs/mini-latents"
    tokenizer: FilePath = "wadi_core/mini/tokenizer"
    channels: tuple[int, ...] = (96, 192, 192)
    heads: int = 2
    text_width: int = 128
    text_layers: int = 5
    start_from: FilePath | None = None  # a trained teacher's folder (unet/ and text_encoder/ in diffusers layout)
    words_from: FilePath | None = None  # a folder with a text_encoder/ that has had its first lessons: taken instead
    words_frozen: bool = False  # the text encoder stays as it is
    pointing: float = 0.0  # weight of the loss of where the finest attention looks; 0 for none


@dataclass(frozen=True)
class Told:
    """What the teacher is told of a batch: captions, and for its attention where to look and whether it can know."""

    ids: Tensor
    look: Tensor
    spoken: Tensor


def make_unet(config: TeacherConfig) -> DiffusersNetwork:
    """A U-Net laid out as Stable Diffusion 1.5's, in small, that begins as eps = x_t."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=config.channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=config.text_width,
        attention_head_dim=config.heads,  # diffusers' historical name for the number of heads
        norm_num_groups=32,
    )
    start_as_identity(unet)
    return unet


def make_text_encoder(config: TeacherConfig) -> DiffusersNetwork:
    """An untrained CLIP text encoder in small, with the standard vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=2,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            pad_token_id=49407,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )


def take_weights(network: nn.Module, folder: Path, part: str) -> None:
    """Give a network the weights of the trained one of the same shape in ``folder``: ``unet`` or ``text_encoder``.

    Raises:
        OSError: weights are missing.
        ValueError: its shape is another.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    kind = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}[part]
    try:
        network.load_state_dict(kind.from_pretrained(folder / part).state_dict())
    except RuntimeError as error:
        raise ValueError(f"{folder / part}: its shape is another than that of these settings") from error


class Teacher(nn.Module):
    """Text encoder and U-Net as one module: token ids to eps."""

    text_encoder: DiffusersNetwork
    unet: DiffusersNetwork

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(config)
        self.unet = make_unet(config)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        # Rows repeat (the empty caption above all): each different caption is encoded once.
        rows, back = ids.unique(dim=0, return_inverse=True)
        text = self.text_encoder(rows).last_hidden_state[back]
        return self.unet(x, t, text).sample


def sheet(teacher: Teacher, vae: DiffusersNetwork, tokenizer: Tokenizer, guidance: float) -> Image.Image:
    """Pictures of fixed captions and seeds: 25 guided steps (two seeds) and one step."""
    ids = tokenize(tokenizer, [*SHEET_CAPTIONS, ""])
    with torch.no_grad():
        text = teacher.text_encoder(ids).last_hidden_state
        rows = []
        for seed in (0, 100):
            z = noise(range(seed, seed + len(SHEET_CAPTIONS)), scenes.SIZE, scenes.SIZE)
            rows.append(decode(vae, many_steps(teacher.unet, z, text[:-1], text[-1:], guidance=guidance)))
        alpha_bar = make_scheduler().alphas_cumprod[999]
        eps = teacher.unet(z, 999, text[:-1]).sample
        rows.append(decode(vae, (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()))
    return contact_sheet(rows)


def run(config: TeacherConfig) -> None:
    """Train to the end, going on from the newest checkpoint of ``config.output``."""
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTokenizer

    torch.manual_seed(config.seed)
    latents, captions = read_shards(Path(config.latents))
    tokenizer = CLIPTokenizer.from_pretrained(config.tokenizer)
    vae = AutoencoderKL.from_pretrained(config.vae).eval()
    ids = tokenize(tokenizer, captions)
    null = tokenize(tokenizer, [""])[0]
    teacher = Teacher(config).train()
    if config.start_from:
        take_weights(teacher.unet, Path(config.start_from), "unet")
    if words := config.words_from or config.start_from:
        take_weights(teacher.text_encoder, Path(words), "text_encoder")
    teacher.text_encoder.requires_grad_(not config.words_frozen)
    # At 16x16 latents plain attention trains a third faster on a CPU than the fused kernel.
    teacher.unet.set_attn_processor(AttnProcessor())
    freeze_samplers(teacher.unet)
    skip_copying(teacher.unet)
    training = Denoising(teacher, teacher.unet, config)

    # Made after the average, which is a copy of the network and must not be heard.
    pointing = Pointing(teacher.unet) if config.pointing else None
    looks = all_places_to_look(captions) if config.pointing else torch.zeros(len(latents), 1, 1, 1)

    def draw() -> tuple[Tensor, Told]:
        chosen = torch.randint(0, len(latents), (config.batch,))
        x0, look = latents[chosen].float(), looks[chosen]
        if config.mirror:
            flipped = (torch.rand(config.batch) < 0.5).view(-1, 1, 1, 1)
            x0, look = torch.where(flipped, x0.flip(3), x0), torch.where(flipped, look.flip(3), look)
        silent = torch.rand(config.batch) < config.uncond_prob
        return x0, Told(torch.where(silent[:, None], null, ids[chosen]), look, ~silent)

    training.run(
        draw,
        lambda x, t, told: teacher(x, t, told.ids),
        lambda: (sheet(training.average, vae, tokenizer, 3.0), {}),
        "wadi-mini teacher",
        (lambda told: config.pointing * pointing.loss(told.look, told.spoken)) if pointing else None,
    )
    training.average.unet.save_pretrained(training.output / "unet")
    training.average.text_encoder.save_pretrained(training.output / "text_encoder")


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, TeacherConfig, run))
