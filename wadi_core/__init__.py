"""WaDi: one-step images from Stable Diffusion with LoRaD, adapters that rotate the directions of weights.

    from wadi_core import LoRaD, OneStepPipeline

Importing the package imports nothing heavy: the hosts pay for it at every start. The names below are loaded when
they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lorad import LoRaD
    from .pipeline import OneStepPipeline
    from .schedule import OneStep

__version__ = "0.1.0"
__all__ = ["LoRaD", "OneStep", "OneStepPipeline", "__version__"]

_HOME = {"LoRaD": ".lorad", "OneStep": ".schedule", "OneStepPipeline": ".pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
