"""Reading and writing files of tensors, trusting nothing that a file says.

A .safetensors file is 8 bytes with the length of a header, the header in JSON (name -> dtype, shape, place), and the
bytes of the tensors. It is read here without mapping it: tensors are copies of their own, so the file can be
replaced or deleted while they live (Windows refuses that for a mapped file), and only what is wanted is read.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..files import atomic_write, existing_file, refusal

HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors library
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PICKLE_ENDINGS = (".pth", ".pt", ".bin", ".ckpt")

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlace:
    """What a header says of one tensor: ``dtype`` as safetensors names it, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a .safetensors file holds, its tensors in the order of their bytes."""

    path: Path
    metadata: dict[str, str]
    places: dict[str, TensorPlace]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self.places.items()}


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a .safetensors file; no tensor is read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no whole, well-formed .safetensors file. Both with a message of one line.
    """
    path = existing_file(path)
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        _refuse_pointer(path, file)
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if total < 10 or length < 2:
            raise refusal(path, "this is no .safetensors file: it is too short")
        if length > HEADER_LIMIT or file.read(1) != b"{":
            raise refusal(path, "this is no .safetensors file: it does not start with the header of one")
        if length > total - 8:
            raise refusal(path, "the file is cut short inside its header: copy or download it again")
        text = b"{" + file.read(length - 1)
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refusal(path, "the header is damaged: its metadata is not a table of strings")
    places = [(name, _place(path, name, entry, 8 + length)) for name, entry in entries.items()]
    places.sort(key=lambda item: (item[1].offset, item[1].size))
    end = 8 + length
    for name, place in places:
        if place.offset != end:
            raise refusal(path, f"the header is damaged: the bytes of {name[:80]!r} are not where they should be")
        end += place.size
    if end > total:
        raise refusal(path, f"the file is cut short: {end - total} bytes are missing: copy or download it again")
    if end < total:
        raise refusal(path, f"the file is damaged: {total - end} bytes too many at its end")
    return Header(path, metadata, dict(places))


def _refuse_pointer(path: Path, file: BinaryIO) -> None:
    """Raises ValueError if the file is what git leaves in the place of a large file that it did not fetch."""
    if file.read(len(LFS_POINTER)) == LFS_POINTER:
        raise refusal(path, "this is a git-lfs pointer, not the file itself: run 'git lfs pull', or download the file")
    file.seek(0)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """The header as a dictionary; JSON that other readers could take in another way is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError("a name occurs twice")
        for text in (*table, *table.values()):
            if isinstance(text, str):
                text.encode()  # half a surrogate pair is no text: UnicodeEncodeError, a ValueError
        return table

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"the header is damaged: {error}") from None
    if not isinstance(entries, dict):
        raise refusal(path, "the header is damaged: it is not a table")
    return entries


def _place(path: Path, name: str, entry: object, start: int) -> TensorPlace:
    """A tensor's entry, checked as far as it can be without the others."""
    bad = refusal(path, f"the header is damaged: what it says of {name[:80]!r} makes no sense")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise bad
    size = offsets[1] - offsets[0]
    if size < 0 or len(shape) > 64 or math.prod(count or 1 for count in shape) >= 1 << 63:
        raise bad
    if dtype in DTYPES and size != math.prod(shape) * DTYPES[dtype].itemsize:
        raise bad
    return TensorPlace(dtype, tuple(shape), start + offsets[0], size)


def _is_counts(value: object) -> bool:
    """Whether this is a list of numbers from 0 to 2^63 - 1 (True and 1.0 are none in JSON)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def read_tensors(header: Header, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a file, by default all, as copies of their own on the CPU.

    Raises:
        OSError: the file cannot be read.
        ValueError: a tensor's type is none that this program knows, or the file has changed since.
    """
    tensors = {}
    with open(header.path, "rb") as file:
        for name in header.places if names is None else dict.fromkeys(names):
            place = header.places[name]
            if place.dtype not in DTYPES:
                raise refusal(header.path, f"{name[:80]!r} is of the unknown type {place.dtype[:20]!r}")
            data = torch.empty(place.size, dtype=torch.uint8)
            file.seek(place.offset)
            if file.readinto(data.numpy().data) != place.size:
                raise refusal(header.path, "the file has become shorter while it was read")
            tensors[name] = data.view(DTYPES[place.dtype]).reshape(place.shape)
    return tensors


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a file holds them: little-endian, row by row."""
    if sys.byteorder != "little":
        raise ValueError("files of tensors are written on little-endian machines only")
    flat = tensor.detach().to("cpu").contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def encode_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The first bytes of a .safetensors file, and its tensors' names in the order of their bytes.

    That order is the safetensors library's (large types first, then by name), and so is the length of the header;
    unlike there the metadata is sorted too, so that the same content gives the same file.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: tensors of type {tensor.dtype} cannot be written")
        end += tensor.numel() * tensor.element_size()
        table[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a .safetensors file, whole or not at all, without a second copy of the tensors in memory.

    Raises:
        OSError: it cannot be written; one line, and what was there before is still there.
    """
    header, names = encode_header(tensors, metadata or {})
    with atomic_write(path) as file:
        file.write(header)
        for name in names:
            file.write(raw_bytes(tensors[name]))


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A .pth file of named tensors; nothing in it is executed.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a pickle of plain tensors. Both with a message of one line.
    """
    path = existing_file(path)
    with open(path, "rb") as file:
        _refuse_pointer(path, file)
    loaded = unpickle(path, "this is no pickle of plain tensors (nothing else is loaded), or it is damaged")
    if not isinstance(loaded, dict) or not loaded:
        raise refusal(path, "this pickle is not a table of named tensors")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_plain(tensor):
            raise refusal(path, f"this pickle is not a table of plain tensors: see {str(name)[:80]!r}")
    return {name: tensor.detach() for name, tensor in loaded.items()}


def unpickle(path: str | os.PathLike[str], otherwise: str) -> Any:
    """What torch saved in a file, on the CPU: tensors and plain values; nothing in it is executed.

    Args:
        otherwise: what a file is told that is damaged or holds more than that.

    Raises:
        OSError: the file cannot be read.
        ValueError: ``otherwise``. Both with a message of one line.
    """
    path = existing_file(path)
    try:
        if _grows(path):
            raise ValueError("it would take more memory than it has bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says what it thinks of a strange file before it refuses it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything, and all of it means this one thing
        if isinstance(error, OSError) and error.filename is not None:  # it was not opened at all
            raise
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a place before the file's start
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise refusal(path, otherwise) from error


def _grows(path: Path) -> bool:
    """Whether reading a pickle can take far more memory than the file has bytes.

    That is an archive of packed parts, where torch packs nothing; and ``bytearray(n)``, the one call that torch's
    reader of plain values allows and that fills memory with as many zeros as it is told. No state dict has one.
    """
    greedy = b"bytearray"
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                pickles = [part for part in parts if part.filename.endswith(".pkl")]
                return sum(part.file_size for part in parts) > size or any(greedy in archive.read(part) for part in pickles)
        except zipfile.BadZipFile:  # the older format of torch, or no pickle at all
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(greedy) >= 0


def _is_plain(tensor: Tensor) -> bool:
    """Dense, on the CPU and as large as it says: a view with stride 0 can claim any size."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
