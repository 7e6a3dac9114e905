"""Where the prompts of a distillation come from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any


class Prompts:
    """An endless, seeded stream of prompts whose position can be saved.

    Args:
        source: a text file with one prompt a line (taken in a random order, anew each time round), or ``"mini"``
            for captions of the embedded model's scenes.
        seed: of the order.

    Raises:
        ValueError: the file holds no prompt. OSError: it cannot be read.
    """

    def __init__(self, source: str, seed: int) -> None:
        self._random = random.Random(seed)
        self._order: list[int] = []
        if source == "mini":
            from .mini.teacher import SHEET_CAPTIONS

            self._lines: list[str] = []
            self.shown = SHEET_CAPTIONS
        else:
            lines = (line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines())
            self._lines = [line for line in lines if line]
            if not self._lines:
                raise ValueError(f"{source}: no prompt in this file; write one a line")
            self.shown = tuple(self._lines[:10])

    def take(self, count: int) -> list[str]:
        """The next ``count`` prompts."""
        if not self._lines:
            from .mini.scenes import draw_plan

            return [draw_plan(self._random).caption for _ in range(count)]
        taken = []
        while len(taken) < count:
            if not self._order:
                self._order = self._random.sample(range(len(self._lines)), len(self._lines))
            taken.append(self._lines[self._order.pop()])
        return taken

    def state(self) -> dict[str, Any]:
        """The position in the stream, as plain values."""
        version, internal, gauss = self._random.getstate()
        return {"random": [version, list(internal), gauss], "order": list(self._order)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a position that :meth:`state` returned."""
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
        self._order = list(state["order"])
