"""Checkpoints that survive a kill at any moment.

A checkpoint is one file, written under a temporary name, flushed to the disk and renamed: either it is there
whole or it is not there. Files are read with ``weights_only=True``, so they hold tensors and plain values alone.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wadi_core.files import atomic_write


class Checkpoints:
    """The checkpoints of one run: ``step-000123.pt`` files in one folder, newest wins.

    Args:
        folder: where the files live; made when the first one is saved.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write ``state`` as the checkpoint of ``step`` and drop the ones beyond ``keep``."""
        path = self.folder / f"step-{step:08d}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save(dict(state), file)
        for old in self._paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None where there is none.

        Raises:
            ValueError: checkpoints are there but not one of them can be read.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError):
                continue
        if paths:
            raise ValueError(f"{self.folder}: none of the {len(paths)} checkpoints can be read; remove them to start anew")
        return None


def random_state() -> dict[str, Any]:
    """The state of Python's and torch's random generators, as plain values."""
    version, internal, gauss = random.getstate()
    return {"python": [version, list(internal), gauss], "torch": torch.get_rng_state()}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
