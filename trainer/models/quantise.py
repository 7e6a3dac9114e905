"""Frozen linear layers whose weights are stored in eight or four bits.

fp8:  w = scale[row] * code, the code in float8_e4m3fn and the scale such that the row's largest entry is its largest.
nf4:  w = scale[block] * LEVELS[code] for blocks of 64 numbers along a row, as QLoRA stores them (Dettmers et al., 2023).

Weights come back as numbers only while a layer computes. In backward they are made again, not kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wadi_core.lorad.linear import autocast_dtype

FP8 = torch.float8_e4m3fn
BLOCK = 64
EDGE = 0.9677083  # of the normal distribution's quantiles: the outermost level would lie at infinity


def _normal_levels() -> Tensor:
    """The 16 levels of nf4: quantiles of the normal distribution in [-1, 1], one of them 0."""

    def quantiles(count: int) -> list[float]:
        return [math.sqrt(2) * torch.erfinv(torch.tensor(2 * q - 1, dtype=torch.float64)).item() for q in
                torch.linspace(EDGE, 0.5, count, dtype=torch.float64).tolist()[:-1]]  # fmt: skip

    above, below = quantiles(9), quantiles(8)
    levels = sorted([*above, 0.0, *(-value for value in below)])
    return torch.tensor(levels, dtype=torch.float32) / max(levels)


LEVELS = _normal_levels()


class _FrozenLinear(torch.autograd.Function):
    """``y = x W^T + b`` that keeps the stored form of W for backward, not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense().to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.layer.dense().to(grad.dtype), None, None


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored as codes and scales; ``weight`` is None.

    Args:
        linear: the layer it stands for.
        kind: ``fp8`` or ``nf4``.
    """

    weight: Any
    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = None
        self.bias = linear.bias
        self.kind = kind
        codes, scales = (_to_fp8 if kind == "fp8" else _to_nf4)(linear.weight.detach().float())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight (out, in) in float32, a new tensor."""
        if self.kind == "fp8":
            return self.codes.float().mul_(self.scales[:, None])
        levels = LEVELS.to(self.codes.device)
        pairs = torch.stack((self.codes >> 4, self.codes & 15), dim=-1).flatten(1)
        values = levels[pairs.int()].view(self.out_features, -1, BLOCK).mul_(self.scales[:, :, None])
        return values.flatten(1)[:, : self.in_features]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of nn.Linear's argument
        bias = self.bias
        if (dtype := autocast_dtype(input.device.type)) is not None:
            input = input.to(dtype)  # noqa: A001
        bias = bias if bias is None else bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return _FrozenLinear.apply(input, self, bias)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> QuantisedLinear:
        """Codes and scales move to another device, but are of no other type than their own."""
        codes, scales = self.codes, self.scales
        super()._apply(fn, *args, **kwargs)
        self.codes, self.scales = codes.to(self.codes.device), scales.to(self.scales.device)
        return self


def _to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = (weight.abs().amax(dim=1) / torch.finfo(FP8).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scales[:, None]).to(FP8), scales


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(weight, (0, -weight.shape[1] % BLOCK)).view(len(weight), -1, BLOCK)
    scales = padded.abs().amax(dim=2).clamp(min=torch.finfo(torch.float32).tiny)
    between = ((LEVELS[1:] + LEVELS[:-1]) / 2).to(weight.device)
    codes = torch.bucketize(padded / scales[:, :, None], between).to(torch.uint8).flatten(1)
    return codes[:, 0::2] << 4 | codes[:, 1::2], scales


def quantise_linears(network: nn.Module, kind: str) -> None:
    """Store the weight of every linear layer of the network's blocks as codes, in place.

    Layers outside the blocks (time and caption embeddings, the last projection) are few and sensitive: they stay.
    """
    for path, layer in list(network.named_modules()):
        inside = path.startswith(("down_blocks.", "mid_block.", "up_blocks.", "transformer_blocks."))
        if inside and isinstance(layer, nn.Linear):
            parent, _, attribute = path.rpartition(".")
            setattr(network.get_submodule(parent), attribute, QuantisedLinear(layer, kind))
