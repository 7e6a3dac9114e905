"""The rotation as one would write it at first: what the trainer is measured against.

Three copies of the network, one for each role. A forward hook on each linear layer throws the layer's own output away,
makes the rotated weight and computes the output again. Whether conditional and unconditional passes share a call, the
losses, the optimizers and all random numbers are the trainer's own, so that nothing but this differs.

There are two of them. ``naive`` keeps for backward what the published code keeps: six tensors of half the weight's
size, in float32 (both halves of the weight, cosine, sine, and the angle before and after it is wrapped), besides the
rotated weight. ``hooks`` keeps what torch's autograd finds necessary for the same lines, with the weights frozen: less.
:func:`kept_for_backward` counts, so that neither is made worse than it says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.distill.distillation import Distillation
from trainer.distill.roles import FAKE, STUDENT, Roles, first_factors
from trainer.models.adapters import Adapter, Factors
from trainer.models.placement import autocast_type, place
from wadi_core.lorad.linear import autocast_dtype
from wadi_core.lorad.rotation import working_dtype

Rotate = Callable[[Tensor, Tensor], Tensor]
SIX = 6  # tensors of half the weight's size that the published code keeps for backward


def wrapped(theta: Tensor) -> Tensor:
    """Angles in [-pi, pi)."""
    return torch.remainder(theta + math.pi, 2 * math.pi) - math.pi


class _KeepsSix(torch.autograd.Function):
    """The rotated weight; backward has all at hand that forward has made."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, theta: Tensor) -> Tensor:
        even, odd = (half.to(theta.dtype).contiguous() for half in weight.unflatten(1, (-1, 2)).unbind(-1))
        angle = wrapped(theta)
        cosine, sine = angle.cos(), angle.sin()
        ctx.save_for_backward(even, odd, cosine, sine, theta, angle)
        return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        even, odd, cosine, sine, _, _ = ctx.saved_tensors
        g_even, g_odd = grad.unflatten(1, (-1, 2)).unbind(-1)
        return None, g_odd * (even * cosine - odd * sine) - g_even * (even * sine + odd * cosine)


def rotate_keeping_six(weight: Tensor, theta: Tensor) -> Tensor:
    """The rotated weight (out, in) in the type of theta; six tensors (out, in/2) are kept for backward."""
    return _KeepsSix.apply(weight, theta)


def rotate_by_autograd(weight: Tensor, theta: Tensor) -> Tensor:
    """The same; what is kept is autograd's decision."""
    even, odd = weight.to(theta.dtype).unflatten(1, (-1, 2)).unbind(-1)
    angle = wrapped(theta)
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(1)


class HookedAdapter(Adapter):
    """A copy of the network whose linear layers are rotated by hooks.

    Args:
        name: of the role.
        network: is copied.
        factors: path of a layer -> (theta_a, theta_b), the initial values.
        rotate: how the rotated weight is made.
    """

    def __init__(self, name: str, network: nn.Module, factors: Factors, rotate: Rotate) -> None:
        own = copy.deepcopy(network)
        parameters = {}
        for path, pair in factors.items():
            layer = own.get_submodule(path)
            a, b = (nn.Parameter(factor.detach().to(working_dtype(layer.weight), copy=True)) for factor in pair)
            layer.register_forward_hook(_hook(a, b, rotate))
            parameters |= {f"{path}.a": a, f"{path}.b": b}
        super().__init__(name, own, parameters)

    def switch(self, on: bool) -> None:
        """Nothing to switch: the copy is never anything else."""


def _hook(a: Tensor, b: Tensor, rotate: Rotate) -> Callable[..., Tensor]:
    def hook(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kind, x = inputs[0].device.type, inputs[0]
        dtype = autocast_dtype(kind) or x.dtype
        with torch.autocast(kind, enabled=False):
            rotated = rotate(layer.weight, a @ b).to(dtype)
            return F.linear(x.to(dtype), rotated, None if layer.bias is None else layer.bias.to(dtype))

    return hook


class NaiveDistillation(Distillation):
    """The trainer with three copies of the network and hooks."""

    rotate = staticmethod(rotate_keeping_six)

    def _make_roles(self) -> Roles:
        config, network, architecture = self.config, self.model.network, self.model.architecture
        _, height, width = self.latent_shape
        factors = first_factors(network, architecture, config)
        turned = {path for pairs in factors.values() for path in pairs}
        place(network, config, self.device, turned, height * width, config.exact_weights)
        network.requires_grad_(False)
        student, fake = (HookedAdapter(role, network, factors[role], self.rotate) for role in (STUDENT, FAKE))
        return Roles(network, student, fake, self.model.call, autocast_type(config))


class HooksDistillation(NaiveDistillation):
    """The same with what autograd keeps by itself."""

    rotate = staticmethod(rotate_by_autograd)


def kept_for_backward(adapter: Adapter, path: str, samples: int = 4) -> dict[str, int]:
    """What one call of a layer keeps for backward, counted as autograd stores it, each storage once.

    Args:
        adapter: switched on.
        path: of a linear layer that it turns.
        samples: rows of the input.

    Returns:
        ``halves`` and ``wholes``: tensors of half the weight's size and of its full size, parameters left out;
        ``bytes``: of them together.
    """
    layer = adapter.network.get_submodule(path)
    own = {parameter.untyped_storage().data_ptr() for parameter in adapter.network.parameters()}
    own |= {parameter.untyped_storage().data_ptr() for parameter in adapter.parameters.values()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    x = torch.randn(samples, layer.in_features, dtype=layer.weight.dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    weight = layer.weight.numel()
    found = [tensor for tensor in seen.values() if tensor.numel() in (weight, weight // 2)]
    del output
    return {
        "halves": sum(tensor.numel() == weight // 2 for tensor in found),
        "wholes": sum(tensor.numel() == weight for tensor in found),
        "bytes": sum(tensor.untyped_storage().nbytes() for tensor in found),
    }


def kinds() -> Mapping[str, type[Distillation]]:
    """Name of a measurement -> what it runs; peft's LoRA is the trainer with other settings."""
    return {"trainer": Distillation, "naive": NaiveDistillation, "hooks": HooksDistillation, "lora": Distillation}
