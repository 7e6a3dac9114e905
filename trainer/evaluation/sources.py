"""Pictures to be looked at, and their features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..data import picture_files
from ..data.tensor_cache import Store
from .extractors import Extractor

if TYPE_CHECKING:
    from PIL.Image import Image

LOOK_BATCH = 32


class Source(Protocol):
    """Pictures in an order."""

    @property
    def count(self) -> int:
        """How many."""
        ...

    def key(self, side: int | None) -> dict[str, Any]:
        """All that decides what they look like, as plain values."""
        ...

    def load(self, rows: range, side: int | None) -> list[Image]:
        """Some of them, as middle squares of ``side`` pixels where it is given."""
        ...


@dataclass(frozen=True)
class Files:
    """Pictures on the disk."""

    paths: list[Path]

    @property
    def count(self) -> int:
        return len(self.paths)

    def key(self, side: int | None) -> dict[str, Any]:
        return {"files": picture_files.fingerprint(self.paths), "side": side}

    def load(self, rows: range, side: int | None) -> list[Image]:
        return [picture_files.load(self.paths[row], side) for row in rows]


def features_of(source: Source, name: str, extractor: Extractor, folder: Path, side: int | None) -> Tensor:
    """Features (n, d) of all pictures of a source."""

    def look(rows: range) -> Tensor:
        parts = [range(start, min(start + LOOK_BATCH, rows.stop)) for start in range(rows.start, rows.stop, LOOK_BATCH)]
        return torch.cat([extractor.look(picture_files.to_bytes(source.load(part, side)), part) for part in parts])

    store = Store(folder, name, {"extractor": extractor.key, **source.key(side)})
    return store.collect("features", source.count, look)
