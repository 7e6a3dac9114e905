"""Captions of wadi-mini's scenes as prompts: a new one for every sample, without an end."""

from __future__ import annotations

import random

from .scenes import draw_plan
from .teacher import SHEET_CAPTIONS


class SceneCaptions:
    """What ``prompts=mini`` stands for."""

    shown: tuple[str, ...] = tuple(SHEET_CAPTIONS)

    def at(self, seed: int, number: int) -> str:
        """The caption of a sample's scene."""
        return draw_plan(random.Random(f"{seed} {number}")).caption
