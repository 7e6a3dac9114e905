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


def strength_input() -> io.Float.Input:
    """The strength of an adapter."""
    return io.Float.Input(
        "strength",
        default=1.0,
        min=-4.0,
        max=4.0,
        step=0.05,
        round=0.001,
        tooltip="Scales the rotation angles of the weights: 1 as trained, 0 no change, -1 the exact inverse.",
    )
