"""Weights in few bits: types with a scale tensor beside them, and rounding that loses nothing on average.

A float8 weight may be stored as codes whose values are ``codes * scale``. The scale is one number, or one for each
row, in a tensor named ``<layer>.weight_scale`` or ``<layer>.scale_weight``, as ComfyUI's files have it.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_INTEGERS = {1: torch.uint8, 2: torch.int16}  # of a float's size, to step from one value to the next


def scale_name(weight: str, names: Container[str]) -> str | None:
    """The name of the scale that belongs to the tensor ``weight``; None if there is none."""
    layer = weight.removesuffix("weight")
    candidates = (f"{layer}weight_scale", f"{layer}scale_weight")
    return next((name for name in candidates if weight.endswith(".weight") and name in names), None)


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """The values (out, in) in float32.

    Raises:
        ValueError: the scale is neither one number nor one for each row.
    """
    return codes.float() * _column(scale, codes.shape[0])


def quantise(values: Tensor, scale: Tensor, dtype: torch.dtype, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes for ``values`` (out, in), and their scale in the shape and type that it had.

    The scale is kept, and made larger only where a value would not fit any more: a turned pair can have one entry of
    up to sqrt(2) times the larger that it had.

    Args:
        seed: of stochastic rounding; None rounds to the nearest.
    """
    limit = torch.finfo(dtype).max
    needed = values.abs().float()
    needed = (needed.amax() if scale.numel() == 1 else needed.amax(dim=1)).reshape(scale.shape) / limit
    larger = torch.where(needed > scale.float(), needed, scale.float()).to(scale.dtype)
    return cast(values / _column(larger, values.shape[0]), dtype, seed), larger


def cast(values: Tensor, dtype: torch.dtype, seed: int | None = None) -> Tensor:
    """Values as ``dtype``; in float8, which can overflow to NaN, at most the largest number that it has.

    Args:
        seed: rounds stochastically: up or down by chance, so that the mean of many is the value. None: to the nearest.
    """
    if seed is not None and dtype.itemsize in _INTEGERS:
        return _round_stochastically(values, dtype, seed)
    if dtype in FLOAT8:
        values = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return values.to(dtype)


def _round_stochastically(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    integer = _INTEGERS[dtype.itemsize]
    size = values.abs().float().clamp(max=torch.finfo(dtype).max)
    nearest = size.to(dtype)
    # The bits of positive floats count up with their values: one less is the next number below.
    below = nearest.view(integer) - (nearest.float() > size).to(integer)
    low, high = below.view(dtype).float(), (below + 1).view(dtype).float()
    generator = torch.Generator(values.device).manual_seed(seed)
    chance = torch.rand(values.shape, generator=generator, device=values.device)
    # Above the largest number comes Inf or NaN; it is never taken, because there the share is 0 or NaN.
    up = chance < (size - low) / (high - low)
    return (torch.where(up, high, low) * values.sign().float()).to(dtype)


def _column(scale: Tensor, rows: int) -> Tensor:
    if scale.numel() not in (1, rows):
        raise ValueError(f"a scale of shape {tuple(scale.shape)} is not one number, and not one for each of {rows} rows")
    return scale.float().reshape(-1, 1)
