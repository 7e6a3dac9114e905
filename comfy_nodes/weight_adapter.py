"""LoRaD as one of ComfyUI's weight adapters, the thing that turns a layer's weight whenever ComfyUI patches it.

ComfyUI calls it on whole weights, on rows of a fused one, on weights in half precision that are cast while the network
runs (low VRAM), on dequantised ones, and for hooks. All of it ends in the core's rotation, whose angles, sines and
cosines are float32 whatever type the weight comes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.weight_adapter
import torch
from comfy.weight_adapter.base import WeightAdapterBase, WeightAdapterTrainBase
from torch import Tensor

from ..wadi_core.lorad.rotation import angles, rotate
from ..wadi_core.lorad.weight_adapter import NAME, WeightAdapter, register_in

__all__ = ["ALGORITHM", "NAME", "LoRaDAdapter", "register"]

ALGORITHM = "LoRaD"  # its name in Train LoRA
NO_BYPASS = "a LoRaD turns weights and cannot be bypassed: use Load LoRaD (WaDi), Load LoRA, or Train LoRA without bypass_mode"


class LoRaDAdapter(WeightAdapter, WeightAdapterBase):
    """The angles of one layer; with dynamic VRAM ComfyUI rebuilds it from its two arguments."""

    def bypass_forward(self, org_forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse: what is added to a layer's output cannot turn its weight.

        Raises:
            ValueError: always; one line.
        """
        raise ValueError(NO_BYPASS)

    @classmethod
    def create_train(cls, weight: Tensor, rank: int = 1, alpha: float = 1.0) -> WeightAdapterTrainBase:
        """Angles of 0 to be trained on a layer's weight by ComfyUI's Train LoRA; nothing on one that is no matrix of pairs.

        Args:
            weight: of any layer: the node asks for convolutions too, which a LoRaD leaves as they are.
            rank: of the angles.
            alpha: not used: angles are not scaled.
        """
        if weight.ndim != 2 or weight.shape[1] % 2:
            return Untouched()
        out_features, in_features = weight.shape
        bound = math.sqrt(6.0 / (rank + in_features // 2))
        theta_b = torch.empty(rank, in_features // 2, device=weight.device).uniform_(-bound, bound)
        return TrainedLoRaD(torch.zeros(out_features, rank, device=weight.device), theta_b)

    def to_train(self) -> WeightAdapterTrainBase:
        """These angles, to be trained on."""
        return TrainedLoRaD(*self.weights)


class Untouched(WeightAdapterTrainBase):
    """What is trained on a layer that a LoRaD does not turn: nothing."""

    def __call__(self, w: Tensor) -> Tensor:
        return w

    def bypass_forward(self, org_forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return org_forward(x, *args, **kwargs)

    def passive_memory_usage(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())

    def move_to(self, device: torch.device) -> int:
        self.to(device)
        return self.passive_memory_usage()


class TrainedLoRaD(Untouched):
    """The angles of a layer while ComfyUI's Train LoRA trains them; their names are those of a LoRaD file.

    Args:
        theta_a: (out, r).
        theta_b: (r, in/2).
    """

    def __init__(self, theta_a: Tensor, theta_b: Tensor) -> None:
        super().__init__()
        self.lorad_a, self.lorad_b = torch.nn.Parameter(theta_a), torch.nn.Parameter(theta_b)

    def __call__(self, w: Tensor) -> Tensor:
        return rotate(w, angles(self.lorad_a.to(w.device), self.lorad_b.to(w.device)))

    def bypass_forward(self, org_forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError(NO_BYPASS)


def register() -> None:
    """Let ComfyUI's own loaders (Load LoRA, Create Hook LoRA) find LoRaD layers, and Train LoRA train them.

    A second time this does nothing.
    """
    register_in(comfy.weight_adapter.adapters, LoRaDAdapter)
    comfy.weight_adapter.adapter_maps.setdefault(ALGORITHM, LoRaDAdapter)
