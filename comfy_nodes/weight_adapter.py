"""LoRaD as one of ComfyUI's weight adapters, the thing that turns a layer's weight whenever ComfyUI patches it.

ComfyUI calls it on whole weights, on rows of a fused one, on weights in half precision that are cast while the network
runs (low VRAM), on dequantised ones, and for hooks. All of it ends in :func:`~wadi_core.lorad.rotation.rotate_`, whose
angles, sines and cosines are float32 whatever type the weight comes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import comfy.weight_adapter
import torch
from comfy.weight_adapter.base import WeightAdapterBase, WeightAdapterTrainBase
from torch import Tensor

from ..wadi_core.lorad.format import LORAD_ENDINGS
from ..wadi_core.lorad.rotation import angles, rotate, rotate_

NAME = "lorad"
ALGORITHM = "LoRaD"  # its name in Train LoRA
NO_BYPASS = "a LoRaD turns weights and cannot be bypassed: use Load LoRaD (WaDi), Load LoRA, or Train LoRA without bypass_mode"


class LoRaDAdapter(WeightAdapterBase):
    """The angles of one layer. Everything is in ``weights``: with dynamic VRAM ComfyUI rebuilds it from the two arguments.

    Args:
        loaded_keys: names of the tensors in the file that it comes from.
        weights: (theta_a (out, r), theta_b (r, in/2)).
    """

    name = NAME

    def __init__(self, loaded_keys: set[str], weights: tuple[Tensor, Tensor]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def load(
        cls, x: str, lora: Mapping[str, Tensor], alpha: Any, dora_scale: Any, loaded_keys: set[str] | None = None
    ) -> LoRaDAdapter | None:
        """The adapter of the layer ``x`` in a file that ComfyUI's own LoRA nodes read; None if the file holds none.

        Raises:
            ValueError: one of the layer's two tensors is missing, or they do not multiply; one line.
        """
        names = {place: x + ending for ending, place in LORAD_ENDINGS.items()}
        found = {name for name in names.values() if name in lora}
        if not found:
            return None
        if len(found) < len(names):
            raise ValueError(f"the LoRaD layer {x} has only one of its two tensors: the file is damaged")
        a, b = lora[names[0]], lora[names[1]]
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise ValueError(f"the LoRaD layer {x} is damaged: {tuple(a.shape)} and {tuple(b.shape)} do not multiply")
        return cls(found, (a, b))

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: tuple[int, int, int] | None,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: Any = None,
        original_weight: Any = None,
    ) -> Tensor:
        """Turn a weight by ``strength`` times the angles, in place: of a fused weight it is a view of the layer's rows.

        ComfyUI has multiplied it by ``strength_model`` already. ``function`` is applied to the change, as to a LoRA's.

        Raises:
            ValueError: the angles are for a weight of another shape; one line that names the layer.
        """
        a, b = self.weights
        if tuple(weight.shape) != (a.shape[0], 2 * b.shape[1]):
            needed, found = (a.shape[0], 2 * b.shape[1]), tuple(weight.shape)
            raise ValueError(f"this LoRaD is made for another network: {key} has the shape {found}, it needs {needed}")
        if function(weight) is weight:  # the identity, as almost always: no copy for the change
            return rotate_(weight, [(a, b, strength)])
        change = rotate_(weight.clone(), [(a, b, strength)]) - weight
        return weight.add_(function(change))

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

    The class claims nothing but ``.lorad_a`` and ``.lorad_b``. Without it ComfyUI would skip such a file silently. A second
    time this does nothing.
    """
    if not any(getattr(known, "name", None) == NAME for known in comfy.weight_adapter.adapters):
        comfy.weight_adapter.adapters.append(LoRaDAdapter)
    comfy.weight_adapter.adapter_maps.setdefault(ALGORITHM, LoRaDAdapter)
