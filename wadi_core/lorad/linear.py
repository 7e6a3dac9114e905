"""LoRaD on a live network: linear layers that rotate their frozen weight as they compute.

The base weight stays where it is, one copy of it, bit for bit. Each layer holds any number of named adapters, and
the active ones add their angles; with none active it is the bare linear layer. That is how one network serves as
teacher, student and fake score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import entries
from . import kernels
from .rotation import Factors, rotate, rotate_, sum_angles, working_dtype

# torch before 2.2 has no such question; its compiler takes the other way through turned as well, only slower.
is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", lambda: False)


class RotatedLinearFunction(torch.autograd.Function):
    """``y = x R^T + bias`` with R = W turned by ``theta_a @ theta_b``; gradients for x, bias, theta_a and theta_b.

    Neither cosines nor sines nor theta are kept for backward. R is kept or, where it is not given, made from W here
    and once more in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rotated: Tensor | None, bias: Tensor | None, theta_a: Tensor, theta_b: Tensor
    ) -> Tensor:
        ctx.recompute = rotated is None
        if rotated is None:
            rotated = turned(weight, [(theta_a, theta_b, 1.0)], x.dtype)
        ctx.save_for_backward(x, weight if ctx.recompute else rotated, theta_a, theta_b)
        return F.linear(x, rotated, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rotated, theta_a, theta_b = ctx.saved_tensors
        if ctx.recompute:
            rotated = turned(rotated, [(theta_a, theta_b, 1.0)], x.dtype)
        grad_x = grad_bias = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ rotated
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            grad_rotated = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            with torch.autocast(grad.device.type, enabled=False):  # whoever calls backward inside it rounds no angle
                grad_a, grad_b = kernels.factor_gradients(grad_rotated, rotated, theta_a, theta_b)
        return grad_x, None, None, grad_bias, grad_a, grad_b


@torch.no_grad()
def turned(weight: Tensor, factors: Sequence[Factors], dtype: torch.dtype) -> Tensor:
    """A new tensor of type ``dtype``: the weight turned by the summed angles of adapters."""
    if is_compiling():  # the plain formula is what a compiler can make one kernel of
        return rotate(weight, sum_angles(factors, working_dtype(weight))).to(dtype)
    if weight.is_meta:  # shapes without numbers, as for an estimate of memory
        return torch.empty_like(weight, dtype=dtype)
    by_words = kernels.turned_words(weight, factors, dtype)
    if by_words is not None:
        return by_words
    wide = weight.to(working_dtype(weight), copy=True, memory_format=torch.contiguous_format)
    # On a CPU blocks of rows stay in the cache; on a GPU fewer, larger kernels are faster.
    rotate_(wide, factors, None if weight.device.type == "cpu" else weight.shape[0], kernels.chosen.products)
    return wide.to(weight.dtype).to(dtype)


class _Coded(Protocol):
    """A linear layer that stores its weight in some other form."""

    def dense(self) -> Tensor: ...


class _Kept(dict[tuple[str, ...], tuple[tuple[Any, ...], Tensor]]):
    """Rotated weights by the names of the adapters that turned them, each with what it was made from."""

    def __deepcopy__(self, memo: object) -> _Kept:
        return _Kept()  # a copy of a layer has factors of its own


class FactorDict(nn.ParameterDict):
    """Factors by the names of their adapters. They move with the network, and lose no precision when it does."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> FactorDict:
        """What ``.to()`` and its like call."""
        before = {name: factor.data for name, factor in self.items()}
        super()._apply(fn, *args, **kwargs)
        for name, factor in self.items():
            if factor.dtype.itemsize < before[name].dtype.itemsize:
                factor.data = before[name].to(factor.device)
        return self


class _HiddenFactors(FactorDict):
    """Factors that are no part of the network's state dict, which stays the base's."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The type that autocast wants on this kind of device; None where it is off."""
    if kind == "meta":  # where tensors have shapes alone, and torch knows no autocast
        return None
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if kind == "cpu":  # torch before 2.4 asks for each kind of device by another name
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def rotated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Factors],
    rotated: Callable[[torch.dtype], Tensor] | None = None,
) -> Tensor:
    """``F.linear`` with a weight that adapters turn, under autocast in its type; no gradient goes to the weight.

    Args:
        x: (..., in).
        weight: (out, in); with ``rotated`` nobody looks at it.
        bias: (out,) or None.
        factors: (theta_a, theta_b, strength) of one adapter or more.
        rotated: gives the rotated weight in a type, and it is kept for backward; without it the weight is rotated here,
            and once more in backward.
    """
    kind = x.device.type
    dtype = autocast_dtype(kind)
    if dtype is not None:
        with torch.autocast(kind, enabled=False):
            return rotated_linear(x.to(dtype), weight, bias if bias is None else bias.to(dtype), factors, rotated)
    kept = None if rotated is None else rotated(x.dtype)
    if torch.is_grad_enabled():
        return RotatedLinearFunction.apply(x, weight, kept, bias, *_side_by_side(factors))
    return F.linear(x, turned(weight, factors, x.dtype) if kept is None else kept, bias)


class RotatedLinear(nn.Linear):
    """An ``nn.Linear`` whose weight is turned by the active adapters as it is used.

    It shares the parameters of the layer it stands for, so the names in a state dict stay what they were. A layer whose
    ``weight`` is None stores it in some other form, and has a method ``dense()`` that returns it as a new tensor.

    Attributes:
        active: names of the adapters whose angles are added; empty means the bare layer.
        recompute: rotate again in backward instead of keeping the rotated weight.
        share: keep the rotated weight after a call, for further calls with the same adapters; it is made anew when
            their factors have changed. :meth:`forget` gives the memory back.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.training = linear.training
        self._original = (linear,)  # in a tuple: not a submodule of its own
        self.lorad_a = _HiddenFactors()
        self.lorad_b = _HiddenFactors()
        self.strengths: dict[str, float] = {}
        self.active: tuple[str, ...] = ()
        self.recompute = False
        self.share = False
        self._kept = _Kept()

    @property
    def original(self) -> nn.Linear:
        """The layer this one stands for."""
        return self._original[0]

    def add(self, name: str, theta_a: Tensor, theta_b: Tensor, strength: float = 1.0, trainable: bool = False) -> None:
        """Add an adapter, active from now on. ``theta_a`` (out, r), ``theta_b`` (r, in/2); kept in float32 or more."""
        like = self._base() if self.weight is None else self.weight
        dtype, device = working_dtype(like), like.device
        self.lorad_a[name] = nn.Parameter(theta_a.detach().to(device, dtype), requires_grad=trainable)
        self.lorad_b[name] = nn.Parameter(theta_b.detach().to(device, dtype), requires_grad=trainable)
        self.strengths[name] = strength
        self.active = tuple(dict.fromkeys((*self.active, name)))

    def drop(self, name: str) -> None:
        """Take an adapter away."""
        del self.lorad_a[name], self.lorad_b[name], self.strengths[name]
        self.active = tuple(other for other in self.active if other != name)

    def _factors(self) -> list[Factors]:
        """(theta_a, theta_b, strength) of each active adapter that turns anything."""
        return [(self.lorad_a[n], self.lorad_b[n], self.strengths[n]) for n in self.active if self.strengths[n] != 0.0]

    def _rotated(self, factors: Sequence[Factors], dtype: torch.dtype) -> Tensor:
        """The rotated weight in ``dtype``; the kept one, if nothing has changed since."""
        if not self.share or is_compiling():
            return turned(self._base(), factors, dtype)
        # A tensor counts the changes in place; whoever replaces one replaces its address.
        made_from = (dtype, *((id(t), t._version) for *pair, _ in factors for t in pair), *(f[2] for f in factors))
        kept = self._kept.get(self.active)
        if kept is None or kept[0] != made_from:
            self._kept[self.active] = kept = made_from, turned(self._base(), factors, dtype)
        return kept[1]

    def _base(self) -> Tensor:
        """The frozen weight (out, in) as numbers that can be turned."""
        return self.weight if self.weight is not None else cast("_Coded", self.original).dense()

    def forget(self, name: str | None = None) -> None:
        """Let go of the rotated weights that :attr:`share` has kept: all, or those that an adapter had a part in."""
        for names in [names for names in self._kept if name is None or name in names]:
            del self._kept[names]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of nn.Linear's argument
        factors = self._factors()
        low = getattr(self.original, "low", None)  # where ..precision lets it compute in another format than its weight's
        if not factors:
            return super().forward(input) if self.weight is not None and low is None else self.original(input)
        recompute = self.recompute and self.weight is not None and torch.is_grad_enabled()
        rotated = None if recompute else partial(self._rotated, factors)
        if low is None:
            return rotated_linear(input, self.weight, self.bias, factors, rotated)
        bias = self.bias if self.bias is None else self.bias.to(low.product.inside)
        return rotated_linear(input.to(low.product.inside), self.weight, bias, factors, rotated).to(low.product.outside)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> RotatedLinear:
        """What ``.to()`` and its like call."""
        self.forget()
        if self.weight is None:
            self.original._apply(fn, *args, **kwargs)
        super()._apply(fn, *args, **kwargs)
        return self

    @torch.no_grad()
    def rotated_weight(self) -> Tensor:
        """A new tensor: the weight as the active adapters turn it, in the weight's own type."""
        turned = self._base().detach().clone()
        return rotate_(turned, [(self.lorad_a[n], self.lorad_b[n], self.strengths[n]) for n in self.active])

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: rank {self.lorad_b[name].shape[0]}" for name in self.lorad_b)
        return f"{super().extra_repr()}, {ranks}"


def _side_by_side(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Factors of the summed angles: the adapters side by side along the rank, strengths in theta_a."""
    scaled = [a if strength == 1.0 else a * strength for a, _, strength in factors]
    if len(factors) == 1:
        return scaled[0], factors[0][1]
    return torch.cat(scaled, dim=1), torch.cat([b for _, b, _ in factors], dim=0)


def check_fits(layer: str, linear: nn.Module | None, theta_a: Tensor, theta_b: Tensor) -> nn.Linear:
    """The linear layer, if these factors fit it.

    Raises:
        ValueError: no such layer, not a linear one, or other shapes; one line that names the layer.
    """
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{layer}: the network has no linear layer of this name")
    rank = theta_b.shape[0]
    if theta_a.shape != (linear.out_features, rank) or theta_b.shape[1] * 2 != linear.in_features:
        raise ValueError(
            f"{layer}: factors of shapes {tuple(theta_a.shape)} and {tuple(theta_b.shape)} do not fit "
            f"a weight of shape {(linear.out_features, linear.in_features)}"
        )
    return linear


def attach(
    module: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    name: str,
    strength: float = 1.0,
    trainable: bool = False,
) -> None:
    """Put an adapter on a network: each named linear layer becomes a :class:`RotatedLinear`, in place.

    Args:
        module: the network.
        factors: path of a layer in ``module`` -> (theta_a (out, r), theta_b (r, in/2)).
        name: the adapter's name, replaced where it is there already.
        strength: scales the angles.
        trainable: whether the factors get gradients.

    Raises:
        ValueError: a layer is missing, a shape is wrong, or the strength is none; nothing has been changed then.
    """
    strength = entries.strength(strength)
    layers = dict(module.named_modules())
    linears = {path: check_fits(path, layers.get(path), *pair) for path, pair in factors.items()}
    for path, linear in linears.items():
        if not isinstance(linear, RotatedLinear):
            linear = RotatedLinear(linear)
            _replace(module, path, linear)
        linear.add(name, *factors[path], strength=strength, trainable=trainable)


def detach(module: nn.Module, name: str) -> None:
    """Take an adapter off a network; layers left with none are the original ``nn.Linear`` objects again."""
    for path, layer in list(rotated_layers(module)):
        if name in layer.strengths:
            layer.drop(name)
        if not layer.strengths:
            original = layer.original
            original.train(layer.training)
            _replace(module, path, original)


def set_active(module: nn.Module, names: Iterable[str]) -> None:
    """Switch a network to these adapters; layers that hold none of them are bare."""
    wanted = tuple(names)
    for _, layer in rotated_layers(module):
        layer.active = tuple(name for name in wanted if name in layer.strengths)


def factors_of(module: nn.Module, name: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Path of each layer that holds the adapter -> its (theta_a, theta_b), the live parameters."""
    layers = rotated_layers(module)
    return {path: (layer.lorad_a[name], layer.lorad_b[name]) for path, layer in layers if name in layer.strengths}


def rotated_layers(module: nn.Module) -> Iterator[tuple[str, RotatedLinear]]:
    """Paths and layers of a network that carry adapters."""
    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, RotatedLinear))


def _replace(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(module.get_submodule(parent), attribute, layer)
