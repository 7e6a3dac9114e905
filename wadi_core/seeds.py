"""The noise that a picture is made of: from its own seed, whatever the batch or device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .base import FACTOR
from .settings import Settings


def seed_of(one: Settings) -> int:
    """The seed of a picture.

    Raises:
        ValueError: none is known; one line.
    """
    if one.seed is None:
        raise ValueError("the noise of this picture came from a generator or from latents, and no seed makes it again")
    return one.seed


def noise(seeds: Iterable[int], width: int, height: int) -> Tensor:
    """z (n, 4, height/8, width/8), float32 on the CPU: each picture's own generator, whatever the batch or device."""
    shape = (1, 4, height // FACTOR, width // FACTOR)
    return torch.cat([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])
