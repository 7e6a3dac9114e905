"""Scenes of the embedded model's world in place of photographs, and as prompts of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.picture_files import framed
from . import scenes

if TYPE_CHECKING:
    from PIL.Image import Image

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
        things = scenes.things()
        if self.single:
            plans = [scenes.scene(MINI_SINGLE + row, pair=False, only=things[row % len(things)]) for row in rows]
        else:
            plans = [scenes.scene(MINI_REAL + row) for row in rows]
        return [framed(scenes.draw(plan), side) for plan in plans]
