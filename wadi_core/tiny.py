"""Tiny decoders in the layout of TAESD: from latents to pixels in a fraction of the autoencoder's time.

A file is ``taesd_decoder.safetensors`` as its author publishes it (``1.weight``, ``3.conv.0.weight``, ...), or the
weights of diffusers' ``AutoencoderTiny`` (``decoder.layers.0.weight``, ...), of which the encoder is left out. Width and
depth follow from the tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .base import fill
from .files import refusal
from .lorad import checkpoint
from .thirdparty import DiffusersNetwork

LAYERS = "decoder.layers."  # in diffusers' names
LEVELS = 4  # of a decoder that enlarges eightfold
WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_AHEAD = 1  # the author's layer 0 limits the latents, and has no number in diffusers


class TinyDecoder(nn.Module):
    """A decoder that a pipeline can use instead of its autoencoder."""

    def __init__(self, decoder: nn.Module, width: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(width,) * LEVELS)

    def forward(self, latents: Tensor) -> Tensor:
        """(n, 4, h, w), scaled as the U-Net has them -> (n, 3, 8h, 8w), about -1 to 1."""
        return self.decoder(latents)

    def decode(self, latents: Tensor) -> Any:
        """As diffusers' autoencoders do."""
        return SimpleNamespace(sample=self(latents))


def make_decoder(width: int, blocks: Sequence[int]) -> TinyDecoder:
    """A decoder without training.

    Args:
        width: channels of all layers.
        blocks: how many residual blocks each level has, from the latent's size to the picture's.
    """
    from diffusers.models.autoencoders.vae import DecoderTiny

    settings = {"num_blocks": tuple(blocks), "block_out_channels": (width,) * LEVELS, "upsampling_scaling_factor": 2}
    return TinyDecoder(DecoderTiny(4, 3, act_fn="relu", upsample_fn="nearest", **settings), width)


def load(path: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> DiffusersNetwork:
    """Read a decoder.

    Args:
        path: a file, or a folder in diffusers layout.

    Raises:
        OSError, ValueError: it cannot be read, is damaged or something else; one line.
    """
    path = Path(path)
    if path.is_dir():
        path /= WEIGHTS
    if path.suffix.lower() in checkpoint.PICKLE_ENDINGS:
        raise refusal(path, "decoders are read as .safetensors only: convert this one first")
    header = checkpoint.read_header(path)
    shapes = to_layers(header.shapes)
    width, blocks = _form(path, shapes)
    with torch.device("meta"):
        network = make_decoder(width, blocks)
    tensors = to_layers(checkpoint.read_tensors(header))
    return fill(network, {name: tensors[name].float() for name in shapes}, path, device, dtype)


def to_layers(named: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to the decoder, in diffusers' names."""
    if any(name.startswith(LAYERS) for name in named):
        return {name: value for name, value in named.items() if name.startswith("decoder.")}
    found = {}
    for name, value in named.items():
        number, _, rest = name.partition(".")
        found[f"{LAYERS}{int(number) - DIFFUSERS_AHEAD}.{rest}" if number.isdecimal() else name] = value
    return found


def from_layers(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A decoder's tensors in its author's names."""
    found = {}
    for name, value in named.items():
        number, _, rest = name.removeprefix(LAYERS).partition(".")
        found[f"{int(number) + DIFFUSERS_AHEAD}.{rest}"] = value
    return found


def _form(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, list[int]]:
    """Width, and the number of blocks of each level: convolutions that stand alone end a level."""
    entry = shapes.get(f"{LAYERS}0.weight", ())
    numbers = {
        int(found[1]): bool(found[2]) for name in shapes if (found := re.match(r"decoder\.layers\.(\d+)\.(conv\.)?", name))
    }
    alone = sorted(number for number, block in numbers.items() if not block)
    if len(entry) != 4 or entry[1] != 4 or len(alone) != LEVELS + 1:
        raise refusal(path, "this is no tiny decoder for Stable Diffusion 1 or 2 (TAESD's layout, 4 channels, eightfold)")
    ends = zip(alone, alone[1:])  # noqa: B905 - pairs of neighbours
    return entry[0], [sum(block for number, block in numbers.items() if one < number < other) for one, other in ends]
