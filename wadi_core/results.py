"""What a call of the pipeline returns: pictures in one of the forms that diffusers knows, and how each was made."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import pictures
from .settings import PictureSettings
from .stages import Timings

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class Pictures:
    """What a call returns.

    Attributes:
        images: RGB pictures in a list; or what ``output_type`` asked for (see :func:`gathered`).
        settings: of each picture, all that is needed to make it again.
        latents: (n, 4, h/8, w/8) float32 on the CPU, x0 as the network made it, if they were asked for.
        timings: how long each stage took.
        calls: how many network calls there were.
    """

    images: Any = field(default_factory=list)
    settings: list[PictureSettings] = field(default_factory=list)
    latents: Tensor | None = None
    timings: Timings = field(default_factory=Timings)
    calls: int = 0

    def add(self, part: Pictures) -> None:
        """Take in the pictures of a further network call, without its latents."""
        self.images += part.images
        self.settings += part.settings
        self.timings += part.timings
        self.calls += part.calls

    @property
    def seconds(self) -> float:
        """Time spent in the network calls."""
        return self.timings.network

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the pictures as PNG files with their settings inside; several get numbers (``name-0001.png``).

        Raises:
            OSError, ValueError: a file cannot be written, or is not to be a PNG; one line.
        """
        if not isinstance(self.images, list):
            raise ValueError('only pictures are saved, and these are numbers: call the pipeline with output_type="pil"')
        paths = pictures.numbered(path, len(self.images))
        for one in paths:
            pictures.check_writable(one)
        for one, image, its_settings in zip(paths, self.images, self.settings, strict=True):
            pictures.save(image, one, its_settings)
        return paths


def check_output_type(output_type: str) -> None:
    """Do nothing if pictures can be had in this form.

    Raises:
        ValueError: they cannot; one line.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}")


def each(pixels: Tensor, output_type: str) -> list[Any]:
    """(n, 3, h, w) with values from -1 to 1 as n pictures of a form: ``pil``, ``np`` or ``pt``.

    Raises:
        ValueError: NaN or Inf among the pixels; one line.
    """
    if output_type == "pil":
        return pictures.to_pictures(pixels)
    shares = pictures.check_pixels(pixels).float().div(2).add(0.5).clamp(0, 1).cpu()
    return list(shares.permute(0, 2, 3, 1).numpy() if output_type == "np" else shares)


def gathered(images: list[Any], output_type: str) -> Any:
    """The pictures of a whole call.

    ``pil`` a list; ``np`` an array (n, h, w, 3) and ``pt`` a tensor (n, 3, h, w), float32 on the CPU with values from 0
    to 1; ``latent`` a tensor (n, 4, h/8, w/8), as the U-Net has them.
    """
    if output_type == "pil":
        return images
    if output_type == "np":
        import numpy as np

        return np.stack(images)
    return torch.stack(images)
