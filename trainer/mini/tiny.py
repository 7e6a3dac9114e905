"""Train a tiny decoder for wadi-mini: what its full decoder draws, in a fraction of the time.

    python -m trainer.mini.tiny --config trainer/configs/mini-tiny.yaml

It has the layout of TAESD (Ollin Boer Bohan): plain convolutions in residual blocks, without normalisation or attention.
It learns on latents that the one-step student draws for fresh captions, because these are what it will be given, and is
shown what the full decoder makes of them. The file names its tensors as ``taesd_decoder.safetensors`` does.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from wadi_core import OneStepPipeline, pictures
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.sheets import contact_sheet
from wadi_core.tiny import from_layers, make_decoder

from ..settings import cli
from ..settings.fields import FilePath
from . import scenes
from .autoencoding import reconstruction_loss

CELL = 8  # pixels of a latent's side
HELD = 10  # pictures that are only looked at


@dataclass
class TinyConfig:
    """Settings of the tiny decoder's training."""

    output: FilePath = "runs/mini-tiny"
    seed: int = 0
    channels: int = 32
    blocks: tuple[int, ...] = (2, 2, 2, 1)  # of each level, from the latent's size to the picture's
    pictures: int = 400  # that the student draws, and the full decoder decodes, before the training
    steps: int = 4000
    minutes: float = 15.0  # the rate falls to nothing by then, if the steps have not come to their end
    batch: int = 8
    crop: int = 8  # cells of a latent
    lr: float = 2e-3
    edge_weight: float = 1.0


def drawn(pipe: OneStepPipeline, config: TinyConfig) -> tuple[Tensor, Tensor]:
    """Latents (n, 4, h, w) of the student and what the full decoder makes of them (n, 3, 8h, 8w)."""
    captions = [scenes.scene(30_000_000 + config.seed * 1_000_000 + index).caption for index in range(config.pictures)]
    made = pipe(captions, seed=config.seed, batch=16, return_latents=True, output_type="pt")
    assert made.latents is not None
    return made.latents, made.images * 2 - 1


def crops(latents: Tensor, targets: Tensor, config: TinyConfig, rng: random.Random) -> tuple[Tensor, Tensor]:
    """A batch of crops of latents, and the same places of the pictures."""
    parts, wanted = [], []
    for _ in range(config.batch):
        index = rng.randrange(len(latents) - HELD)
        top, left = (rng.randrange(side - config.crop + 1) for side in latents.shape[2:])
        part = latents[index, :, top : top + config.crop, left : left + config.crop]
        y, x, side = top * CELL, left * CELL, config.crop * CELL
        parts.append(part)
        wanted.append(targets[index, :, y : y + side, x : x + side])
    return torch.stack(parts), torch.stack(wanted)


def run(config: TinyConfig) -> None:
    """Train to the end and write the file, with a sheet of held-out pictures: above the full decoder's, below its own."""
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    pipe = OneStepPipeline.from_pretrained("mini", device="cpu")
    latents, targets = drawn(pipe, config)
    network: nn.Module = make_decoder(config.channels, config.blocks).train()
    optimizer = torch.optim.AdamW(network.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    start, losses = time.monotonic(), []
    for step in (bar := tqdm(range(config.steps), unit="step", mininterval=10)):
        share = max(step / config.steps, (time.monotonic() - start) / (60 * config.minutes))
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / 50) * (1 - share)
        part, target = crops(latents, targets, config, rng)
        loss = reconstruction_loss(network(part), target, config.edge_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            bar.set_postfix(loss=sum(losses[-50:]) / len(losses[-50:]))
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().half().contiguous() for name, tensor in from_layers(network.state_dict()).items()}
    write_safetensors(output / "wadi-mini-tiny-decoder.safetensors", state, {"format": "pt"})
    with torch.no_grad():
        ours = network.eval()(latents[-HELD:])
    rows = [pictures.to_pictures(targets[-HELD:]), pictures.to_pictures(ours)]
    pictures.save(contact_sheet(rows), output / "sheet.png")
    error = F.mse_loss(ours.clamp(-1, 1), targets[-HELD:].clamp(-1, 1)).sqrt().item() * 127.5
    sys.stdout.write(f"{len(losses)} steps, {error:.2f} grey levels from the full decoder on held-out pictures\n")


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, TinyConfig, run))
