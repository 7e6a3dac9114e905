"""What the tests of evaluation share: a dummy extractor, folders of pictures, runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer import evaluate

CPU = torch.device("cpu")
DUMMY = "evaluation_kit:means"


def means() -> object:
    """A dummy extractor: the mean colours of nine fields."""
    return lambda images: torch.nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)


def wrong() -> object:
    return lambda images: images


def paint(folder: Path, count: int, size: tuple[int, int] = (64, 64), seed: int = 0, ending: str = "png") -> Path:
    """A folder of pictures that differ."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(size).save(folder / f"{index:03d}.{ending}")
    return folder


def run(*words: object) -> int:
    return evaluate.main([str(word) for word in words])


def read(output: Path) -> dict:
    return json.loads((output / "evaluation.json").read_text())
