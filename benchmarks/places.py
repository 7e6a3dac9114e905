"""Where in a picture is an object? In the window that looks most like it, of nine that overlap.

The windows are as large as the objects of scenes with two of them, and are looked at as whole pictures of one object
are: with the same prototypes. A rule that is coarse and transparent; how often it is right on real scenes is reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.features import Eye

from .retrieval import Array, Prototypes

WINDOW = 60  # pixels of 128
STARTS = (0, 34, 68)  # left or upper edges


def windows(images: Tensor) -> Tensor:
    """(n, 3, 128, 128) -> (n, 9, 3, 128, 128): row by row, each enlarged to the size of a picture."""
    side = images.shape[-1]
    found = []
    for top in STARTS:
        for left in STARTS:
            part = images[:, :, top : top + WINDOW, left : left + WINDOW]
            found.append(F.interpolate(part, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1))
    return torch.stack(found, dim=1)


def columns(eye: Eye, single: Prototypes, images: Tensor, seeds: Sequence[int], shown: Sequence[Sequence[int]]) -> Array:
    """The column of windows, 0 to 2 from the left, in which each object of each picture is found: (n, k).

    Args:
        eye: looks at the windows.
        single: prototypes of single objects.
        images: (n, 3, 128, 128) in [-1, 1].
        seeds: of the grain, one a picture.
        shown: k objects of each picture.
    """
    cut = windows(images)
    count = cut.shape[1]
    grain = [seed * count + place for seed in seeds for place in range(count)]
    scores = single.scores(eye(cut.flatten(0, 1), grain).numpy()).reshape(len(images), count, -1)
    best = np.stack([scores[row][:, list(objects)].argmax(0) for row, objects in enumerate(shown)])
    return best % len(STARTS)
