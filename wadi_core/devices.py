"""Where the networks run and in which number format, by the names that people give."""

from __future__ import annotations

import torch

from . import settings
from .files import one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {name: getattr(torch, name) for name in settings.DTYPES}


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of this name; without one a GPU if there is one, else the CPU.

    Raises:
        ValueError: no such kind of device, or none here; one line.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(one_line(f"the device {device} cannot be used: {str(error).splitlines()[0]}")) from error
    if device.type == "meta":
        raise ValueError("the device meta cannot be used: it computes nothing")
    return device


def find_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """float32, bfloat16 or float16, also by their short names (fp32, bf16, fp16); by default what suits the device.

    Raises:
        ValueError: another type; one line.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if found is None or found not in DTYPES.values():
        raise ValueError(f"the networks run in {', '.join(settings.DTYPES)}, not in {dtype}")
    return found


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, where that is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024 if device.type == "cpu" else None
