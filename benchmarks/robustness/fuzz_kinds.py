"""What is damaged and who reads it: for each kind of file good ones, the reader, and a use of what it read.

:data:`KINDS` is the one place that names readers of the project.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from trainer.data import picture_files
from trainer.engine.checkpoints import Checkpoints, read_checkpoint
from wadi_core import base, images, pictures, prompt_files
from wadi_core.embeddings import PREFIX, Embedding, Vocabulary
from wadi_core.lorad import LoRaD
from wadi_core.lorad.checkpoint import encode_header, read_header
from wadi_core.lorad.linear import RotatedLinear
from wadi_core.lorad.reports import adapter_facts, adapter_lines
from wadi_core.lorad.weights import Weights
from wadi_core.settings import PictureSettings

from . import fuzz_samples as good
from .fuzz_samples import UNET, UNET_LAYERS, Sample, drawn, network_of, networks

SIDE = 16  # pixels that pictures are read at
KNOWN_WORDS = 60_000  # more than a tokenizer has


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        count: how many damaged ones a whole run tries.
        samples: makes the good ones.
        read: the reader: path -> what it read.
        use: what is done with that; raises :class:`Wrong` where it cannot be used, and may refuse as a reader does.
    """

    count: int
    samples: Callable[[], list[Sample]]
    read: Callable[[Path], Any]
    use: Callable[[Any], None]


class Wrong(Exception):
    """What was read is not sound."""


def demand(sound: bool, what: str) -> None:
    """Do nothing if that is so."""
    if not sound:
        raise Wrong(what)


def demand_line(text: str, what: str) -> None:
    """Do nothing if a terminal can show this as one line."""
    demand(bool(text) and text.isprintable() and len(text) < 600, f"{what} is no printable line: {text[:80]!a}")


# Adapters, on networks of a few layers


def use_adapter(lorad: LoRaD) -> None:
    """Put on a network, described, written again, and asked for a picture: all numbers, or refused."""
    for line in adapter_lines(adapter_facts(lorad)):
        demand(line[1].isprintable(), f"what inspect says is no printable line: {line[1][:80]!a}")
    strings = lorad.metadata.to_strings(lorad.rank, "a")
    encode_header({f"{key}.lorad_a": a for key, (a, _) in lorad.factors.items()}, strings)
    if schedule := lorad.one_step:
        z = drawn(1, 4, 2, 2)
        demand(bool(schedule.x0(z, z.flip(0)).isfinite().all()), f"x0 at {schedule} is not finite")
    network = networks()["pixart" if lorad.metadata.architecture == "pixart-alpha" else "unet"]
    lorad.apply_to(network)
    try:
        for path in lorad.matched(network).paths.values():
            layer = network.get_submodule(path)
            if not isinstance(layer, RotatedLinear):
                raise Wrong(f"{path} is not turned")
            change = layer.rotated_weight().norm(dim=1) - layer.weight.norm(dim=1)
            demand(bool(change.abs().max() < 1e-3), f"{path} changed its norm")
    finally:
        lorad.remove(network)


# Checkpoints: single files of whole networks, and what one network is filled from


def read_checkpoint_file(path: Path) -> Weights:
    """A network as merge, extract and inspect open it; the pipeline's own look at it goes before."""
    if path.suffix == ".safetensors" and any(name.startswith(UNET) for name in read_header(path).places):
        base.unet_shapes(path)
    return Weights.open(path)


def use_weights(weights: Weights) -> None:
    """Every layer's numbers, and the checksum that adapters know it by."""
    for path, shape in weights.layout.shapes.items():
        demand(tuple(weights.linear(path).shape) == shape, f"{path} has another shape than it says")
        demand(bool(weights.linear(path).float().isfinite().all()), f"{path} is not finite")
    weights.sha256()


def read_filled(path: Path) -> nn.Module:
    """A network as a base fills it."""
    with torch.device("meta"):
        network = network_of(UNET_LAYERS)
    weights = Weights.open(path)
    tensors = {name: weights.values(name) for name in weights.names}
    return base.fill(network, tensors, path, torch.device("cpu"), torch.float16)


def use_filled(network: nn.Module) -> None:
    """Nothing but numbers in it."""
    for name, tensor in network.state_dict().items():
        demand(bool(tensor.isfinite().all()), f"{name} is not finite")


# Embeddings


class _TextEncoder(nn.Module):
    """As much of a text encoder as learned words need."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        super().__init__()
        self.table: nn.Module = nn.Embedding(KNOWN_WORDS, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def set_input_embeddings(self, table: nn.Module) -> None:
        self.table = table


@functools.cache
def _vocabulary() -> tuple[Vocabulary, _TextEncoder]:
    encoder = _TextEncoder()
    tokenizer, pad = base._load_tokenizer(base.configs.TOKENIZER)
    return Vocabulary(base.Base("a", "sd15", encoder, encoder, encoder, tokenizer, pad, "epsilon", None)), encoder


def use_embedding(one: Embedding) -> None:
    """Learned, said in a prompt, and read by the text encoder."""
    demand(one.vectors.ndim == 2 and bool(one.vectors.isfinite().all()), "its vectors are no table of numbers")
    demand_line(one.token, "its word")
    vocabulary, encoder = _vocabulary()
    vocabulary.learn([one])
    try:
        for word in (one.token, PREFIX + one.name):
            ids = vocabulary.ids([f"a cat, {word} , on grass"])
            demand(int((ids >= KNOWN_WORDS).sum()) == min(len(one.vectors), 72), f"{word!a} is not found in a prompt")
            demand(bool(encoder.table(ids).isfinite().all()), "the text encoder reads no numbers")
    finally:
        vocabulary.learn([])


# Pictures


def read_picture(path: Path) -> tuple[Image.Image, Image.Image]:
    """A picture as the control path and as learning reads it."""
    return images.read(path), picture_files.load(path, SIDE)


def use_pictures(both: tuple[Image.Image, Image.Image]) -> None:
    """As numbers from 0 to 255."""
    demand(np.asarray(both[1]).shape == (SIDE, SIDE, 3), f"a picture of {both[1].size} and {both[1].mode}")
    demand(both[0].convert("RGB").width > 0, "a picture of no size")


def use_settings(found: PictureSettings) -> None:
    """As the text that is written into a picture."""
    demand(PictureSettings.from_json(found.to_json()) == found, "settings that do not come back")
    found.to_infotext("wadi")


# Prompt files


def read_prompts(path: Path) -> list[str]:
    """All prompts of a file."""
    return list(prompt_files.read_prompts(path))


def use_prompts(prompts: Iterable[str]) -> None:
    """Each one line with something in it, that can be written as UTF-8."""
    for prompt in prompts:
        demand(bool(prompt) and prompt.splitlines() == [prompt], f"a prompt of several lines: {prompt[:80]!a}")
        demand(prompt == prompt.strip(), f"a prompt with spaces around it: {prompt[:80]!a}")
        prompt.encode()


# Checkpoints of runs


def read_run(path: Path) -> dict[str, Any]:
    """The newest checkpoint that can be read, and the damaged one by its name."""
    latest = Checkpoints(path.parent).latest()
    demand(latest is not None, "the run does not go on, and the checkpoint before this one is whole")
    use_run(latest or {})
    return read_checkpoint(path)


def use_run(state: dict[str, Any]) -> None:
    """It says which step it is of."""
    step = state.get("step") if isinstance(state, dict) else None
    demand(type(step) is int and step >= 0, f"a checkpoint of step {step!a}")


KINDS: dict[str, Kind] = {
    "adapter": Kind(100_000, good.adapters, LoRaD.load, use_adapter),
    "checkpoint": Kind(5_000, good.checkpoints, read_checkpoint_file, use_weights),
    "network": Kind(2_000, good.filled_files, read_filled, use_filled),
    "settings": Kind(1_000, good.settings_files, base.configs.read, lambda found: None),
    "embedding": Kind(3_000, good.embeddings, Embedding.load, use_embedding),
    "picture": Kind(4_000, good.picture_samples, read_picture, use_pictures),
    "picture-text": Kind(1_000, good.settings_samples, pictures.read_settings, use_settings),
    "prompts": Kind(3_000, good.prompt_samples, read_prompts, use_prompts),
    "run": Kind(1_000, good.run_samples, read_run, use_run),
}
