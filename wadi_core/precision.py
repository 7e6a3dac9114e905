"""How exactly the parts of a pipeline compute: ``exact``, ``balanced`` or ``fast``, by what the device does fast.

In one step an error of the U-Net's output is multiplied by sigma_T / alpha_T = 14.6, so that bfloat16 throughout is
seen as grain. ``balanced`` computes in bfloat16 only where the picture hardly notices it: everywhere in the autoencoder,
and in the U-Net away from where the noise itself passes on its way from the input to the output. Which layers these are
was measured (``benchmarks/quality/precision.py``), and follows for any network from their level and kind.

The networks' own parameters stay in float32 whatever is chosen: layers keep a copy of their weight in the format that
they compute in, and make it anew when the weight has changed. So adapters are fused and taken out as ever.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .devices import find_dtype
from .lorad.linear import RotatedLinear
from .settings import PRECISIONS

DEFAULT = "balanced"


@dataclass(frozen=True)
class Place:
    """Where in a network a layer is.

    Attributes:
        kind: ``entry`` and ``exit`` (the convolutions that let latents in and out), ``time``, ``resnet``, ``shortcut``,
            ``attention``, ``sampler``, or ``other``.
        level: how often the picture was halved where the layer's output belongs to; 0 is the outermost.
    """

    kind: str
    level: int = 0


@dataclass(frozen=True)
class Product:
    """How a layer computes: its input and weight in one format, what it returns in another."""

    inside: torch.dtype
    outside: torch.dtype


EXACT = Product(torch.float32, torch.float32)
WIDE = Product(torch.bfloat16, torch.float32)
NARROW = Product(torch.bfloat16, torch.bfloat16)

Rule: TypeAlias = "Callable[[Place], Product]"


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a CPU multiplies bfloat16 numbers in hardware; False for other devices, which have float16."""
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):  # on x86 this question says yes to emulation as well
        asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None) if torch.backends.mkldnn.is_available() else None
        return bool(asked and asked())
    questions = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(asked() for asked in questions if asked)  # torch before 2.6 has no such question: exact


def check(precision: str) -> str:
    """The name itself, if it is one of :data:`PRECISIONS`.

    Raises:
        ValueError: it is not; one line.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    return precision


def find_format(precision: str, device: torch.device) -> torch.dtype:
    """The number format in which networks are loaded: float32 where it is exact, and on every CPU; else the device's own."""
    return torch.float32 if precision == "exact" else find_dtype(None, device)


def used(precision: str, device: torch.device, dtype: torch.dtype) -> str:
    """What becomes of a precision on a device: in float32 it is exact, unless bfloat16 is fast there."""
    return precision if dtype != torch.float32 or fast_bfloat16(device) else "exact"


def place_of(path: str, levels: int) -> Place:
    """Where a layer of a U-Net or a ControlNet is, by its path in diffusers' naming.

    Args:
        levels: how many the network has.
    """
    parts = path.split(".")
    level = 0
    if parts[0] == "mid_block":
        level = levels - 1
    elif parts[0] in ("down_blocks", "up_blocks"):
        level = int(parts[1]) if parts[0] == "down_blocks" else levels - 1 - int(parts[1])
    if parts[-1] in ("conv_in", "conv_out"):
        return Place({"conv_in": "entry", "conv_out": "exit"}[parts[-1]])
    if parts[0] == "time_embedding" or parts[-1] == "time_emb_proj":
        return Place("time", level)
    if "downsamplers" in parts or "upsamplers" in parts:
        return Place("sampler", level + (1 if "downsamplers" in parts else -1))
    if "attentions" in parts:
        return Place("projection" if parts[-1] in ("proj_in", "proj_out") else "attention", level)
    if "resnets" in parts:
        return Place("shortcut" if parts[-1] == "conv_shortcut" else "resnet", level)
    return Place("other", level)


def balanced(place: Place) -> Product:
    """bfloat16 inside; at the outermost level only what is added to the noise's way, not what it passes through itself.

    There the first and the last convolution, shortcuts and the projections around attention hold the noise: they are a
    hundredth of a U-Net's work. What comes back from the inner levels and what resnets add is summed in float32.
    """
    if place.kind in ("entry", "exit", "time"):
        return EXACT
    if place.level > 0:
        return NARROW
    return {"resnet": WIDE, "sampler": WIDE, "attention": NARROW}.get(place.kind, EXACT)


def narrow(place: Place) -> Product:
    """bfloat16 throughout."""
    return NARROW


def decoder(place: Place) -> Product:
    """The autoencoder's rule: bfloat16 but for the pixels themselves, whose rounding would be seen."""
    return EXACT if place.kind == "exit" else NARROW


RULES: dict[str, dict[str, Rule]] = {
    "exact": {},
    "balanced": {"unet": balanced, "vae": decoder},  # a text encoder in bfloat16 would move the picture as far as all this
    "fast": {"unet": narrow, "vae": decoder, "text_encoder": narrow},
}


# --- layers ----------------------------------------------------------------------------------------------------------


class _Low:
    """What a layer computes with: how, and a copy of its parameters in that format."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self._made_from: tuple[Any, ...] = ()
        self._copies: tuple[Tensor, Tensor | None] | None = None

    def __deepcopy__(self, memo: object) -> _Low:
        return _Low(self.product)

    def parameters(self, layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the format of the product."""
        weight, bias, inside = layer.weight, layer.bias, self.product.inside
        if weight.dtype == inside:
            return weight, bias
        # A tensor counts the changes in place; whoever replaces its numbers replaces their address.
        made_from = (weight.data_ptr(), weight._version, weight.device, bias is None or bias._version)
        if self._copies is None or self._made_from != made_from:
            with torch.no_grad():
                layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
                copy = weight.detach().to(inside, memory_format=layout)
                self._copies = copy, None if bias is None else bias.detach().to(inside)
            self._made_from = made_from
        return self._copies


class _LowLinear(nn.Linear):
    """A linear layer that computes in another format than its parameters have."""

    low: _Low

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of nn.Linear's argument
        weight, bias = self.low.parameters(self)
        return F.linear(input.to(weight.dtype), weight, bias).to(self.low.product.outside)


class _LowConv2d(nn.Conv2d):
    """A convolution of the same kind."""

    low: _Low

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of nn.Conv2d's argument
        weight, bias = self.low.parameters(self)
        return self._conv_forward(input.to(weight.dtype), weight, bias).to(self.low.product.outside)


_LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _LowLinear, nn.Conv2d: _LowConv2d}
_ORIGINALS = {low: original for original, low in _LAYERS.items()}


def attach(network: nn.Module, rule: Rule | None) -> None:
    """Let the layers of a network compute as a rule says; parameters stay as they are.

    Args:
        rule: of each linear layer and convolution, by its place; None lets all compute as they are.
    """
    levels = len(getattr(network.config, "block_out_channels", (0,)))  # type: ignore[arg-type]
    for path, found in network.named_modules():
        layer: Any = found.original if isinstance(found, RotatedLinear) else found
        if type(layer) in _ORIGINALS:
            layer.__class__ = _ORIGINALS[type(layer)]
            del layer.low
        if rule is not None and type(layer) in _LAYERS:
            layer.__class__ = _LAYERS[type(layer)]
            layer.low = _Low(rule(place_of(path, levels)))
