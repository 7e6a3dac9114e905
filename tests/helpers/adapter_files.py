"""Small adapter files, sound and raw, and what loading a bad one must end in."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from wadi_core.lorad import LoRaD, Metadata
from wadi_core.lorad.adapter import ANGLE_LIMIT

KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
Tensors = dict[str, Tensor]


def adapter(rank: int = 2) -> LoRaD:
    generator = torch.Generator().manual_seed(0)
    factors = {
        KEY.replace("to_q", name): (torch.randn(6, rank, generator=generator), torch.randn(rank, 4, generator=generator))
        for name in ("to_q", "to_k", "to_v")
    }
    return LoRaD(factors, Metadata("unet-custom", 0.0047, 999, title="A test", extra={"note": "ü"}))


def tensors() -> Tensors:
    return {f"{key}.lorad_{part}": t for key, pair in adapter().factors.items() for part, t in zip("ab", pair, strict=True)}


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(path: Path) -> str:
    """Loading must end in one line that names the file; returns it."""
    with pytest.raises((ValueError, OSError)) as caught:
        LoRaD.load(path)
    message = str(caught.value)
    assert message.splitlines() == [message] and message.isprintable(), message
    assert path.name in message and len(message) < 600
    return message


def mutated(data: st.DataObject, content: bytes) -> bytes:
    """Some bytes of a file changed, taken out or put in, or its end cut off; often in the header."""
    changed = bytearray(content)
    header_end = min(len(content), 8 + int.from_bytes(content[:8], "little"))
    for _ in range(data.draw(st.integers(1, 4))):
        if not changed:
            break
        last = data.draw(st.sampled_from([min(8, len(changed)), min(header_end, len(changed)), len(changed)])) - 1
        place = data.draw(st.integers(0, last))
        match data.draw(st.sampled_from(["set", "set", "flip", "flip", "insert", "delete", "cut", "copy"])):
            case "set":
                changed[place] = data.draw(st.integers(0, 255))
            case "flip":
                changed[place] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                changed[place:place] = data.draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del changed[place : place + data.draw(st.integers(1, 8))]
            case "cut":
                del changed[place:]
            case "copy":
                other = data.draw(st.integers(0, last))
                changed[place : place + 8] = changed[other : other + 8]
    return bytes(changed)


def loads_or_is_refused(path: Path) -> LoRaD | None:
    """What was loaded, sound and finite; None if the file was refused as it should be."""
    try:
        lorad = LoRaD.load(path)
    except (ValueError, OSError) as error:
        message = str(error)
        assert message.splitlines() == [message] and message.isprintable() and path.name in message
        return None
    for a, b in lorad.factors.values():
        assert a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
        theta = a.float() @ b.float()
        assert theta.isfinite().all() and theta.abs().max() <= ANGLE_LIMIT
        assert torch.cos(theta).isfinite().all()
    assert lorad.one_step is None or 0 < lorad.one_step.alpha_T_squared < 1
    return lorad
