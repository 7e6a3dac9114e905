"""Weights of a network on the disk or in memory, read one tensor at a time, and files written in the same manner.

A network of gigabytes is worked on with a few layers in memory, whatever its layout.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .. import mini
from ..files import RefusedFile, atomic_write, check_writable, one_line, refusal
from . import declared
from .checkpoint import Header, encode_header, raw_bytes
from .folders import STEM, WeightFiles, has_weights, weight_files
from .layers import sha256_of_layers
from .layouts import Layout, Place, detect
from .stored import Stored, open_files

# A tensor to be written: name, type, shape, and a function that returns it when its turn has come.
Entry = tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]

SUBFOLDERS = ("unet", "transformer")
_SYNC_EVERY = 1 << 28  # bytes
_WAITING = 1 << 26  # bytes of tensors that may wait for the disk


class Weights(Stored):
    """The tensors of a network, and where in it the linear layers are.

    Attributes:
        layout: names and places of the layers.
        folder: the folder that was opened; None for a file or a state dict.
        found: the files of the network; None for a state dict.
        prediction_type: what the network returns, as the base says it itself; None where it does not.
    """

    def __init__(
        self,
        holders: Mapping[str, Header | Tensor],
        metadata: Mapping[str, str],
        source: str,
        folder: Path | None = None,
        found: WeightFiles | None = None,
    ) -> None:
        super().__init__(holders, metadata, source)
        self.folder = folder
        self.found = found
        self.layout: Layout = detect(self.shapes)
        said = declared.of_file(source, self._holders, self.metadata)
        self.prediction_type = said if folder is None else declared.of_folder(folder) or said

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Weights:
        """Look at a network on the disk; tensors are read when they are asked for.

        Args:
            path: a ``.safetensors`` file in any layout, a folder in diffusers layout (of a pipeline or of the network
                alone, in one file or several), or ``mini``. Pickles of plain tensors are read whole.

        Raises:
            OSError: there is no such thing.
            ValueError: it is damaged, or no network that LoRaD is made for. Both with a message of one line.
        """
        place = mini.folder() if str(path) == "mini" else Path(path)
        folder = place if place.is_dir() else None
        found = network_files(place) if folder else WeightFiles((place,), None, "")
        try:
            return cls(*open_files(found.files), str(path), folder, found)
        except RefusedFile:
            raise
        except ValueError as error:
            raise refusal(path, str(error)) from error

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Weights:
        """The weights of a state dict; its tensors are not copied.

        Raises:
            ValueError: no network that LoRaD is made for; one line.
        """
        return cls(tensors, metadata or {}, "this state dict")

    @property
    def architecture(self) -> str:
        return self.layout.architecture

    def layers(self) -> dict[str, Place]:
        """Canonical path -> place of the layers that a one-step student's LoRaD turns."""
        return self.layout.layers()

    def linear(self, path: str) -> Tensor:
        """The weight (out, in) of the linear layer with this canonical path.

        In the type that it is stored in; codes with a scale beside them as their values, in float32.

        Raises:
            ValueError: its numbers are stored in a way that this program does not know; one line.
        """
        place = self.layout.places[path]
        return self.values(place.name)[place.rows or slice(None)]

    def check_numbers(self) -> None:
        """Read every tensor once and do nothing with it.

        Raises:
            OSError, ValueError: as of :meth:`values`, and of tensors that are no layers as of :meth:`checked`; one line.
        """
        layers = {place.name for place in self.layout.places.values()}
        for name in self.names:
            self.values(name) if name in layers else self.checked(name)

    def sha256(self) -> str:
        """:func:`~.layers.network_sha256` of the network: what an adapter knows its base by, in any layout."""
        return sha256_of_layers(self.layers(), self.linear)


def network_files(folder: Path) -> WeightFiles:
    """The files with the weights of the network in a folder in diffusers layout, of a pipeline or of the network alone.

    Raises:
        OSError: there are none, or not all; one line.
        ValueError: an index that makes no sense; one line.
    """
    places = [*(folder / name for name in SUBFOLDERS), folder]
    for place in places:
        if has_weights(place):
            return weight_files(place)
    part = next((place for place in places if place.name in SUBFOLDERS and place.is_dir()), None)
    if part is not None:
        return weight_files(part)  # it says what is missing there
    where = f"{STEM}.safetensors in it or in {' or '.join(SUBFOLDERS)}"
    raise FileNotFoundError(one_line(f"{folder}: this folder holds no network in diffusers layout: there is no {where}"))


def check_output(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], size: int = 0) -> None:
    """Find out before the work whether a file can be written, as far as that can be known.

    Args:
        path: the file to write.
        inputs: files that are read for it, or folders that hold such files.
        size: how many bytes it will have.

    Raises:
        ValueError: it would overwrite an input.
        OSError: its folder does not exist or cannot be written, or the disk has not enough room. Both with a message of
            one line.
    """
    target = Path(os.path.realpath(path))
    for other in inputs:
        if target == Path(os.path.realpath(other)) or (target.exists() and Path(other).exists() and target.samefile(other)):
            raise refusal(path, "the output would overwrite an input: choose another name")
    check_writable(path)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        needed, left = f"{size / 1e9:.2f} GB", f"{free / 1e9:.2f} GB"
        raise OSError(one_line(f"{path}: cannot be written: it needs {needed} and the disk has {left} left"))


def write_stream(
    path: str | os.PathLike[str],
    entries: Iterable[Entry],
    metadata: Mapping[str, str] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a .safetensors file, whole or not at all, with two tensors at a time in memory.

    Args:
        path: the file.
        entries: (name, dtype, shape, function that returns the tensor), in any order.
        metadata: what the file says of itself.
        inputs: files that must not be overwritten.
        progress: called after each tensor with how many bytes of how many are written.

    Raises:
        ValueError: it would overwrite an input, or an entry is not what it said.
        OSError: it cannot be written, or there is not enough room. Both with a message of one line.
    """
    by_name = {name: (dtype, tuple(shape), make) for name, dtype, shape, make in entries}
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape, _) in by_name.items()}
    header, names = encode_header(planned, metadata or {})
    total = sum(tensor.numel() * tensor.element_size() for tensor in planned.values())
    check_output(path, inputs, len(header) + total)
    with atomic_write(path) as file, ThreadPoolExecutor(1) as writer:
        file.write(header)
        written, unsynced, waiting = 0, 0, deque[tuple[Future[None], int]]()
        for name in names:
            dtype, shape, make = by_name[name]
            tensor = make()  # while those before it are being written
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {dtype} {shape} was to be written")
            content = raw_bytes(tensor)
            written, unsynced = written + len(content), unsynced + len(content)
            waiting.append((writer.submit(_write, file, content, sync=unsynced >= _SYNC_EVERY), len(content)))
            unsynced %= _SYNC_EVERY
            while sum(size for _, size in waiting) > _WAITING:
                waiting.popleft()[0].result()
            if progress is not None:
                progress(written, total)
        for writing, _ in waiting:
            writing.result()


def _write(file: BinaryIO, content: memoryview, sync: bool) -> None:
    """Bytes into the file, and now and then on to the disk: waiting for it once at the end takes longer."""
    file.write(content)
    if sync:
        file.flush()
        os.fsync(file.fileno())
