"""LoRaD for programs that have taken over ComfyUI's weight adapters: Forge Neo and reForge."""

from __future__ import annotations

from wadi_core.lorad.weight_adapter import WeightAdapter, register_in

from . import host


def register() -> None:
    """Put a class into the program's list; one, however often it is called.

    Raises:
        AttributeError: the list is not as ComfyUI has it.
    """
    scheme = host.weight_adapters()

    class LoRaDAdapter(WeightAdapter, scheme.WeightAdapterBase):
        """The angles of one layer; by that base the program knows its adapters."""

    register_in(scheme.adapters, LoRaDAdapter)
