"""LoRaD for Forge's patches of weights: a weight calculator, and a loader of files in front of Forge's own."""

from __future__ import annotations

from typing import Any

from backend.patcher import lora as lora_patcher
from torch import Tensor

from wadi_core.lorad.format import LORAD_ENDINGS
from wadi_core.lorad.rotation import rotate_

KIND = "lorad"  # of a patch


class Factors:
    """The factors of a layer, as Forge carries them in its list of patches.

    In an object of its own, because Forge casts the tensors of patches to its computing type, and in half precision
    small angles would be lost.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a = a
        self.b = b


class Loader:
    """Reads LoRaD files; what it does not know is left to Forge's own loaders behind it."""

    def load_lora(self, lora: dict[str, Tensor], to_load: dict[str, str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Patches by the name of the weight that they change, and the tensors for which there is no such weight.

        Args:
            lora: the tensors of a file.
            to_load: keys of layers in files -> names of weights.
        """
        patches: dict[str, Any] = {}
        first, second = LORAD_ENDINGS
        taken = set()
        for key, weight in to_load.items():
            if key + first in lora and key + second in lora:
                patches[weight] = (KIND, Factors(lora[key + first], lora[key + second]))
                taken |= {key + first, key + second}
        rest = {name: tensor for name, tensor in lora.items() if name not in taken}
        if not rest:
            return patches, rest
        others = [loader for loader in lora_patcher.lora_collection_priority if not is_ours(loader)]
        more, rest = next(loader for loader in others if hasattr(loader, "load_lora")).load_lora(rest, to_load)
        return {**patches, **more}, rest


def is_ours(loader: Any) -> bool:
    """Whether a loader in Forge's list is this module's, also one from before a "Reload UI"."""
    return type(loader).__name__ == Loader.__name__ and type(loader).__module__ == Loader.__module__


def turn(weight: Tensor, strength: float, factors: Factors) -> Tensor:
    """Forge's weight calculator for LoRaD: ``weight`` (out, in), which is Forge's own copy, turned in place."""
    if weight.shape != (factors.a.shape[0], 2 * factors.b.shape[1]):
        raise ValueError(f"a LoRaD of shape {(factors.a.shape[0], 2 * factors.b.shape[1])} on a weight {tuple(weight.shape)}")
    return rotate_(weight, [(factors.a, factors.b, strength)])


def register() -> None:
    """Add calculator and loader to Forge's lists; once, however often it is called."""
    lora_patcher.extra_weight_calculators[KIND] = turn
    others = [loader for loader in lora_patcher.lora_collection_priority if not is_ours(loader)]
    lora_patcher.lora_collection_priority[:] = [Loader(), *others]
