"""Updating a role's parameters: optimizers, loss scaling for fp16, clipping, and steps that must not be taken."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from wadi_core.packages import install

from .muon import MuonForMatrices

logger = logging.getLogger("wadi")

BETA2 = 0.999
# What optimizers keep of a parameter, in its shape: AdamW, Muon, and AdamW in 8 bits.
MOMENTS = ({"exp_avg", "exp_avg_sq"}, {"average"}, {"state1", "state2"})
NAMES = {"student": "student", "fake": "fake score"}  # of the roles, for people


def make_optimizer(
    kind: str, parameters: Sequence[nn.Parameter], rate: float, beta1: float, weight_decay: float
) -> torch.optim.Optimizer | MuonForMatrices:
    """AdamW, AdamW with its moments in 8 bits, or Muon.

    Raises:
        ValueError: bitsandbytes is needed and not there; one line.
    """
    options = {"lr": rate, "betas": (beta1, BETA2), "weight_decay": weight_decay}
    kind_of_device = parameters[0].device.type
    if kind == "adamw":
        return torch.optim.AdamW(parameters, fused=kind_of_device in ("cpu", "cuda"), **options)
    if kind == "muon":
        return MuonForMatrices(parameters, rate, beta1, BETA2, weight_decay)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports] - optional, for GPUs only
    except ImportError as error:
        raise ValueError(f"optimizer: adamw8bit needs bitsandbytes ({error}): {install('bitsandbytes')}") from None
    if kind_of_device != "cuda":
        raise ValueError(f"optimizer: adamw8bit needs an NVIDIA GPU, this run is on {kind_of_device}; take adamw")
    return AdamW8bit(parameters, **options)


class Diverged(ValueError):
    """A run that makes nothing but NaN or Inf any more."""


class NonFiniteGuard:
    """Counts updates that were skipped because a number was NaN or Inf.

    Args:
        limit: so many in a row of one role end the run, however well the other one does.
        rates: the settings that may help.
    """

    def __init__(self, limit: int, rates: str = "student_lr and fake_lr") -> None:
        self.limit, self.rates, self.total = limit, rates, 0
        self.in_a_row: dict[str, int] = {}

    def note(self, step: int, role: str, finite: bool, scale: float) -> None:
        """Take note of one update.

        Raises:
            Diverged: there were too many in a row; one line that says what may help.
        """
        if finite:
            self.in_a_row[role] = 0
            return
        self.in_a_row[role] = self.in_a_row.get(role, 0) + 1
        self.total += 1
        logger.info("step %d: the update of the %s is skipped: NaN or Inf in its loss or gradient", step, NAMES.get(role, role))
        if self.in_a_row[role] >= self.limit:
            scaled = f" at a loss scale of {scale:g}" if scale != 1.0 else ""
            raise Diverged(
                f"step {step}: {self.in_a_row[role]} updates of the {NAMES.get(role, role)} in a row had NaN or Inf in a loss "
                f"or gradient{scaled}: lower {self.rates}, or take precision=bf16 or fp32; the newest "
                "checkpoint is the place to go on from"
            )

    def state(self) -> dict:
        """The counts, as plain values."""
        return {"in_a_row": dict(self.in_a_row), "total": self.total}

    def load_state(self, state: dict) -> None:
        """Put back what :meth:`state` returned."""
        self.in_a_row, self.total = {str(role): int(count) for role, count in state["in_a_row"].items()}, int(state["total"])


class OptimizerStep:
    """One role's optimizer.

    Args:
        parameters: what it trains.
        optimizer: of these parameters.
        clip: largest norm of the gradient.
        scaled: scale the loss, as float16 needs it on a GPU.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer | MuonForMatrices,
        clip: float,
        scaled: bool = False,
    ) -> None:
        self.parameters, self.clip = list(parameters), clip
        # Of an optimizer torch asks for no more than what both have.
        self.optimizer = cast(torch.optim.Optimizer, optimizer)
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=scaled)

    @property
    def scale(self) -> float:
        """By how much losses are multiplied at present."""
        return self.scaler.get_scale()

    def set_lr(self, rate: float) -> None:
        """The learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient."""
        self.scaler.scale(loss).backward()

    def stash_grads(self) -> list[Tensor | None]:
        """Take away the gradient that has been added up so far."""
        kept = [parameter.grad for parameter in self.parameters]
        self.optimizer.zero_grad(set_to_none=True)
        return kept

    @torch.no_grad()
    def merge_grads(self, kept: Sequence[Tensor | None]) -> None:
        """Add a gradient that was taken away, after shortening what has been added up since to its length."""
        since = [parameter.grad for parameter in self.parameters]
        share = (length(kept) / length(since)).nan_to_num(nan=1.0).clamp(max=1.0)  # NaN: nothing, or what will be skipped
        for parameter, grad in zip(self.parameters, kept, strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(share)
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    def clipped_norm(self) -> Tensor:
        """Clip the gradient that has been added up; returns its norm before."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.parameters, self.clip)

    def finish(self, take: bool) -> None:
        """Take the step, or leave it; the gradient is gone afterwards."""
        if take:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict:
        """All that the next update depends on."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict) -> None:
        """Put back what :meth:`state` returned, but for the optimizer's settings, which are those of this run.

        Raises:
            ValueError: its moments are of other parameters.
        """
        groups = self.optimizer.param_groups
        options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        for parameter, moments in self.optimizer.state.items():
            known = [names for names in MOMENTS if names <= moments.keys()]
            if not known or any(moments[name].shape != parameter.shape for name in known[0]):
                raise ValueError("the optimizer's moments are not those of its parameters")
            if known[0] == MOMENTS[0] and moments["step"].shape != ():
                raise ValueError("the optimizer's count of steps is no number")
        self.scaler.load_state_dict(state["scaler"])


def length(grads: Iterable[Tensor | None]) -> Tensor:
    """The norm of a gradient of several parameters, some of which may have none."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads if grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def scheduled_lr(
    rate: float,
    step: int,
    steps: int,
    warmup: int,
    decay_steps: int,
    head_start: int = 0,
    shape: str = "linear",
    end: float = 0.1,
) -> float:
    """A learning rate: linear up over its first steps, and down over the last to a share of itself.

    Args:
        head_start: steps before its first.
        shape: of the way down: ``constant`` stays, ``linear`` reaches the share early and stays there, ``cosine`` is half
            a wave whose lowest point is the share.
        end: the share.
    """
    left = decay_left(step, steps, decay_steps)
    shares = {"constant": 1.0, "linear": max(end, left), "cosine": end + (1 - end) * (1 - math.cos(math.pi * left)) / 2}
    return warmed_up(rate, max(0, step - head_start), warmup) * shares[shape]


def decay_left(step: int, steps: int, decay_steps: int) -> float:
    """1 until the last ``decay_steps`` of a run, from there linearly down to 0 at its end; always 1 if there are none."""
    return max(0.0, min(1.0, (steps - step) / decay_steps)) if decay_steps else 1.0


def warmed_up(rate: float, step: int, warmup: int) -> float:
    """A rate that rises linearly over the first steps and stays."""
    return rate * min(1.0, (step + 1) / max(1, warmup))


def all_finite(numbers: Sequence[float]) -> bool:
    """Whether none is NaN or Inf."""
    return all(math.isfinite(number) for number in numbers)
