"""Adapters merged into the weights of a base: the same layout, types and metadata, layer by layer.

A layer's weight is turned once by the summed angles of all adapters, in float32, and rounded once to the type that it
is stored in. What the adapters do not turn keeps its bits.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import entries
from ..files import one_line
from ..schedule import OneStep
from . import kinds
from .adapter import LoRaD, check_together
from .checkpoint import PICKLE_ENDINGS
from .folders import STEM, WeightFiles
from .layers import SUPPORTED
from .metadata import Metadata, schedule_strings
from .quantised import FLOAT8, cast, quantise
from .rotation import Factors, rotate_, working_dtype
from .weights import Entry, Weights, check_output, write_stream

Stack = Sequence[tuple[LoRaD | str | os.PathLike[str], float]]
Progress = Callable[[int, int], None]  # bytes written, bytes in all

# What a file says of its own bytes, which are others after the merge.
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "wadi.sha256")
_ENTRIES = ("input_blocks.0.0.weight", "conv_in.weight")  # the convolution that lets the picture into a U-Net
_WEIGHT_ENDINGS = (".safetensors", ".msgpack", ".onnx", ".onnx_data", *PICKLE_ENDINGS)

# Name of a tensor -> rows of it (None for all) and the factors that turn them.
_Turns = dict[str, list[tuple[slice | None, list[Factors]]]]


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        output: the file, or the folder.
        layers: how many layers were turned.
        layout: architecture and layout, in words.
    """

    output: Path
    layers: int
    layout: str


def merge(
    base: Weights | str | os.PathLike[str],
    adapters: Stack,
    output: str | os.PathLike[str],
    stochastic: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Turn a base's weights by adapters and write the result, whole or not at all, with a few layers in memory.

    The base's metadata is kept. Where an adapter is a one-step student, its schedule is added, so that the pipeline
    and the hosts know the result as a one-step network.

    Args:
        base: what :meth:`Weights.open` reads, or what it returned.
        adapters: (LoRaD or its file, strength) of each; at strength 0 an adapter changes nothing.
        output: a ``.safetensors`` file; for a base that is a folder in diffusers layout also a folder that does not
            exist yet, which gets all of the base's other parts too.
        stochastic: round by chance, right on average, instead of to the nearest.
        progress: called with the bytes written and those to be written.

    Raises:
        OSError: something cannot be read or written, or there is no room.
        ValueError: an adapter does not fit, the adapters do not belong together, or the output would overwrite an
            input. Both with a message of one line.
    """
    weights = base if isinstance(base, Weights) else Weights.open(base)
    _check_base(weights)
    files = [adapter for adapter, _ in adapters if not isinstance(adapter, LoRaD)]
    output = Path(output)
    inputs = [*weights.files, *files, *([weights.folder] if weights.folder else [])]
    as_file = output.suffix.lower() == ".safetensors"
    if as_file:
        check_output(output, inputs)
    elif weights.folder is None:
        raise ValueError(one_line(f"{output}: the base is one file, and so is the result: its name must end in .safetensors"))
    stack = [(adapter if isinstance(adapter, LoRaD) else LoRaD.load(adapter), strength) for adapter, strength in adapters]
    layers, metadata = factors_by_layer(weights, stack), merged_metadata(weights, stack)
    entries = list(_entries(weights, _turns_of_tensors(weights, layers), stochastic))
    if as_file:
        write_stream(output, entries, metadata, inputs, progress)
    else:
        _write_folder(weights, output, entries, metadata, progress)
    return Merged(output, len(layers), str(weights.layout))


def merged_tensors(
    base: Weights, adapters: Iterable[tuple[LoRaD, float]], stochastic: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Name and new value of every tensor that adapters change, one after another; the base's own are left alone.

    Raises:
        ValueError: an adapter does not fit, or they do not belong together; one line.
    """
    for name, parts in _turns_of_tensors(base, factors_by_layer(base, adapters)).items():
        yield from _turned(base, name, parts, stochastic).items()


def merged_metadata(base: Weights, adapters: Sequence[tuple[LoRaD, float]]) -> dict[str, str]:
    """The base's metadata, and what the adapters add to it.

    Raises:
        ValueError: the adapters do not belong together, or both they and the base are one-step; one line.
    """
    active = [(adapter, strength) for adapter, strength in adapters if strength != 0.0]
    one_step = check_together(adapter for adapter, _ in active)
    if one_step and _one_step_of(base):
        raise ValueError("a one-step LoRaD is made for a multi-step base, and this base is a one-step network already")
    strings = {key: value for key, value in base.metadata.items() if key not in _STALE} if active else dict(base.metadata)
    if active:
        said = [f"{adapter.metadata.title or 'untitled'} ({strength:g})" for adapter, strength in active]
        strings["wadi.merged"] = " + ".join([*([strings["wadi.merged"]] if "wadi.merged" in strings else []), *said])
    if one_step:
        strings |= schedule_strings(one_step)
    return strings


def _check_base(base: Weights) -> None:
    """Raises ValueError if the result would be a base that cannot be drawn, by what names, types and shapes tell."""
    for name in base.names:
        base.check_dtype(name)
    entries = (base.layout.prefix + name for name in _ENTRIES)
    entry = next((base.shape(name) for name in entries if name in base.shapes), ())
    if len(entry) == 4 and entry[1] != 4:
        raise base.refusal(f"this is a U-Net {kinds.of_inputs(entry[1])}; supported are {SUPPORTED}")


def _check_prediction(base: Weights, adapters: Sequence[LoRaD]) -> None:
    said = base.prediction_type
    for adapter in adapters:
        if said not in (None, adapter.metadata.prediction_type):
            raise base.refusal(f"this base predicts {said}, and the LoRaD is for {adapter.metadata.prediction_type}")


def _one_step_of(base: Weights) -> OneStep | None:
    try:
        return Metadata.from_strings(base.metadata).one_step
    except ValueError as error:
        raise base.refusal(str(error)) from None


def factors_by_layer(base: Weights, adapters: Iterable[tuple[LoRaD, float]]) -> dict[str, list[Factors]]:
    """Canonical path of each layer that adapters turn -> the factors that do it; those of strength 0 do nothing.

    Raises:
        ValueError: an adapter does not fit, they do not belong together, or a strength is none; one line.
    """
    active = [(adapter, number) for adapter, strength in adapters if (number := entries.strength(strength)) != 0.0]
    check_together(adapter for adapter, _ in active)
    _check_prediction(base, [adapter for adapter, _ in active])
    layers: dict[str, list[Factors]] = {}
    for adapter, strength in active:
        match = adapter.matched(base.layout.network)
        match.check()
        for key, path in match.paths.items():
            layers.setdefault(path, []).append((*adapter.factors[key], strength))
    return layers


def _turns_of_tensors(base: Weights, layers: dict[str, list[Factors]]) -> _Turns:
    """What has to be done to which tensor: it can hold several layers."""
    turns: _Turns = {}
    for path, factors in layers.items():
        place = base.layout.places[path]
        turns.setdefault(place.name, []).append((place.rows, factors))
    return turns


def _turned(base: Weights, name: str, parts: list[tuple[slice | None, list[Factors]]], stochastic: bool) -> dict[str, Tensor]:
    """The new value of a tensor, and of its scale where there is one."""
    dtype, scale = base.dtype(name), base.scale_of(name)
    in_place = dtype not in FLOAT8 and scale is None and not stochastic
    values = base.values(name)
    if in_place:
        values = values.clone() if base.file_of(name) is None else values
    else:
        values = values.to(working_dtype(values), copy=True)
    for rows, factors in parts:
        rotate_(values[rows or slice(None)], factors)
    if in_place:
        return {name: values}
    seed = zlib.crc32(name.encode()) if stochastic else None
    if scale is None:
        return {name: cast(values, dtype, seed)}
    codes, new_scale = quantise(values, base.tensor(scale), dtype, seed)
    return {name: codes, scale: new_scale}


def _entries(base: Weights, turns: _Turns, stochastic: bool) -> Iterator[Entry]:
    """Every tensor of the base, those that are turned as they will be."""
    owner = {scale: name for name in turns if (scale := base.scale_of(name))}
    for name in base.names:
        turned = owner.get(name, name)

        def make(name: str = name, turned: str = turned) -> Tensor:
            return _turned(base, turned, turns[turned], stochastic)[name] if turned in turns else base.checked(name)

        yield name, base.dtype(name), base.shape(name), make


def _write_folder(
    base: Weights, output: Path, entries: list[Entry], metadata: dict[str, str], progress: Progress | None
) -> None:
    """A folder like the base's, its network's weights replaced; it appears under its name when all of it is there."""
    if output.exists():
        raise FileExistsError(one_line(f"{output}: there is something of this name already: choose another one"))
    folder, found = base.folder, base.found
    if folder is None or found is None:
        raise ValueError(one_line(f"{output}: a folder is written only where the base is one"))
    network = found.files[0].parent
    others = [path for path in sorted(folder.rglob("*")) if path.is_file() and _belongs(path, folder, found)]
    total = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape, _ in entries)
    check_output(output, [folder], total + sum(path.stat().st_size for path in others))
    temporary = output.resolve().with_name(f".wadi-{secrets.token_hex(8)}.tmp")
    try:
        for path in others:
            target = temporary / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        place = temporary / network.relative_to(folder)
        place.mkdir(parents=True, exist_ok=True)
        written = 0
        for file in base.files or (None,):
            part = [entry for entry in entries if base.file_of(entry[0]) == file]

            def so_far(done: int, _: int, before: int = written) -> None:
                if progress is not None:
                    progress(before + done, total)

            write_stream(place / (file.name if file else f"{STEM}.safetensors"), part, metadata, progress=so_far)
            written += sum(math.prod(shape) * dtype.itemsize for _, dtype, shape, _ in part)
        os.replace(temporary, output)
    except OSError as error:
        raise OSError(one_line(f"{output}: cannot be written: {error.strerror or error}")) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _belongs(path: Path, folder: Path, found: WeightFiles) -> bool:
    """Whether a file of the base's folder goes into the merged one as it is.

    Not the network's weights, in whatever form, and no checkpoints beside the parts: these would be the base's own. Of
    the lists of shards only the one of those that are written, which a pickle's are not.
    """
    network = found.files[0].parent
    if path.suffix == ".py" or any(part.startswith((".", "__")) for part in path.relative_to(folder).parts):
        return False
    if path.parent == network and ".index" in path.name:
        return path == found.index and found.files[0].suffix == ".safetensors"
    return path.parent not in (folder, network) or not path.name.lower().endswith(_WEIGHT_ENDINGS)
