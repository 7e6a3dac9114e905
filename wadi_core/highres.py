"""Pictures larger than a network was trained for, without training: plain operations on the convolutions of a U-Net.

Given a larger latent, a U-Net draws several small pictures into it, because its convolutions see as many cells as
ever and these are now a smaller part of the whole. Two ways to let them see the whole again:

``redilate``
    The 3x3 convolutions of the inner levels reach f times as far (ScaleCrafter; He et al., 2023). A dilation d that is
    no whole number is d' = ceil(d) on an input enlarged by d'/d, the output brought back.
``shrink``
    The inner levels are given every f-th cell, so that they see a picture of the size that they know; what comes back
    from them is enlarged again for the outermost level (Kohya's Deep Shrink; RAU-Net in HiDiffusion, Zhang et al.,
    2023). Cells are picked and not averaged: nearly all that a one-step network is given is noise, whose average is
    weaker than any noise it has seen.

Which convolutions these are follows from the network's structure, in diffusers' naming and in LDM's, which ComfyUI,
A1111 and Forge use. A ControlNet is half such a U-Net: give it along with the U-Net that it steers.

    with attach([unet, controlnet], factors(1024, 1792, (512, 512))):
        unet(z, 999, text)

Nothing is rebuilt and no weight is touched: attributes of convolutions and hooks are set, and taken back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

Size: TypeAlias = "tuple[int, int]"  # height and width in cells of a latent

METHODS = ("redilate", "shrink")  # the first is the default: the better by docs/mini-highres.json
PROPORTIONS = ("keep", "stretch")
LARGEST = 4.0  # times the native size on a side: what lies above was never tried
NEAR = 1.05  # a picture hardly larger than native is drawn as it is

_ENCODER, _MIDDLE, _DECODER = ("down_blocks", "input_blocks"), ("mid_block", "middle_block"), ("up_blocks", "output_blocks")
# In LDM's naming the convolution that lets the picture in is the first block of the row.
_NOT_INSIDE = re.compile(r"input_blocks\.0\.")
# What the programs call a ControlNet's part in a U-Net's call: ComfyUI's is a dictionary of lists, diffusers' are two.
_RESIDUALS = ("control", "down_block_additional_residuals", "mid_block_additional_residual")
_LATENT = ("sample", "x")  # what they call the latent where it is passed by its name
_UPSAMPLER = re.compile(r"(up_blocks\.\d+\.upsamplers|output_blocks\.\d+)\.\d+\.conv")


@dataclass(frozen=True)
class Layer:
    """A convolution larger than 1x1 in the blocks of a U-Net.

    Attributes:
        path: of the module in the network.
        conv: the module.
        level: how often the picture was halved before the block that it belongs to; 0 is the outermost.
        role: ``down`` halves the picture, ``up`` works on what was just doubled, ``block`` is any other.
    """

    path: str
    conv: nn.Conv2d
    level: int
    role: str


def layers(network: nn.Module) -> list[Layer]:
    """The convolutions inside a U-Net or a ControlNet, from the picture inwards and out again.

    Raises:
        ValueError: the network is not built like those of Stable Diffusion 1 and 2; one line.
    """
    parts = dict(network.named_children())
    found, level = [], 0
    for names in (_ENCODER, _MIDDLE, _DECODER):
        part = next((name for name in names if name in parts), None)
        for path, conv in parts[part].named_modules(prefix=part) if part else ():
            if not isinstance(conv, nn.Conv2d) or max(conv.kernel_size) == 1 or _NOT_INSIDE.match(path):
                continue
            role = "down" if max(conv.stride) > 1 else "up" if _UPSAMPLER.fullmatch(path) else "block"
            found.append(Layer(path, conv, level, role))
            level += {"down": 1, "up": -1, "block": 0}[role]
    if not any(layer.role == "down" for layer in found):
        raise ValueError("pictures can be enlarged with U-Nets of Stable Diffusion 1 and 2 only, and this is none")
    return found


def factors(width: int, height: int, native: tuple[int, int], proportions: str = "keep") -> tuple[float, float]:
    """How much larger a picture is than what the network was trained at, (vertically, horizontally), at least 1.

    Args:
        width, height: of the picture; ``native``: the same of the network's own pictures, in the same unit.
        proportions: ``keep``: one factor for both axes, by the area, so that round things stay round; ``stretch``:
            each axis by itself, so that the inner levels see the picture in their own shape.

    Raises:
        ValueError: the picture is absurdly large; one line.
    """
    if proportions not in PROPORTIONS:
        raise ValueError(f"proportions must be one of {', '.join(PROPORTIONS)}, not {proportions}")
    horizontal, vertical = width / native[0], height / native[1]
    if max(horizontal, vertical) > LARGEST:
        most = f"{native[0] * LARGEST:.0f}x{native[1] * LARGEST:.0f}"
        raise ValueError(f"{width}x{height} is too large for this network: enlarging goes up to {most}")
    if proportions == "keep":
        horizontal = vertical = math.sqrt(horizontal * vertical)
    return vertical if vertical > NEAR else 1.0, horizontal if horizontal > NEAR else 1.0


def attach(
    networks: nn.Module | Iterable[nn.Module],
    factors: tuple[float, float],
    method: str = METHODS[0],
    first_level: int = 1,
) -> ExitStack:
    """Let networks draw pictures that are larger than they know, until the returned stack is closed.

    Args:
        networks: a U-Net and the ControlNets that steer it.
        factors: of height and width, from :func:`factors`; (1, 1) changes nothing.
        method: one of :data:`METHODS`.
        first_level: the outermost level that is treated: 1 leaves only the level of full size as it is.

    Returns:
        ``close()``, or the end of a ``with`` block, takes everything back. Stacks on one network are closed in the
        reverse order of their making.

    Raises:
        ValueError: another kind of network, an unknown method or a factor below 1; one line, and nothing is changed.
    """
    if method not in METHODS:
        raise ValueError(f"pictures are enlarged by one of {', '.join(METHODS)}, not {method}")
    if not all(1.0 <= factor <= LARGEST for factor in factors):
        raise ValueError(f"pictures are enlarged by factors from 1 to {LARGEST:g}, not {factors[0]:g} and {factors[1]:g}")
    networks = [networks] if isinstance(networks, nn.Module) else list(networks)
    if tuple(factors) == (1.0, 1.0):
        return ExitStack()
    with ExitStack() as changes:
        for network in networks:
            found = layers(network)
            deepest = max(layer.level for layer in found)
            if not 1 <= first_level <= deepest:
                raise ValueError(f"the levels of this network that can be enlarged are 1 to {deepest}, not {first_level}")
            if method == "redilate":
                _redilate(found, factors, first_level, changes)
            else:
                _shrink(network, found, factors, first_level, changes)
        return changes.pop_all()


# --- re-dilation -----------------------------------------------------------------------------------------------------


def dilation(factor: float, level: int, first_level: int = 1) -> float:
    """How far the taps of a level's convolutions lie apart, for pictures enlarged by ``factor``.

    The whole factor where levels are deep; near the outermost, which draws the details, it grows by one a level.
    """
    return min(factor, 2.0 + level - first_level) if level >= first_level else 1.0


def _redilate(found: Sequence[Layer], factors: tuple[float, float], first_level: int, changes: ExitStack) -> None:
    for layer in found:
        wanted = tuple(dilation(factor, layer.level, first_level) for factor in factors)
        whole = tuple(math.ceil(d - 1e-6) for d in wanted)
        if whole == (1, 1):
            continue
        conv = layer.conv
        height, width = padding = tuple(p * d for p, d in zip(conv.padding, whole, strict=True))
        _set(conv, changes, dilation=whole, padding=padding, _reversed_padding_repeated_twice=[width, width, height, height])
        if whole != wanted:
            enlargement = _Enlarged((whole[0] / wanted[0], whole[1] / wanted[1]))
            changes.callback(conv.register_forward_pre_hook(enlargement.before).remove)
            changes.callback(conv.register_forward_hook(enlargement.after).remove)


def _set(conv: nn.Conv2d, changes: ExitStack, **attributes: Any) -> None:
    """Set attributes; those that the convolution had come back when the changes are taken back."""
    for name, value in attributes.items():
        changes.callback(setattr, conv, name, getattr(conv, name))
        setattr(conv, name, value)


class _Enlarged:
    """A convolution on an enlarged input whose output is brought back, for a dilation that is no whole number."""

    def __init__(self, scale: tuple[float, float]) -> None:
        self._scale = scale
        self._size = (0, 0)

    def before(self, conv: nn.Conv2d, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        self._size = tuple((side - 1) // step + 1 for side, step in zip(x.shape[-2:], conv.stride, strict=True))
        size = [round(side * scale) for side, scale in zip(x.shape[-2:], self._scale, strict=True)]
        return F.interpolate(x, size=size, mode="bilinear"), *others

    def after(self, conv: nn.Conv2d, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return F.interpolate(output, size=self._size, mode="bilinear")


# --- shrinking -------------------------------------------------------------------------------------------------------


def shrunk(size: Size, factors: tuple[float, float], halvings: int) -> Size:
    """What a level of ``size`` cells becomes: divided by the factors, and still to be halved so many times without rest."""
    step = 2**halvings
    return tuple(max(1, round(side / factor / step)) * step for side, factor in zip(size, factors, strict=True))


def halved(size: Size) -> Size:
    """A level's size to that of the next one inside."""
    height, width = size
    return (height + 1) // 2, (width + 1) // 2


def pick(x: Tensor, size: Size) -> Tensor:
    """(n, c, h, w) with fewer cells: those at the upper left of each patch, where a halving convolution has its centre."""
    return F.interpolate(x, size=size, mode="nearest")


def spread(x: Tensor, size: Size) -> Tensor:
    """The way back from :func:`pick`: each cell where it was taken from, and linear between them."""
    height, width = size
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(x, size=(height + 1, width + 1), mode="bilinear", align_corners=True)[..., :height, :width]


def fit_residuals(residuals: Any, full: Size, small: Size, halvings: int) -> Any:
    """What a ControlNet adds to a U-Net, in the sizes that the levels of a shrunk U-Net have.

    Args:
        residuals: tensors (n, c, h, w), None, and tuples, lists and dictionaries of them, all that one call is given.
            If the ControlNet was shrunk too they fit already, and stay as they are.
        full, small: sizes of the level that is shrunk, before and after. What is added at this level itself stays.
        halvings: how many levels lie inside of it.
    """
    sizes: dict[Size, Size] = {}
    for _ in range(halvings):
        full, small = halved(full), halved(small)
        sizes[full] = small
    # Of a network that was not shrunk the level next to this one is the largest that does not fit, and always there.
    largest = next(iter(sizes), None)
    if not any(tuple(tensor.shape[-2:]) == largest for tensor in _tensors(residuals)):
        return residuals

    def fit(value: Any) -> Any:
        if isinstance(value, Tensor):
            height, width = value.shape[-2:]
            size = height, width
            return pick(value, sizes[size]) if size in sizes else value
        if isinstance(value, dict):
            return {key: fit(one) for key, one in value.items()}
        return type(value)(fit(one) for one in value) if isinstance(value, (list, tuple)) else value

    return fit(residuals)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _shrink(
    network: nn.Module, found: Sequence[Layer], factors: tuple[float, float], first_level: int, changes: ExitStack
) -> None:
    """Treat the convolution that halves into ``first_level``, and the one that comes back from it."""
    level = first_level - 1
    halvings = sum(layer.role == "down" and layer.level >= level for layer in found)
    shrinking = _Shrunk(factors, halvings, level)
    changes.callback(network.register_forward_pre_hook(shrinking.enter, with_kwargs=True).remove)
    for layer in found:
        if layer.role == "down" and layer.level == level:
            changes.callback(layer.conv.register_forward_pre_hook(shrinking.down).remove)
        if layer.role == "up" and layer.level == first_level:
            sampler = network.get_submodule(layer.path.rpartition(".")[0])
            changes.callback(sampler.register_forward_pre_hook(shrinking.rising).remove)
            changes.callback(layer.conv.register_forward_pre_hook(shrinking.up_before).remove)
            changes.callback(layer.conv.register_forward_hook(shrinking.up_after).remove)


class _Shrunk:
    """The hooks of one shrunk network, and what they have to remember during one call."""

    def __init__(self, factors: tuple[float, float], halvings: int, level: int) -> None:
        self._factors, self._halvings, self._level = factors, halvings, level
        self._full = self._small = (0, 0)
        self._below: list[Tensor] = []

    def enter(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the network: learn the latent's size, and fit what ControlNets that are not shrunk want to add."""
        latent = args[0] if args else next(kwargs[name] for name in _LATENT if name in kwargs)
        size = tuple(latent.shape[-2:])
        for _ in range(self._level):
            size = halved(size)
        self._full, self._small = size, shrunk(size, self._factors, self._halvings)
        added = {name: kwargs[name] for name in _RESIDUALS if name in kwargs}
        return args, kwargs | fit_residuals(added, self._full, self._small, self._halvings)

    def down(self, conv: nn.Conv2d, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the convolution that halves."""
        return pick(args[0], self._small), *args[1:]

    def rising(self, sampler: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the module that doubles: programs differ in the size that they double to, so what goes in is kept."""
        self._below = [args[0]]

    def up_before(self, conv: nn.Conv2d, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before its convolution: this one works at the size that it knows."""
        return F.interpolate(self._below.pop(), size=self._small, mode="nearest"), *args[1:]

    def up_after(self, conv: nn.Conv2d, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """After it: back to the full size."""
        return spread(output, self._full)
