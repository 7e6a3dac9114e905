"""Encode scenes once, so that training the teacher costs no autoencoder: shards of latents and captions.

    python -m trainer.mini.latents --vae runs/mini-vae/vae --output runs/mini-latents --shards 4

Shard k holds the scenes of seeds k*4096 to (k+1)*4096-1. Shards that exist are left alone, and more can be made
at any time, also while a teacher trains: it takes up new ones at its next start.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open

from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.output import take_any_text
from wadi_core.pictures import to_tensor
from wadi_core.thirdparty import DiffusersNetwork

from ..engine.logs import Progress
from ..settings.cli import show_messages
from . import scenes

logger = logging.getLogger("wadi")

SHARD = 4096  # scenes
AT_ONCE, TOLD_EVERY = 32, 512


def tell_now_and_then(progress: Progress, done: int) -> None:
    """So many scenes of a shard are done."""
    progress.update(done)
    if done % TOLD_EVERY == 0:
        progress.tell({})


@torch.no_grad()
def make_shard(vae: DiffusersNetwork, index: int, path: Path) -> None:
    """Draw, encode (posterior means, scaled) and write one shard: ``latents`` (4096, 4, 16, 16) float16."""
    latents, captions = [], []
    logger.info("%s: drawing and encoding", path.name)
    with Progress(SHARD, unit="scene") as progress:
        for done in range(0, SHARD, AT_ONCE):
            plans = [scenes.scene(index * SHARD + done + row) for row in range(AT_ONCE)]
            captions += [plan.caption for plan in plans]
            images = to_tensor([scenes.draw(plan) for plan in plans]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                mean = vae.encode(images).latent_dist.mean
            latents.append((mean.float() * vae.config.scaling_factor).half().contiguous())
            tell_now_and_then(progress, done + AT_ONCE)
    tensors = {"latents": torch.cat(latents)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors, {"captions": json.dumps(captions)})


def read_shards(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """All latents (n, 4, 16, 16) float16 and captions of a folder.

    Raises:
        ValueError: the folder holds no shard.
    """
    latents, captions = [], []
    for path in sorted(folder.glob("shard-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            latents.append(file.get_tensor("latents"))
            captions += json.loads(file.metadata()["captions"])
    if not latents:
        raise ValueError(f"{folder}: no shard-*.safetensors here; make some with python -m trainer.mini.latents")
    return torch.cat(latents), captions


def main() -> None:
    take_any_text()
    from diffusers import AutoencoderKL

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", required=True, help="the autoencoder's folder")
    parser.add_argument("--output", required=True, type=Path, help="folder of the shards")
    parser.add_argument("--shards", type=int, default=4, help="how many there shall be")
    arguments = parser.parse_args()
    show_messages()
    vae: DiffusersNetwork = AutoencoderKL.from_pretrained(arguments.vae)
    vae = vae.to(memory_format=torch.channels_last).eval()
    for index in range(arguments.shards):
        path = arguments.output / f"shard-{index:03d}.safetensors"
        if not path.exists():
            make_shard(vae, index, path)


if __name__ == "__main__":
    main()
