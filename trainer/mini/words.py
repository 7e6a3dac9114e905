"""Teach the text encoder of wadi-mini what captions say, before the teacher learns to draw it.

    python -m trainer.mini.words --config trainer/configs/mini-words.yaml

Through eps a word learns slowly: an object is in one picture of three hundred, and the error tells of it through the
whole U-Net. A text encoder alone costs a twentieth of that, so it takes over what is memory: from captions alone it
learns which objects they name, in their order, the background, and the word for size or place; and what the objects
look like. The padding of a caption has room for that. Its last 49 positions stand for the 7x7 cells of an object, and
each has to tell the latents of its cell: one of the small object, first and second, and the 2x2 of a big one where
the caption names one object alone. What is left for the U-Net, to put them somewhere, perhaps mirrored, is the same
for all objects.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi_core.pictures import to_tensor
from wadi_core.thirdparty import DiffusersNetwork

from ..engine.logs import LossTable, Progress
from ..engine.muon import MuonWithAdamW
from ..settings import cli
from ..settings.fields import FilePath
from . import scenes
from .sampling import tokenize
from .teacher import TeacherConfig, make_text_encoder, take_weights

WORDS = ("big", "small", "on top of", "above", "under")
PLAIN = scenes.COLOURS["grey"]  # background of the pictures that say what an object looks like
NUMBERS = 5  # of a latent: its four channels, and how much of it the object fills


@dataclass
class WordsConfig:
    """Settings of the text encoder's first lessons."""

    output: FilePath = "runs/mini-words"
    seed: int = 0
    vae: FilePath = "runs/mini-vae/vae"
    tokenizer: FilePath = "wadi_core/mini/tokenizer"
    text_width: int = 128
    text_layers: int = 5
    start_from: FilePath | None = None  # a folder with a text_encoder/ that has had lessons before, of the same shape
    steps: int = 1000
    batch: int = 128
    lr: float = 3e-3  # of Muon
    adam_rate: float = 2e-3
    warmup: int = 30
    decay_steps: int = 400
    look_weight: float = 4.0


def _cells(maps: Tensor, size: int) -> Tensor:
    """Maps (n, c, 16, 16) of an object in the middle -> (n, 49, c or 4 c), what is in each cell."""
    side = size // scenes.GRID
    first = (scenes.SIZE // scenes.GRID - side) // 2
    inside = maps[..., first : first + side, first : first + side]
    return F.unfold(inside, kernel_size=side // scenes.CELLS, stride=side // scenes.CELLS).mT


@torch.no_grad()
def _maps(vae: DiffusersNetwork, size: int) -> Tensor:
    """(objects, 5, 16, 16): latents of each object in the middle less those of its background, and what it fills."""
    middle = scenes.SIZE // 2 - size // 2 % scenes.GRID  # as near as its edges on the grid allow
    maps = []
    plain = scenes.draw(scenes.Scene("", PLAIN, 0.0, ()))
    for start in range(0, len(scenes.things()), 32):
        placed = [scenes.Placed(thing, middle, middle, size, False) for thing in scenes.things()[start : start + 32]]
        on = {
            shade: to_tensor([scenes.draw(scenes.Scene("", (shade, shade, shade), 0.0, (item,))) for item in placed])
            for shade in (0, 255)
        }
        filled = F.avg_pool2d(1 - (on[255] - on[0]).mean(1, keepdim=True) / 2, scenes.GRID)
        pictures = [scenes.draw(scenes.Scene("", PLAIN, 0.0, (item,))) for item in placed]
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(to_tensor([*pictures, plain])).latent_dist.mean.float()
        maps.append(torch.cat([(mean[:-1] - mean[-1:]) * vae.config.scaling_factor, filled], dim=1))
    return torch.cat(maps)


def looks(vae: DiffusersNetwork) -> Tensor:
    """(objects + 1, 49, 25): the five numbers of each cell's latent of the small object, then of its 2x2 of the big one.

    The last row is no object: zeros.
    """
    told = torch.cat([_cells(_maps(vae, size), size) for size in (scenes.SMALL, scenes.BIG)], dim=2)
    return torch.cat([told, torch.zeros(1, *told.shape[1:])])


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
    """Tells the facts of captions from hidden states (n, 77, width)."""

    look: Tensor
    places: Tensor

    def __init__(self, width: int, look: Tensor) -> None:
        super().__init__()
        self.register_buffer("look", look)
        objects = len(look) - 1
        self.facts = nn.ModuleList(
            nn.Linear(width, count) for count in (objects, objects + 1, len(scenes.COLOURS) + 1, len(WORDS) + 1)
        )
        # No second object is ever big.
        self.looks = nn.ModuleList(nn.Linear(width, numbers) for numbers in (look.shape[2], NUMBERS))
        self.place = nn.Linear(width, 2)
        steps = torch.linspace(-1, 1, scenes.CELLS)
        self.register_buffer("places", torch.cartesian_prod(steps, steps))

    def forward(self, hidden: Tensor, ends: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """Losses of names, looks and places, and the share of captions whose objects are all told.

        Args:
            hidden: (n, 77, width).
            ends: (n,) where each caption ends.
            wanted: (n, 4) what :func:`facts` returns.
        """
        cells = hidden[:, -(scenes.CELLS**2) :]
        spoken = torch.cat([hidden[torch.arange(len(hidden)), ends], cells[:, -1]])
        told = [head(spoken).float() for head in self.facts]
        losses = (F.cross_entropy(row, wanted[:, index].repeat(2)) for index, row in enumerate(told))
        names = sum(losses, start=torch.zeros(()))
        first, second = (self.look[wanted[:, index]] for index in range(2))
        errors = (self.looks[0](cells).float() - first).square()
        alone = wanted[:, 1] == len(self.look) - 1
        seen = errors[..., :NUMBERS].mean() + F.mse_loss(self.looks[1](cells).float(), second[..., :NUMBERS])
        seen = seen + (errors[..., NUMBERS:].mean((1, 2)) * alone).mean()
        places = F.mse_loss(self.place(cells).float(), self.places.expand(len(cells), -1, -1))
        right = (told[0].argmax(1) == wanted[:, 0].repeat(2)) & (told[1].argmax(1) == wanted[:, 1].repeat(2))
        return {"names": names, "looks": seen, "places": places, "right": right.float().mean()}


def run(config: WordsConfig) -> None:
    """Train, and save ``text_encoder/`` in diffusers layout; some minutes, so that it is done in one go.

    Raises:
        OSError: a file is missing.
        ValueError: a caption reaches into the positions of the cells, or the encoder to go on from has another shape.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    tokenizer = CLIPTokenizer.from_pretrained(config.tokenizer)
    encoder = make_text_encoder(TeacherConfig(text_width=config.text_width, text_layers=config.text_layers)).train()
    if config.start_from:
        take_weights(encoder, Path(config.start_from), "text_encoder")
    reader = Reader(config.text_width, looks(AutoencoderKL.from_pretrained(config.vae).eval()))
    optimizer = MuonWithAdamW(encoder, config.lr, config.adam_rate)
    heads = torch.optim.AdamW(reader.parameters(), lr=config.adam_rate, weight_decay=0.0)
    table = LossTable(Path(config.output) / "losses.csv", 0)
    with Progress(config.steps) as progress:
        for step in range(1, config.steps + 1):
            rate = min(1, step / config.warmup, max(0.02, (config.steps - step) / config.decay_steps))
            plans = [scenes.draw_plan(rng) for _ in range(config.batch)]
            ids = tokenize(tokenizer, [plan.caption for plan in plans])
            ends = (ids == ids[0, -1]).int().argmax(dim=1)  # the padding behind is made of the same token
            if ends.max() >= ids.shape[1] - scenes.CELLS**2:
                raise ValueError(f"this caption is too long: {plans[int(ends.argmax())].caption}")
            with torch.autocast("cpu", torch.bfloat16):
                values = reader(encoder(ids).last_hidden_state, ends, facts(plans))
            loss = values["names"] + config.look_weight * values["looks"] + values["places"]
            loss.backward()
            optimizer.step(rate)
            for group in heads.param_groups:
                group["lr"] = config.adam_rate * rate
            heads.step()
            heads.zero_grad(set_to_none=True)
            progress.update(step)
            if step % 20 == 0:
                shown = {name: value.item() for name, value in values.items()}
                progress.tell_numbers(shown)
                table.add(step, shown)
    encoder.save_pretrained(Path(config.output) / "text_encoder")
    table.plot(Path(config.output) / "losses.png", ["names", "looks"], "wadi-mini text encoder")


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, WordsConfig, run))
