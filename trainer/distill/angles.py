"""How far the layers of a role have turned, block by block."""

from __future__ import annotations

import math

import torch

from wadi_core.lorad.rotation import angles

from ..models.adapters import LoRaDAdapter


def block_of(path: str) -> str:
    """The block that a layer belongs to: ``down_blocks.0``, ``mid_block``, ``transformer_blocks.7``, or the layer."""
    parts = path.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


@torch.no_grad()
def angles_by_block(adapter: LoRaDAdapter) -> dict[str, float]:
    """``<block>/rms`` and ``<block>/max`` of the angles of each block, in radians."""
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    largest: dict[str, float] = {}
    for path, layer in adapter.layers.items():
        theta = angles(layer.lorad_a[adapter.name], layer.lorad_b[adapter.name])
        block = block_of(path)
        squares[block] = squares.get(block, 0.0) + theta.square().sum().item()
        counts[block] = counts.get(block, 0) + theta.numel()
        largest[block] = max(largest.get(block, 0.0), theta.abs().max().item())
    rms = {f"{block}/rms": math.sqrt(squares[block] / counts[block]) for block in squares}
    return rms | {f"{block}/max": value for block, value in largest.items()}
