"""Text embeddings on the disk: each prompt is encoded once, and when all are there no text encoder is needed.

Worth it where prompts are few or the text encoder is large: of SD1.5 a prompt takes 118 kB in half precision, which
makes 236 MB for 2,000 of them and 166 GB for 1.4 million.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from wadi_core.files import atomic_write

Encoder = Callable[[list[str]], Mapping[str, Tensor]]


class EmbeddingCache:
    """What a text encoder says of prompts, a file for each; several processes may share the folder.

    Args:
        folder: where the files lie; made when the first one is written.
        fingerprint: of all that decides the values, but for the prompt: the encoder's weights, how it is called, the
            type of what it returns. Another fingerprint shares nothing.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self.folder = Path(folder) / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]

    def encode(self, prompts: Sequence[str], encoder: Encoder) -> dict[str, Tensor]:
        """The embeddings of some prompts, (n, ...) by name, on the CPU.

        Args:
            prompts: each is looked up or encoded once, however often it is there.
            encoder: prompts that are not kept yet, all different -> their tensors, (n, ...) by name; not called when
                there are none. Its tensors are kept in their own types.

        Raises:
            ValueError: no prompt is given.
            OSError: the disk is full or cannot be written; one line. What was kept before stays.
        """
        if not prompts:
            raise ValueError("there is no prompt to encode")
        kept = {prompt: self._read(prompt) for prompt in dict.fromkeys(prompts)}
        found = {prompt: tensors for prompt, tensors in kept.items() if tensors is not None}
        if missing := [prompt for prompt in kept if prompt not in found]:
            made = {name: tensor.detach().cpu() for name, tensor in encoder(missing).items()}
            for row, prompt in enumerate(missing):
                found[prompt] = {name: tensor[row].contiguous() for name, tensor in made.items()}
                self._write(prompt, found[prompt])
        rows = [found[prompt] for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _path(self, prompt: str) -> Path:
        name = hashlib.sha256(prompt.encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:32]}.safetensors"

    def _read(self, prompt: str) -> dict[str, Tensor] | None:
        """What is kept of a prompt; a file that is damaged is as good as none."""
        try:
            return load(self._path(prompt).read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None

    def _write(self, prompt: str, tensors: Mapping[str, Tensor]) -> None:
        path = self._path(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(save(dict(tensors)))
