"""Rotating the directions of a weight: the mathematics of LoRaD, as free functions on tensors.

A linear weight W of shape (out, in) is read as complex numbers, the input columns (2j, 2j+1) being the real and the
imaginary part. Row i and pair j turn by their own angle ``theta[i, j]``, and the angles of a layer are low-rank:

    theta = theta_a @ theta_b                                   (out, r) @ (r, in/2)
    w'[2j]   = w[2j] cos(theta) - w[2j+1] sin(theta)
    w'[2j+1] = w[2j] sin(theta) + w[2j+1] cos(theta)

Norms of rows are kept, -theta undoes theta, and angles of several adapters add. Angles, sines and cosines are
computed in float32 (or float64 for a float64 weight) whatever the weight's own type: half precision would lose
small angles. Source: Wang et al., "WaDi: Weight Direction-aware Distillation for One-step Image Synthesis", 2026.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# One adapter's part in the angles of a layer: theta_a (out, r), theta_b (r, in/2), strength.
Factors = tuple[Tensor, Tensor, float]

BLOCK_ELEMENTS = 1 << 19  # weight elements that are rotated at a time: a few float32 copies of them stay in cache


def working_dtype(weight: Tensor) -> torch.dtype:
    """The type in which a weight is rotated: float32, or float64 for float64."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def angles(
    theta_a: Tensor,
    theta_b: Tensor,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float32,
    products: torch.dtype | None = None,
) -> Tensor:
    """Angles in radians, (out, in/2): ``strength * theta_a @ theta_b``, in float32 unless ``products`` says otherwise.

    Args:
        theta_a: (out, r).
        theta_b: (r, in/2).
        strength: scales the angle, not the change of the weight.
        dtype: of the angles.
        products: the type in which the factors are multiplied; None: that of the angles.
    """
    with torch.autocast(theta_a.device.type, enabled=False):
        theta = (theta_a.to(products or dtype) @ theta_b.to(products or dtype)).to(dtype)
    return theta if strength == 1.0 else theta * strength


def rotate(weight: Tensor, theta: Tensor) -> Tensor:
    """The weight (out, in) turned by ``theta`` (out, in/2), in the weight's own type."""
    even, odd = weight.to(theta.dtype).unflatten(1, (-1, 2)).unbind(-1)
    cosine, sine = theta.cos(), theta.sin()
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(1).to(weight.dtype)


@torch.no_grad()
def rotate_(
    weight: Tensor, factors: Sequence[Factors], block_rows: int | None = None, products: torch.dtype | None = None
) -> Tensor:
    """Turn a weight in place by the summed angles of several adapters.

    Works on blocks of rows, so that theta is never larger than a block.

    Args:
        weight: (out, in), any floating type, also a view of a larger tensor.
        factors: (theta_a, theta_b, strength) of each adapter.
        block_rows: rows a block; chosen from the cache's size if not given.
        products: as for :func:`angles`.

    Returns:
        ``weight`` itself.
    """
    dtype = working_dtype(weight)
    on_device = [(a.to(weight.device, dtype), b.to(weight.device, dtype), s) for a, b, s in factors if s != 0.0]
    if not on_device:
        return weight
    rows = block_rows or max(1, BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows]
        theta = sum_angles([(a[start : start + rows], b, s) for a, b, s in on_device], dtype, products)
        _turn_(block, theta)
    return weight


def _turn_(block: Tensor, theta: Tensor) -> None:
    """Turn a few rows in place: :func:`rotate` in fewer passes over memory, as one product of complex numbers."""
    if block.device.type not in ("cpu", "cuda"):  # other devices have no complex numbers, or not all of them
        block.copy_(rotate(block.to(theta.dtype), theta))
        return
    # A view as complex numbers needs the two of a pair side by side, at an even place.
    aligned = block.stride(1) == 1 and block.stride(0) % 2 == 0 and block.storage_offset() % 2 == 0
    in_place = block.dtype == theta.dtype and aligned
    turning = block if in_place else block.to(theta.dtype, copy=True, memory_format=torch.contiguous_format)
    torch.view_as_complex(turning.unflatten(1, (-1, 2))).mul_(torch.polar(theta.new_ones(()), theta))
    if not in_place:
        block.copy_(turning)


def sum_angles(factors: Sequence[Factors], dtype: torch.dtype = torch.float32, products: torch.dtype | None = None) -> Tensor:
    """The angles of several adapters on one layer, added: (out, in/2). Their order makes no difference."""
    theta = angles(*factors[0], dtype=dtype, products=products)
    # Two float32 numbers have one sum; that of more depends on their order, unless it is taken in float64.
    wide = torch.float64 if len(factors) > 2 and theta.device.type != "mps" else dtype
    for more in factors[1:]:
        theta = theta.to(wide) + angles(*more, dtype=dtype, products=products)
    return theta.to(dtype)


def recover_angles(base: Tensor, rotated: Tensor) -> Tensor:
    """The angles that turn ``base`` into ``rotated``, in (-pi, pi]; 0 where a pair of either is zero.

    With pairs as complex numbers, theta = arg(z1 conj(z0)). Exact while the true angle is inside (-pi, pi).

    Returns:
        (out, in/2) in float32 (float64 for float64 weights).
    """
    dtype = working_dtype(base)
    x0, y0 = base.to(dtype).unflatten(1, (-1, 2)).unbind(-1)
    x1, y1 = rotated.to(dtype).unflatten(1, (-1, 2)).unbind(-1)
    return torch.atan2(x0 * y1 - y0 * x1, x0 * x1 + y0 * y1)
