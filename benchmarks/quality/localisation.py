"""Which objects does a picture show, and where? Those that any of 25 overlapping windows looks most like, there.

The windows are as large as the objects of scenes with two of them, and are looked at as whole pictures of one object
are: with the same prototypes. A rule that is coarse and transparent; how often it is right on real scenes is reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.evaluation.features import LiteFeatures
from trainer.evaluation.retrieval import Prototypes

WINDOW = 60  # pixels of 128
STARTS = (0, 17, 34, 51, 68)  # left or upper edges


def windows(images: Tensor) -> Tensor:
    """(n, 3, 128, 128) -> (n, 25, 3, 128, 128): row by row, each enlarged to the size of a picture."""
    side = images.shape[-1]
    found = []
    for top in STARTS:
        for left in STARTS:
            part = images[:, :, top : top + WINDOW, left : left + WINDOW]
            found.append(F.interpolate(part, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1))
    return torch.stack(found, dim=1)


def located(
    eye: LiteFeatures, single: Prototypes, images: Tensor, seeds: Sequence[int], shown: Sequence[Sequence[int]]
) -> tuple[NDArray[np.bool_], NDArray[np.integer]]:
    """Whether each picture's k likeliest objects are those it should show, (n,), and where these are, (n, k, 2).

    An object is as likely as the window that looks most like it, and there it is: column and row of windows, 0 to 4.

    Args:
        eye: looks at the windows.
        single: prototypes of single objects.
        images: (n, 3, 128, 128) in [-1, 1].
        seeds: of the grain, one a picture.
        shown: k objects of each picture.
    """
    cut, wanted = windows(images), np.asarray([list(objects) for objects in shown])
    count = cut.shape[1]
    grain = [seed * count + place for seed in seeds for place in range(count)]
    scores = single.scores(eye(cut.flatten(0, 1), grain).numpy()).reshape(len(images), count, -1)
    likeliest = np.argsort(-scores.max(1), axis=1, kind="stable")[:, : wanted.shape[1]]
    found = (np.sort(likeliest, axis=1) == np.sort(wanted, axis=1)).all(1)
    best = np.take_along_axis(scores, wanted[:, None, :], axis=2).argmax(1)
    return found, np.stack([best % len(STARTS), best // len(STARTS)], axis=2)
