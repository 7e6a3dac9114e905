"""One small base in every form with a one-step adapter for it, as the tests of the pipeline use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import networks
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from wadi_core import OneStepPipeline

PROMPTS = ["a red apple", "a cat and a bicycle", "a frog on top of a pizza!", "", "two owls"]


@dataclass
class Kit:
    """One small base in every form, and a one-step adapter for it."""

    architecture: str
    folder: Path
    single_file: Path
    lorad: Path

    def load(self, form: str = "folder", **options: object) -> OneStepPipeline:
        base = self.folder if form == "folder" else self.single_file
        options = {"lorad": self.lorad, "device": "cpu", "config": self.folder if form != "folder" else None, **options}
        if not {"dtype", "torch_dtype"} & options.keys():
            options = {"precision": "exact", **options}  # the same bits on every machine
        return OneStepPipeline.from_pretrained(base, **options)


def make_kit(place: Path, architecture: str, changes: dict | None = None, dtype: torch.dtype = torch.float32) -> Kit:
    folder = networks.write_settings(place / "base", architecture, changes or networks.small_settings(architecture))
    made = networks.make_networks(folder)
    weights = networks.states({part: network.to(dtype) for part, network in made.items()})
    networks.write_folder(folder, weights)
    single_file = networks.write_single_file(place / "base.safetensors", weights, folder)
    networks.random_lorad(made["unet"]).save(place / "one-step.safetensors")
    return Kit(architecture, folder, single_file, place / "one-step.safetensors")


def count_calls(network: nn.Module) -> list[int]:
    """A list that grows by the batch size at each call of a network."""
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    return sizes


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    """Of any channel of any pixel, from 0 to 255."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())
