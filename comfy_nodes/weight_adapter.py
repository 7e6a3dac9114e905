"""LoRaD as one of ComfyUI's weight adapters, the thing that turns a layer's weight whenever ComfyUI patches it.

ComfyUI calls it on whole weights, on rows of a fused one, on weights in half precision that are cast while the network
runs (low VRAM), on dequantised ones, and for hooks. All of it ends in the core's rotation, whose angles, sines and
cosines are float32 whatever type the weight comes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.weight_adapter
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ..wadi_core.lorad.weight_adapter import NAME, WeightAdapter, register_in

__all__ = ["NAME", "LoRaDAdapter", "register"]


class LoRaDAdapter(WeightAdapter, WeightAdapterBase):
    """The angles of one layer; with dynamic VRAM ComfyUI rebuilds it from its two arguments."""

    def bypass_forward(self, org_forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse: what is added to a layer's output cannot turn its weight.

        Raises:
            ValueError: always; one line.
        """
        raise ValueError("a LoRaD turns weights and cannot be bypassed: use Load LoRaD (WaDi) or the ordinary Load LoRA")


def register() -> None:
    """Let ComfyUI's own loaders (Load LoRA, Create Hook LoRA) find LoRaD layers; a second time it does nothing."""
    register_in(comfy.weight_adapter.adapters, LoRaDAdapter)
