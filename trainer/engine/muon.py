"""Muon for convolutions and linear layers, AdamW for everything else.

Muon (Jordan et al., 2024) replaces a weight's averaged gradient by the nearest orthogonal matrix, so that a step
moves all directions alike and none of them far. Small networks with GroupNorm have a few very sharp directions that
hold AdamW's learning rate down; here the same number of steps goes several times as far. torch.optim.Muon takes
matrices only; a convolution is taken as the matrix (out, in * height * width).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration that lifts every singular value to about 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
NARROW = 8  # a matrix with no more rows, or columns, has too few directions to be made alike
ENDS = ("conv_in", "conv_out", "embedding", "quant_conv")  # in the names of layers at the ends of a network


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """About U V^T of each of ``matrices`` = U S V^T (..., rows, columns), singular values between 0.7 and 1.2."""
    x = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Steps of one size for every matrix: 0.2 per element in the root mean square, as AdamW's are.

    Args:
        parameters: weights of two or more dimensions.
        lr: learning rate, comparable with AdamW's.
        momentum: of the gradient's average, in Nesterov's form.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            # Matrices of one shape go together: a third less time than one after the other.
            alike: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if (grad := parameter.grad) is not None:
                    alike.setdefault((parameter.shape[0], parameter[0].numel()), []).append((parameter, grad))
            for shape, matrices in alike.items():
                looked_ahead = []
                for parameter, grad in matrices:
                    state = self.state[parameter]
                    if not state:
                        state["average"] = torch.zeros_like(parameter)
                    average = state["average"]
                    average.lerp_(grad, 1 - group["momentum"])
                    looked_ahead.append(grad.lerp(average, group["momentum"]).flatten(1))
                size = 0.2 * max(shape) ** 0.5
                for (parameter, _), direction in zip(matrices, orthogonalize(torch.stack(looked_ahead)), strict=True):
                    parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * size)


class MuonForMatrices:
    """Muon for every matrix that is wider than :data:`NARROW` in both directions, AdamW for the rest; one optimizer to callers.

    Args:
        parameters: what is trained.
        rate: learning rate of both.
        momentum: Muon's, and the first of AdamW's.
        beta2, weight_decay: of AdamW alone.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], rate: float, momentum: float, beta2: float, weight_decay: float
    ) -> None:
        matrices, rest = [], []
        for parameter in parameters:
            wide = parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) > NARROW
            (matrices if wide else rest).append(parameter)
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(Muon(matrices, rate, momentum))
        if rest:
            self._parts.append(torch.optim.AdamW(rest, rate, (momentum, beta2), weight_decay=weight_decay))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both, as those of any optimizer."""
        return [group for part in self._parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """What both keep of each parameter."""
        return {parameter: kept for part in self._parts for parameter, kept in part.state.items()}

    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for part in self._parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of both."""
        return {type(part).__name__: part.state_dict() for part in self._parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        for part in self._parts:
            part.load_state_dict(state[type(part).__name__])


class MuonWithAdamW:
    """Muon for the inner matrices of a network; AdamW for vectors, embeddings and the layers at its ends.

    Args:
        network: its parameters that require gradients are taken.
        muon_rate, adam_rate: peak learning rates.
        ends: parts of the names of layers that are AdamW's.
    """

    def __init__(self, network: nn.Module, muon_rate: float, adam_rate: float, ends: tuple[str, ...] = ENDS) -> None:
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        inner = [p for name, p in named if p.ndim >= 2 and not any(end in name for end in ends)]
        chosen = {id(p) for p in inner}
        rest = [p for p in self.parameters if id(p) not in chosen]
        adam = torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self._parts = [(Muon(inner, muon_rate), muon_rate), (adam, adam_rate)]

    def step(self, share: float = 1.0) -> None:
        """Clip the gradients at norm 1, update with this share of the peak rates, and drop the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, peak in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of both."""
        return [optimizer.state_dict() for optimizer, _ in self._parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Put back what :meth:`state_dict` returned."""
        for (optimizer, _), state in zip(self._parts, states, strict=True):
            optimizer.load_state_dict(state)
