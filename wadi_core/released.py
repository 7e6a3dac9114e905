"""A released one-step network beside its base with the LoRaD that was extracted: do the two draw the same?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .devices import find_device, find_dtype
from .lorad.adapter import LoRaD, fuse
from .lorad.weights import Weights
from .pipeline import OneStepPipeline
from .thirdparty import DiffusersNetwork

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "a lighthouse on a cliff at sunset"
TOKENS = 120  # of a prompt, where a network is asked without one


@dataclass(frozen=True)
class Likeness:
    """Two pictures of one prompt and one noise.

    Attributes:
        largest, mean: difference in grey levels, of 255.
        pair: the released network's picture, and that of base and LoRaD to the right of it.
    """

    largest: int
    mean: float
    pair: Image


@torch.no_grad()
def compare_pictures(base: Path, network: Weights, lorad: LoRaD, device: str | None = None) -> Likeness:
    """Draw one picture with base and LoRaD, and one with the released network.

    Raises:
        OSError, ValueError: the base cannot be loaded, or the network is not built like it; one line.
    """
    place = find_device(device)
    pipe = OneStepPipeline.from_pretrained(base, lorad, device=place, dtype=find_dtype(None, place), keep_base=False)
    ours = pipe(PROMPT).images[0]
    put_weights(pipe.base.unet, network)
    theirs = pipe(PROMPT).images[0]
    return likeness(theirs, ours)


def likeness(theirs: Image, ours: Image) -> Likeness:
    """Two pictures of one size, compared and put side by side."""
    import numpy as np
    from PIL import Image

    difference = np.abs(np.asarray(theirs, dtype=int) - np.asarray(ours, dtype=int))
    pair = Image.new("RGB", (theirs.width + ours.width, theirs.height))
    pair.paste(theirs, (0, 0))
    pair.paste(ours, (theirs.width, 0))
    return Likeness(int(difference.max()), float(difference.mean()), pair)


@torch.no_grad()
def compare_outputs(base: Path, network: Weights, lorad: LoRaD, device: str | None = None) -> float:
    """How far apart the two are in a PixArt transformer's output for noise, relative to the released network's.

    Args:
        base: a folder with the transformer, whose text encoder is not needed: the text is noise too.

    Raises:
        OSError, ValueError: as :func:`compare_pictures`.
    """
    from diffusers import PixArtTransformer2DModel

    place = find_device(device)
    dtype = find_dtype(None, place)
    folder = base / "transformer" if (base / "transformer").is_dir() else base
    transformer: DiffusersNetwork = PixArtTransformer2DModel.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    transformer = transformer.to(place).eval()
    settings, generator = transformer.config, torch.Generator().manual_seed(0)
    z = torch.randn(1, settings.in_channels, settings.sample_size, settings.sample_size, generator=generator)
    text = torch.randn(1, TOKENS, settings.caption_channels, generator=generator)
    timestep = torch.tensor([lorad.one_step.timestep if lorad.one_step else 999], device=place)

    def output() -> Tensor:
        found = transformer(
            z.to(place, dtype),
            encoder_hidden_states=text.to(place, dtype),
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )
        return found.sample[:, : settings.in_channels].float()

    fuse(transformer, [(lorad, 1.0)], keep_backup=False)
    ours = output()
    put_weights(transformer, network)
    theirs = output()
    return float((ours - theirs).norm() / theirs.norm())


def put_weights(module: DiffusersNetwork, weights: Weights) -> None:
    """Copy a network's weights, in diffusers' names, into a live one, a tensor at a time.

    Raises:
        ValueError: a tensor is missing or of another shape; one line.
    """
    own = module.state_dict()
    names = set(weights.names)
    for name, tensor in own.items():
        if name not in names or weights.shape(name) != tuple(tensor.shape):
            raise weights.refusal(f"this network is not built like its base: {name} is missing or of another shape")
    for name, tensor in own.items():
        tensor.copy_(weights.tensor(name))
