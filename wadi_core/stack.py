"""Adapters as a user names them, one or several, with or without strengths: read, and described for a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from . import entries, hub, settings
from .files import known_name, sha256_of_file
from .lorad.adapter import LoRaD

if TYPE_CHECKING:
    from typing_extensions import TypeIs

File: TypeAlias = "str | os.PathLike[str]"
Stacked: TypeAlias = "tuple[LoRaD, settings.Adapter]"
Pair: TypeAlias = "tuple[LoRaD | File, float]"
Adapters: TypeAlias = "LoRaD | File | Sequence[LoRaD | File | Pair] | None"


def load_adapters(lorad: Adapters, strength: float = 1.0) -> list[Stacked]:
    """Adapters in any of the forms that :meth:`~.pipeline.OneStepPipeline.set_lorad` takes, read and with their strengths.

    Raises:
        OSError, ValueError: a file is missing, damaged or no LoRaD, or a strength is far from any that makes sense; one line.
    """
    if lorad is None:
        return []
    stack: list[Stacked] = []
    for entry in [lorad] if isinstance(lorad, (LoRaD, str, os.PathLike)) or _is_pair(lorad) else lorad:
        adapter, its_strength = entry if _is_pair(entry) else (entry, strength)
        its_strength = entries.strength(its_strength)
        if isinstance(adapter, LoRaD):
            kept = settings.Adapter(adapter.metadata.title or "", its_strength)
        else:
            wanted, path = hub.parse(adapter), Path(hub.local(adapter))
            adapter = LoRaD.load(path)
            kept = settings.Adapter(str(wanted) if wanted else known_name(path), its_strength, sha256_of_file(path))
        stack.append((adapter, kept))
    return stack


def _is_pair(entry: Any) -> TypeIs[Pair]:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Real)
