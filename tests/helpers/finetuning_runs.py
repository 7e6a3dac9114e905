"""Small finetuning runs for the tests: a base, a one-step adapter for it, a few pictures, settings of seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from networks import make_networks, random_lorad
from PIL import Image, ImageChops
from training import small_base

from trainer.settings import fields as settings
from trainer.settings.finetuning import InvertConfig, PersonalizeConfig

CAPTIONS = ("a cat <R> a red wall", "a dog <R> a tree")


def make_place(place: Path, architecture: str = "sd15") -> Path:
    """A base, a one-step LoRaD, and pictures of which one has a caption of its own."""
    base = small_base(place / "base", architecture)
    random_lorad(make_networks(base)["unet"], spread=0.05).save(place / "one-step.safetensors")
    write_pictures(place / "pictures")
    return place


def write_pictures(folder: Path, count: int = 3, side: int = 64) -> Path:
    folder.mkdir(parents=True)
    dice = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(dice.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    (folder / "1.txt").write_text("a bird <R> a house\n\na fish <R> a stone\n")
    return folder


def invert_config(place: Path, output: Path, **changes: object) -> InvertConfig:
    given = {"initial": ["and"], "steering": 0.01, **common(place, output), **changes}
    return settings.build(InvertConfig, given)


def personalize_config(place: Path, output: Path, **changes: object) -> PersonalizeConfig:
    given = {"rank": 2, **common(place, output), **changes}
    return settings.build(PersonalizeConfig, given)


def common(place: Path, output: Path) -> dict[str, object]:
    return {
        "base": str(place / "base"), "lorad": str(place / "one-step.safetensors"), "pictures": str(place / "pictures"),
        "templates": list(CAPTIONS), "output": str(output), "steps": 4, "batch": 2, "precision": "fp32", "device": "cpu",
        "save_every": 2, "sheet_every": 100, "sheet_steps": 2, "sheet_prompts": ["a cat <R> a wall"], "tensorboard": False,
        "lr": 0.01,
    }  # fmt: skip


def difference(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of two pictures in any channel of any pixel, in grey levels."""
    return max(high for _, high in ImageChops.difference(one, other).getextrema())
