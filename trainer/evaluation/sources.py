"""Pictures to be looked at: files on the disk, or scenes of the embedded model's world in place of photographs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import picture_files
from ..data.tensor_cache import Store
from .extractors import Extractor

if TYPE_CHECKING:
    from PIL.Image import Image

LOOK_BATCH = 32
# Scenes that are prompts, those that are real pictures, and those of single objects that prototypes are learned from:
# those of the benchmark of wadi-mini.
MINI_PROMPTS, MINI_REAL, MINI_SINGLE = 400_000_000, 200_000_000, 100_000_000


@dataclass(frozen=True)
class Drawn:
    """Scenes of the embedded model's world; with ``single`` each object in turn, alone."""

    count: int
    single: bool = False

    def key(self, side: int | None) -> dict[str, Any]:
        return {"scenes": MINI_SINGLE if self.single else MINI_REAL, "side": side}

    def load(self, rows: range, side: int | None) -> list[Image]:
        from ..mini import scenes

        things = scenes.things()
        if self.single:
            plans = [scenes.scene(MINI_SINGLE + row, pair=False, only=things[row % len(things)]) for row in rows]
        else:
            plans = [scenes.scene(MINI_REAL + row) for row in rows]
        return [picture_files.framed(scenes.draw(plan), side) for plan in plans]


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


def features_of(source: Files | Drawn, name: str, extractor: Extractor, folder: Path, side: int | None) -> Tensor:
    """Features (n, d) of all pictures of a source."""

    def look(rows: range) -> Tensor:
        parts = [range(start, min(start + LOOK_BATCH, rows.stop)) for start in range(rows.start, rows.stop, LOOK_BATCH)]
        return torch.cat([extractor.look(picture_files.to_bytes(source.load(part, side)), part) for part in parts])

    store = Store(folder, name, {"extractor": extractor.key, **source.key(side)})
    return store.collect("features", source.count, look)
