"""Tensors as they are stored, in files or in memory: read one at a time, and refused where they are no plain numbers.

A NaN in one weight makes every picture black, and codes read without their scale make noise of it. Neither shows in
the names and shapes of a file, so each tensor is looked at when it is read: a single pass over numbers that have just
come from the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..files import RefusedFile, one_line, refusal
from .checkpoint import DTYPES, PICKLE_ENDINGS, Header, read_header, read_pickle, read_tensors
from .leftovers import is_harmless
from .quantised import FLOAT8, dequantise, scale_name

Holders: TypeAlias = Mapping[str, "Header | Tensor"]

# Root mean square of a weight, above which float8 numbers are codes: networks are trained to weights far below 1.
CODES_ABOVE = 2.0


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is NaN or Inf; integers are always finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    plain = tensor.float() if tensor.dtype in FLOAT8 else tensor
    low, high = plain.aminmax()  # a NaN anywhere is both; isfinite() would take thirty times as long
    return bool(low.isfinite() and high.isfinite())


def open_files(paths: Iterable[Path]) -> tuple[dict[str, Header | Tensor], dict[str, str]]:
    """What holds each tensor of some files, and what the first of them says of itself.

    Only headers are read of .safetensors files; pickles of plain tensors are read whole and say nothing.

    Raises:
        OSError, ValueError: a file is missing or damaged, or two of them hold the same tensor; one line.
    """
    holders: dict[str, Header | Tensor] = {}
    metadata: dict[str, str] | None = None
    for path in paths:
        own: dict[str, Header | Tensor]
        said: dict[str, str]
        if path.suffix.lower() in PICKLE_ENDINGS:
            own, said = {**read_pickle(path)}, {}
        else:
            header = read_header(path)
            own, said = {name: header for name in header.places}, header.metadata
        if twice := holders.keys() & own.keys():
            raise refusal(path, f"two of its files hold the same tensor: {min(twice)}")
        holders |= own
        metadata = said if metadata is None else metadata
    return holders, metadata or {}


class Stored:
    """Named tensors, each read when it is asked for.

    Attributes:
        metadata: what the file says of itself; empty for a state dict in memory.
        files: the files that the tensors are read from.
        source: what was opened, for messages.
    """

    def __init__(self, holders: Holders, metadata: Mapping[str, str], source: str | os.PathLike[str]) -> None:
        self._holders = dict(holders)
        self.metadata = dict(metadata)
        self.source = str(source)
        self.files = tuple(dict.fromkeys(holder.path for holder in self._holders.values() if isinstance(holder, Header)))

    @property
    def names(self) -> list[str]:
        """Names of all tensors, those of other parts in the same file too."""
        return list(self._holders)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self._holders}

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
            OSError, ValueError: the file has gone or changed, or a number in it is NaN or Inf; one line.
        """
        tensor = self._read(name)
        if not is_finite(tensor):
            raise self.refusal(f"{name} holds NaN or Inf: the file was written by a bad merge or training, take another copy")
        return tensor

    def _read(self, name: str) -> Tensor:
        holder = self._holders[name]
        return read_tensors(holder, [name])[name] if isinstance(holder, Header) else holder.detach()

    def file_of(self, name: str) -> Path | None:
        """The file that holds a tensor; None in memory."""
        holder = self._holders[name]
        return holder.path if isinstance(holder, Header) else None

    def values(self, name: str) -> Tensor:
        """The numbers that a tensor stands for: in the type that it is stored in, or codes times their scale in float32.

        Raises:
            OSError: as of :meth:`tensor`.
            ValueError: NaN or Inf, or numbers stored in a way that this program does not know; one line.
        """
        weight, scale = self.checked(name), self.scale_of(name)
        if scale is None:
            return weight
        factor = self.tensor(scale)
        try:
            values = dequantise(weight, factor)
        except ValueError as error:
            raise self.refusal(f"{name}: {error}") from error
        if not is_finite(values):
            raise self.refusal(f"{name} has Inf among its codes times {scale}: the scale is damaged, take another copy")
        return values

    def checked(self, name: str) -> Tensor:
        """One tensor as it is stored, which is refused where its numbers are none of :meth:`values`.

        What says nothing of the picture may be of any kind, and a scale is no weight.

        Raises:
            OSError, ValueError: as :meth:`values`.
        """
        self.check_dtype(name)
        tensor = self.tensor(name)
        codes = tensor.dtype in FLOAT8 and tensor.ndim > 1 and self.scale_of(name) is None and not is_harmless(name)
        if codes and _root_mean_square(tensor) > CODES_ABOVE:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise self.refusal(f"{name} is stored as {kind} codes without their scale, which a .scale_weight would hold")
        return tensor

    def check_dtype(self, name: str) -> None:
        """Do nothing if a tensor is stored as floating-point numbers, or says nothing of the picture.

        Raises:
            ValueError: it is not; one line.
        """
        if not self.dtype(name).is_floating_point and not is_harmless(name):
            kind = str(self.dtype(name)).removeprefix("torch.")
            raise self.refusal(f"{name} is stored as {kind}, not as floating-point numbers: quantised weights are not read")

    def scale_of(self, name: str) -> str | None:
        """The name of the scale that belongs to a tensor; None if there is none."""
        return scale_name(name, self._holders)

    def refusal(self, why: str) -> RefusedFile:
        """The error, to be raised, that says in one line what is wrong with these weights."""
        return refusal(one_line(self.source), why)


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())
