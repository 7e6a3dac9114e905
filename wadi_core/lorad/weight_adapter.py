"""LoRaD as a weight adapter: the scheme of ComfyUI, which Forge Neo and reForge have taken over.

A program asks each class of its list ``weight_adapter.adapters`` to ``load`` a layer of a file, and calls
``calculate_weight`` whenever it patches that layer. The programs' own base classes are not needed for that, but they are
asked for by name: a host makes its class of this one and of its own base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .format import LORAD_ENDINGS
from .rotation import rotate_

NAME = "lorad"


class WeightAdapter:
    """The angles of one layer. Everything is in ``weights``: a program may rebuild it from the two arguments.

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
    ) -> WeightAdapter | None:
        """The adapter of the layer ``x`` in a file that the program reads; None if the file holds none.

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

        The program has multiplied it by ``strength_model`` already. ``function`` is applied to the change, as to a LoRA's.

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


def register_in(adapters: list[Any], adapter: type[WeightAdapter]) -> None:
    """Put a class into a program's list, in place of an earlier one of this name; a second time nothing changes.

    It claims nothing but ``.lorad_a`` and ``.lorad_b``. Without it a program would skip such a file silently.
    """
    adapters[:] = [known for known in adapters if getattr(known, "name", None) != NAME] + [adapter]
