"""From latents to pixels, in pieces where the memory asks for it: here a pipeline takes the most of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .devices import free_memory
from .thirdparty import DiffusersNetwork

logger = logging.getLogger("wadi")

FACTOR = 8  # pixels per cell
AT_ONCE = 1 << 20  # pixels of several pictures
TILE, OVERLAP = 64, 16  # cells a side: what is decoded at once where memory is short
MAPS = 4  # of full size that are in memory at once, in the decoder's last level


@torch.no_grad()
def decode(vae: DiffusersNetwork, latents: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Clean latents as pixels: about a megapixel at a time, and in tiles where even one picture takes more than is free.

    Args:
        vae: diffusers' ``AutoencoderKL``, on ``device`` in ``dtype``.
        latents: (n, 4, h, w), scaled as the U-Net has them.

    Returns:
        (n, 3, 8h, 8w), float32 on the CPU, about -1 to 1.
    """
    pixels = latents.shape[2] * latents.shape[3] * FACTOR**2

    def decoder(part: Tensor) -> Tensor:
        return vae.decode(part.to(device, dtype)).sample

    free = free_memory(device)
    tiled = free is not None and pixels * MAPS * vae.config.block_out_channels[1] * dtype.itemsize > free
    if tiled:
        logger.info("memory is short: pictures are decoded in tiles of %d pixels", TILE * FACTOR)
    parts = (latents / vae.config.scaling_factor).split(max(1, AT_ONCE // pixels))
    return torch.cat([decode_tiled(decoder, part) if tiled else decoder(part).float().cpu() for part in parts])


@torch.no_grad()
def decode_tiled(
    decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int = TILE, overlap: int = OVERLAP, scale: int = FACTOR
) -> Tensor:
    """Decode latents piece by piece, which takes the memory of one piece, faded into each other where they overlap.

    Not the same picture to the bit: an autoencoder's normalisation looks at the whole picture, and so at the whole
    piece here.

    Args:
        decode: (n, c, h, w) latents to (n, 3, scale*h, scale*w).
        latents: any size; at most one tile large, they are decoded at once.
        tile, overlap: in cells, the overlap at most half of the tile.

    Returns:
        float32 on the CPU.

    Raises:
        ValueError: the overlap is larger than half of a tile.
    """
    if not 0 <= 2 * overlap <= tile:
        raise ValueError(f"tiles of {tile} cannot overlap by {overlap}: at most half of a tile is shared")
    n, _, height, width = latents.shape
    if max(height, width) <= tile:
        return decode(latents).float().cpu()
    total = torch.zeros(n, 3, height * scale, width * scale)
    weight = torch.zeros(height * scale, width * scale)
    for top, rows in _tiles(height, tile, overlap):
        for left, columns in _tiles(width, tile, overlap):
            piece = decode(latents[..., top : top + rows, left : left + columns]).float().cpu()
            fade = _fade(rows * scale, overlap * scale)[:, None] * _fade(columns * scale, overlap * scale)
            place = (slice(top * scale, (top + rows) * scale), slice(left * scale, (left + columns) * scale))
            total[..., place[0], place[1]] += piece * fade
            weight[place] += fade
    return total / weight


def _tiles(side: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Start and length of the pieces of one axis, evenly spread."""
    if side <= tile:
        yield 0, side
        return
    count = math.ceil((side - overlap) / (tile - overlap))
    for index in range(count):
        yield round(index * (side - tile) / (count - 1)), tile


def _fade(length: int, overlap: int) -> Tensor:
    """1 in the middle, falling towards both ends over the overlap, nowhere 0; hardly anything where the border is felt."""
    distance = torch.arange(length) + 0.5
    distance = torch.minimum(distance, length - distance)
    return (distance / max(overlap, 1)).clamp(max=1.0) ** 2
