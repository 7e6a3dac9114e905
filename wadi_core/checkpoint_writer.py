"""A base in diffusers layout written as one checkpoint in the LDM layout, which is what host programs look for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import configs
from .base import OLD_ATTENTION, STEMS
from .files import refusal
from .lorad.folders import weight_files
from .lorad.leftovers import wanted
from .lorad.stored import Stored, is_finite, open_files
from .lorad.weights import Entry, write_stream
from .mini import ldm
from .single_file import renamed


def can_be_one_file(folder: Path) -> bool:
    """Whether the text encoder is OpenAI's CLIP (Stable Diffusion 1): of OpenCLIP's the folder lacks a part."""
    return configs.read(folder / "text_encoder" / "config.json").get("hidden_act") == "quick_gelu"


def entries_of(folder: Path, dtype: torch.dtype = torch.float16) -> list[Entry]:
    """The tensors of a checkpoint, each read when it is written.

    Raises:
        OSError, ValueError: a part is missing, damaged, or of a kind that the layout has no words for; one line.
    """
    settings = {part: configs.read(folder / part / "config.json") for part in ldm.PREFIXES}
    return [entry for part in ldm.PREFIXES for entry in _entries(folder / part, part, settings, dtype)]


def write(
    entries: list[Entry], path: str | os.PathLike[str], title: str, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write :func:`entries_of` a base, whole or not at all.

    Raises:
        OSError, ValueError: it cannot be written, or a tensor is damaged or too large for its type; one line.
    """
    write_stream(path, entries, {"format": "pt", "modelspec.title": title}, progress=progress)


def _entries(folder: Path, part: str, settings: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> Iterator[Entry]:
    stored = Stored(*open_files(weight_files(folder, STEMS[part]).files), folder)
    for name in wanted(stored.names):
        known = renamed(name, OLD_ATTENTION) if part == "vae" else name
        if part == "text_encoder":
            known = "text_model." + name.removeprefix("text_model.")
        ldm_name, shape = ldm.place(part, known, stored.shape(name), settings)

        def make(name: str = name, shape: tuple[int, ...] = shape) -> Tensor:
            tensor = stored.values(name).to(dtype).reshape(shape)
            if not is_finite(tensor):
                raise refusal(folder, f"{name} is too large for {str(dtype).removeprefix('torch.')}")
            return tensor

        yield ldm_name, dtype, shape, make
