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

from .. import configs, mini
from ..files import RefusedFile, atomic_write, one_line, refusal
from .checkpoint import (
    DTYPES,
    PICKLE_ENDINGS,
    Header,
    encode_header,
    raw_bytes,
    read_header,
    read_pickle,
    read_tensors,
)
from .layers import sha256_of_layers
from .layouts import Layout, Place, detect
from .quantised import dequantise, scale_name

# A tensor to be written: name, type, shape, and a function that returns it when its turn has come.
Entry = tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]

STEM = "diffusion_pytorch_model"
SUBFOLDERS = ("unet", "transformer")
_SYNC_EVERY = 1 << 28  # bytes
_WAITING = 1 << 26  # bytes of tensors that may wait for the disk


class Weights:
    """The tensors of a state dict, and where in it a network's linear layers are.

    Attributes:
        layout: names and places of the layers.
        metadata: what the file says of itself; empty for a state dict in memory.
        files: the files that the tensors are read from.
        source: what was opened, for messages.
        folder: the folder that was opened; None for a file or a state dict.
    """

    def __init__(
        self, holders: Mapping[str, Header | Tensor], metadata: Mapping[str, str], source: str, folder: Path | None = None
    ) -> None:
        self._holders = dict(holders)
        self.metadata = dict(metadata)
        self.source = source
        self.folder = folder
        self.files = tuple(dict.fromkeys(holder.path for holder in self._holders.values() if isinstance(holder, Header)))
        self.layout: Layout = detect({name: self.shape(name) for name in self._holders})

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
        files = network_files(place) if folder else [place]
        try:
            if files[0].suffix.lower() in PICKLE_ENDINGS:
                return cls(read_pickle(files[0]), {}, str(path), folder)
            headers = [read_header(file) for file in files]
            holders = {name: header for header in headers for name in header.places}
            if len(holders) < sum(len(header.places) for header in headers):
                raise ValueError("two of its files hold the same tensor")
            return cls(holders, headers[0].metadata, str(path), folder)
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

    @property
    def names(self) -> list[str]:
        """Names of all tensors, those of other parts in the same file too."""
        return list(self._holders)

    def shape(self, name: str) -> tuple[int, ...]:
        holder = self._holders[name]
        return holder.places[name].shape if isinstance(holder, Header) else tuple(holder.shape)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor.

        Raises:
            ValueError: one that this program does not know.
        """
        holder = self._holders[name]
        if isinstance(holder, Tensor):
            return holder.dtype
        if holder.places[name].dtype not in DTYPES:
            raise refusal(holder.path, f"{name[:80]!r} is of the unknown type {holder.places[name].dtype[:20]!r}")
        return DTYPES[holder.places[name].dtype]

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored: from a file a copy of its own, from a state dict the tensor itself.

        Raises:
            OSError, ValueError: the file has gone or changed; one line.
        """
        holder = self._holders[name]
        return read_tensors(holder, [name])[name] if isinstance(holder, Header) else holder.detach()

    def file_of(self, name: str) -> Path | None:
        """The file that holds a tensor; None in memory."""
        holder = self._holders[name]
        return holder.path if isinstance(holder, Header) else None

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

    def values(self, name: str) -> Tensor:
        """A tensor as :meth:`linear` gives it: with its scale, if there is one.

        Raises:
            ValueError: its numbers are stored in a way that this program does not know; one line.
        """
        weight, scale = self.tensor(name), scale_name(name, self._holders)
        if not weight.is_floating_point():
            raise self.refusal(f"{name} is stored as {weight.dtype}, not as floating-point numbers")
        try:
            return weight if scale is None else dequantise(weight, self.tensor(scale))
        except ValueError as error:
            raise self.refusal(f"{name}: {error}") from error

    def scale_of(self, name: str) -> str | None:
        """The name of the scale that belongs to a tensor; None if there is none."""
        return scale_name(name, self._holders)

    def sha256(self) -> str:
        """:func:`~.layers.network_sha256` of the network: what an adapter knows its base by, in any layout."""
        return sha256_of_layers(self.layers(), self.linear)

    def refusal(self, why: str) -> RefusedFile:
        """The error, to be raised, that says in one line what is wrong with these weights."""
        return refusal(self.source, why)


def network_files(folder: Path) -> list[Path]:
    """The files with the weights of the network in a folder in diffusers layout.

    Raises:
        OSError: there are none; one line.
        ValueError: an index that makes no sense; one line.
    """
    for place in (*(folder / name for name in SUBFOLDERS), folder):
        for name in (f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"):
            if (place / name).is_file():
                return [place / name]
        for name in (f"{STEM}.safetensors.index.json", f"{STEM}.safetensors.index.fp16.json"):
            if (place / name).is_file():
                return _shards(place / name)
        if (place / f"{STEM}.bin").is_file():
            return [place / f"{STEM}.bin"]
    where = f"{STEM}.safetensors in it or in {' or '.join(SUBFOLDERS)}"
    raise FileNotFoundError(one_line(f"{folder}: this folder holds no network in diffusers layout: there is no {where}"))


def _shards(index: Path) -> list[Path]:
    table = configs.read(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise refusal(index, "this index does not say which file holds which tensor")
    return [index.parent / Path(name).name for name in sorted(set(table.values()))]


def check_output(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], size: int = 0) -> None:
    """Find out before the work whether a file can be written, as far as that can be known.

    Args:
        path: the file to write.
        inputs: files that are read for it, or folders that hold such files.
        size: how many bytes it will have.

    Raises:
        ValueError: it would overwrite an input.
        OSError: its folder does not exist, or the disk has not enough room. Both with a message of one line.
    """
    target = Path(os.path.realpath(path))
    for other in inputs:
        if target == Path(os.path.realpath(other)) or (target.exists() and Path(other).exists() and target.samefile(other)):
            raise refusal(path, "the output would overwrite an input: choose another name")
    if target.is_dir():
        raise IsADirectoryError(one_line(f"{path}: this is a folder, a file name is needed"))
    if not target.parent.is_dir():
        raise FileNotFoundError(one_line(f"{path}: cannot be written: the folder does not exist"))
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
