"""Declaring nodes for every version of ComfyUI that has the V3 API."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

LORAD = io.Custom("LORAD")
MAXIMUM_SEED = 2**64 - 1

_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: Any) -> io.Schema:
    """A node's schema; fields that this version of ComfyUI does not know yet (search aliases) are left out."""
    return io.Schema(**{name: value for name, value in fields.items() if name in _KNOWN})


def strength_input(name: str = "strength") -> io.Float.Input:
    """The strength of an adapter."""
    return io.Float.Input(
        name,
        default=1.0,
        min=-4.0,
        max=4.0,
        step=0.05,
        round=0.001,
        tooltip="Scales the rotation angles of the weights: 1 as trained, 0 no change, -1 the exact inverse.",
    )


def size_input(name: str) -> io.Int.Input:
    """Width or height of the pictures; 0 leaves it to the model."""
    native = "512 for Stable Diffusion 1.5 and 2.1-base, 256 for PixArt-alpha, 128 for wadi-mini"
    tooltip = f"Pixels. 0: the size that the model was trained at ({native})."
    return io.Int.Input(name, default=0, min=0, max=8192, step=8, tooltip=tooltip)


def seed_input() -> io.Int.Input:
    """The seed of the first picture's noise."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=MAXIMUM_SEED,
        control_after_generate=True,
        tooltip="Seed of the noise. Picture i of a batch uses seed + i and equals the picture made alone.",
    )
