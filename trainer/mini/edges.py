"""Edges of pictures (canny): the control maps of wadi-mini's ControlNet, and how well the edges of two pictures agree."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wadi_core.preprocess import canny


def edges(pictures: Iterable[Image.Image]) -> Tensor:
    """(n, h, w) bool: where pictures of one size have an edge."""
    return torch.stack([torch.from_numpy(np.asarray(canny(picture))[:, :, 0] > 0) for picture in pictures])


def pack(maps: Tensor) -> Tensor:
    """(n, h, w) bool as (n, h, w/8) uint8, a bit for each pixel."""
    return torch.from_numpy(np.packbits(maps.numpy(), axis=2))


def unpack(packed: Tensor) -> Tensor:
    """The way back from :func:`pack`."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=2)).bool()


def control_maps(maps: Tensor) -> Tensor:
    """(n, h, w) bool as a ControlNet takes it: (n, 3, h, w), 0 and 1."""
    return maps[:, None].float().expand(-1, 3, -1, -1)


def agreement(found: Tensor, wanted: Tensor, tolerance: int = 1) -> Tensor:
    """(n,) F1 of the edges ``found`` against those ``wanted``, both (n, h, w) bool.

    An edge pixel counts as right if the other map has one at most ``tolerance`` pixels away along each axis. Two maps
    without any edge agree; one alone without agrees with nothing.
    """

    def near(maps: Tensor) -> Tensor:
        return F.max_pool2d(maps[:, None].float(), 2 * tolerance + 1, 1, tolerance)[:, 0] > 0

    def share(these: Tensor, others: Tensor) -> Tensor:
        return (these & near(others)).sum((1, 2)) / these.sum((1, 2)).clamp(min=1)

    precision, recall = share(found, wanted), share(wanted, found)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return torch.where((found | wanted).any(2).any(1), f1, torch.ones_like(f1))
