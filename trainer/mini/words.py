"""Teach the text encoder of wadi-mini what captions say, before the teacher learns to draw it.

    python -m trainer.mini.words --config trainer/configs/mini-words.yaml

Through eps a word learns slowly: an object is in one picture of three hundred, and the error tells of it through the
whole U-Net. A text encoder alone costs a twentieth of that. Stable Diffusion's was trained on captions before as well,
with pictures beside them. Here every position from the end of a caption on has to tell which objects it names, in
their order, what they look like (the principal components of their latents, so that like objects begin near each
other), the background, and the word for size or place.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import config as settings
from ..watch import LossTable
from . import scenes
from .sampling import tokenize
from .teacher import TeacherConfig, make_text_encoder
from .vae import to_tensor

LENGTH = 32  # tokens: more than any caption has
WORDS = ("big", "small", "on top of", "above", "under")
PLAIN = (150, 150, 155)  # background of the pictures that say what an object looks like


@dataclass
class WordsConfig:
    """Settings of the text encoder's first lessons."""

    output: str = "runs/mini-words"
    seed: int = 0
    vae: str = "runs/mini-vae/vae"
    tokenizer: str = "wadi_core/configs/tokenizer"
    text_width: int = 128
    text_layers: int = 3
    steps: int = 800
    batch: int = 384
    learning_rate: float = 1.5e-3
    warmup: int = 40
    components: int = 96  # of what objects look like
    look_weight: float = 2.0


@torch.no_grad()
def looks(vae: nn.Module, components: int) -> Tensor:
    """(objects + 1, components): what each object looks like, each component's spread 1; the last row is no object."""
    flat = []
    for start in range(0, len(scenes.things()), 32):
        plans = [
            scenes.Scene("", PLAIN, 0.0, (scenes.Placed(thing, 64, 64, scenes.SINGLE_SIZES[-1], False),))
            for thing in scenes.things()[start : start + 32]
        ]
        flat.append(vae.encode(to_tensor([scenes.draw(plan) for plan in plans])).latent_dist.mean.flatten(1))
    centred = torch.cat(flat) - torch.cat(flat).mean(0)
    u, _, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = u[:, :components] * len(u) ** 0.5
    return torch.cat([coordinates, torch.zeros(1, coordinates.shape[1])])


def facts(plans: Sequence[scenes.Scene]) -> Tensor:
    """(n, 4): first object, second object (the number of objects: none), colour named and word of WORDS (0: none)."""
    none = len(scenes.things())
    rows = []
    for plan in plans:
        first, second = (*(item.thing.index for item in plan.placed), none)[:2]
        colour = plan.caption.partition(" background")[0].rpartition(" on a")[2].removeprefix("n").strip()
        named = list(scenes.COLOURS).index(colour) + 1 if plan.caption.endswith(" background") else 0
        word = next((index for index, word in enumerate(WORDS, 1) if f" {word} " in f" {plan.caption} "), 0)
        rows.append((first, second, named, word))
    return torch.tensor(rows)


class Reader(nn.Module):
    """Tells the facts of a caption from hidden states (n, width)."""

    def __init__(self, width: int, look: Tensor) -> None:
        super().__init__()
        self.register_buffer("look", look)
        objects = len(look) - 1
        self.facts = nn.ModuleList(
            nn.Linear(width, count) for count in (objects, objects + 1, len(scenes.COLOURS) + 1, len(WORDS) + 1)
        )
        self.looks = nn.ModuleList(nn.Linear(width, look.shape[1]) for _ in range(2))

    def forward(self, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of names and of looks, and the share of captions whose objects are all told."""
        told = [head(hidden).float() for head in self.facts]
        names = sum(F.cross_entropy(row, wanted[:, index]) for index, row in enumerate(told))
        seen = sum(F.mse_loss(head(hidden).float(), self.look[wanted[:, index]]) for index, head in enumerate(self.looks))
        right = (told[0].argmax(1) == wanted[:, 0]) & (told[1].argmax(1) == wanted[:, 1])
        return names, seen, right.float().mean()


def run(config: WordsConfig) -> None:
    """Train, and save ``text_encoder/`` in diffusers layout; a few minutes, so that it is done in one go."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    tokenizer = CLIPTokenizer.from_pretrained(config.tokenizer)
    encoder = make_text_encoder(TeacherConfig(text_width=config.text_width, text_layers=config.text_layers)).train()
    reader = Reader(config.text_width, looks(AutoencoderKL.from_pretrained(config.vae).eval(), config.components))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *reader.parameters()], lr=config.learning_rate, weight_decay=0.0)
    table = LossTable(Path(config.output) / "losses.csv", 0)
    bar = tqdm(range(1, config.steps + 1), unit="step", mininterval=5)
    for step in bar:
        rate = min(1, step / config.warmup, max(0.02, 1.5 * (1 - step / config.steps)))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        plans = [scenes.draw_plan(rng) for _ in range(config.batch)]
        ids = tokenize(tokenizer, [plan.caption for plan in plans])[:, :LENGTH]
        # The first of the equal tokens at the end is the caption's end, the others are the padding behind it.
        rows, places = (ids == ids[0, -1]).nonzero(as_tuple=True)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = encoder(ids).last_hidden_state[rows, places]
            names, seen, right = reader(hidden, facts(plans)[rows])
        loss = names + config.look_weight * seen
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            values = {"names": names.item(), "looks": seen.item(), "right": right.item()}
            bar.set_postfix(values)
            table.add(step, values)
    _extend_positions(encoder)
    encoder.save_pretrained(Path(config.output) / "text_encoder")
    table.plot(Path(config.output) / "losses.png", ["names", "looks"], "wadi-mini text encoder")


@torch.no_grad()
def _extend_positions(encoder: nn.Module) -> None:
    """Places that were not trained, which only padding reaches, begin as the last one that was."""
    (places,) = (p for name, p in encoder.named_parameters() if name.endswith("position_embedding.weight"))
    places[LENGTH:] = places[LENGTH - 1]


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arguments = settings.parser(__doc__.splitlines()[0]).parse_args()
    run(settings.load(WordsConfig, arguments.config, arguments.overrides))


if __name__ == "__main__":
    main()
