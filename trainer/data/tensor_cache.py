"""Tensors that take long to make, kept in chunks: a run that was killed goes on, and nothing is made twice.

A set lies in a folder of its own whose name ends in a hash of all that decides what is in it. Other weights, or other
settings, are another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from wadi_core.files import atomic_write, refusal

CHUNK = 256  # rows a file


class Store:
    """The tensors of one set, a file for each chunk and kind.

    Args:
        work: the folder of all sets.
        name: of this set, for people.
        recipe: all that decides what is in it, as plain values.
    """

    def __init__(self, work: str | os.PathLike[str], name: str, recipe: Mapping[str, Any]) -> None:
        text = json.dumps(recipe, sort_keys=True)
        self.folder = Path(work) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self.name = name
        self.recipe = dict(recipe)

    def collect(self, kind: str, count: int, make: Callable[[range], Tensor]) -> Tensor:
        """The first ``count`` rows of ``kind``; chunks that are not there yet come from ``make(range of rows)``.

        Raises:
            ValueError: a file of the set is damaged. OSError: one cannot be written. Both in one line.
        """
        chunks = []
        with tqdm(total=count, desc=f"{self.name}: {kind}", unit="picture", mininterval=2) as bar:
            for start in range(0, count, CHUNK):
                wanted = min(CHUNK, count - start)
                path = self.folder / f"{kind}-{start:07d}.safetensors"
                chunk = self._read(path, kind)
                if chunk is None or len(chunk) < wanted:
                    chunk = make(range(start, start + wanted))
                    self._write(path, kind, chunk)
                chunks.append(chunk[:wanted])
                bar.update(wanted)
        return torch.cat(chunks)

    def _read(self, path: Path, kind: str) -> Tensor | None:
        if not path.exists():
            return None
        try:
            return load_file(path)[kind]
        except (SafetensorError, KeyError) as error:
            raise refusal(path, f"this file is damaged ({error}); remove it and it is made again") from None

    def _write(self, path: Path, kind: str, chunk: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = self.folder / "recipe.json"
        if not recipe.exists():
            with atomic_write(recipe) as file:
                file.write(json.dumps(self.recipe, indent=2, sort_keys=True).encode())
        with atomic_write(path) as file:
            file.write(save({kind: chunk.contiguous()}))
