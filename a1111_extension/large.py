"""Pictures larger than native in one step: the core's operations, on for the length of one pass of the sampler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from wadi_core import highres
from wadi_core.lorad import LoRaD

from . import catalog, host

OFF = "off"
CHOICES = (OFF, *highres.METHODS)
LABEL = "WaDi high resolution"  # in the infotext
PIXELS = 8  # a cell of a latent is so many wide


def native_of(lorad: LoRaD) -> tuple[int, int] | None:
    """Width and height of the pictures that a one-step LoRaD was trained with; None where it does not say."""
    sides = (lorad.metadata.resolution or "").split("x")
    if lorad.one_step is None or len(sides) != 2 or not all(side.isdigit() for side in sides):
        return None
    return int(sides[0]), int(sides[1])


def native() -> tuple[int, int]:
    """Width and height that the network knows: what the one-step LoRaDs on it say, or what its kind usually has."""
    adapters = [catalog.look(file) for file, strength in host.applied() if strength]
    known = [size for lorad in adapters if lorad is not None and (size := native_of(lorad))]
    side = 768 if host.prediction_type() == "v_prediction" else 512
    return known[0] if known else (side, side)


def enlarged(p: Any, x: Tensor) -> AbstractContextManager[Any]:
    """What the network is called within, so that a pass whose latent is ``x`` is drawn in one piece.

    What cannot be done is told, and the pass is drawn without it.
    """
    method = getattr(p, "wadi_large", OFF)
    if method == OFF:
        return nullcontext()
    height, width = (PIXELS * side for side in x.shape[-2:])
    try:
        return highres.attach(list(_networks()), highres.factors(width, height, native()), method)
    except ValueError as error:
        host.tell(p, str(error))
        return nullcontext()


def _networks() -> Iterator[nn.Module]:
    """The U-Net, and in Forge the ControlNets that steer it; A1111's extension for ControlNet fits what it adds itself."""
    unet = host.network()
    if unet is not None:
        yield unet
    control = host.controls()
    while control is not None:
        network = getattr(control, "control_model", None)
        if isinstance(network, nn.Module) and hasattr(network, "input_blocks"):
            yield network
        control = control.previous_controlnet
