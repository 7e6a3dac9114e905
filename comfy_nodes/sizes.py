"""How large the pictures are that a MODEL was trained to draw, and what to say of other sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..wadi_core.highres import NEAR
from . import embedded, pixart
from .model import adapters_on, prediction_type
from .notices import Notice

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..wadi_core.lorad import LoRaD

PIXELS = 8  # a cell of a latent is so many wide
SMALLEST = 64  # pixels of a picture's side
ENLARGED = "wadi.highres"  # under which a MODEL keeps that it draws larger pictures, and the size that it knows


def square_of(lorad: LoRaD) -> int | None:
    """Pixels on a side of the square pictures that an adapter's file names; None where it names none."""
    width, _, height = (lorad.metadata.resolution or "").partition("x")
    return int(width) if width.isdigit() and width == height else None


def native_size(model: ModelPatcher) -> int:
    """Pixels on a side of the pictures that a MODEL draws best, as far as that can be known.

    What its one-step LoRaD says goes before what its kind of network is known for.
    """
    said = [square_of(lorad) for lorad in adapters_on(model) if lorad.one_step]
    if said and said[-1]:
        return said[-1]
    if isinstance(model.model.model_config, embedded.WadiMini):
        return embedded.native_size()
    if pixart.is_pixart(model):
        return pixart.NATIVE_SIZE
    # Of the released networks of Stable Diffusion 1 and 2 only that of 768 pixels returns v.
    return 768 if prediction_type(model) == "v_prediction" else 512


def notices_on(model: ModelPatcher, width: int, height: int) -> list[Notice]:
    """What to say of pictures of a size before they fall apart without a word."""
    enlarged = model.get_attachment(ENLARGED)
    native = enlarged or native_size(model)
    small = min(width, height) < native / NEAR
    large = max(width, height) > native * NEAR
    if not small and (enlarged or not large):
        return []
    values = {"width": width, "height": height, "native": native}
    text = (
        f"{width}x{height} is not the size that this model was trained at, so things repeat or fall apart: "
        f"set width and height to {native}, or to 0"
    )
    if small or pixart.is_pixart(model):
        return [Notice("warn_size", f"{text}.", values)]
    return [Notice("warn_size_large", f"{text}, or put High Resolution before this node.", values)]
