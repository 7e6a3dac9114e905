"""The LoRaD object: an adapter's factors and what is known of them, on file and on a network."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import entries
from ..files import RefusedFile, one_line, refusal
from ..schedule import OneStep
from .checkpoint import PICKLE_ENDINGS, read_header, read_pickle, read_tensors, write_safetensors
from .format import AUTHORS_ENDINGS, LORAD_ENDINGS, architecture_of, architecture_of_paths, classify, layer_path, pairs_of_names
from .layers import (
    Network,
    adapter_key,
    detect_architecture,
    layers_of_keys,
    linear_shapes,
    network_sha256,
    student_layers,
)
from .linear import attach, detach, factors_of
from .metadata import Metadata, content_sha256, sd_scripts_hashes
from .rotation import rotate_

Pair = tuple[Tensor, Tensor]

FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANGLE_LIMIT = 2.0**24  # radians; beyond, neighbouring float32 numbers are more than a radian apart


@dataclass(frozen=True)
class Match:
    """How an adapter and a network fit together.

    Attributes:
        paths: adapter key -> path of the network's layer, for each key that has one of the right shape.
        layers: how many layers the adapter has.
        rank: its largest rank.
        architecture: the network's.
        problems: why the adapter must not be used on this network, a line each; none if it may.
        notes: what a user may want to know all the same.
    """

    paths: dict[str, str]
    layers: int
    rank: int
    architecture: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Do nothing if the adapter may be used.

        Raises:
            ValueError: it does not fit the network; one line.
        """
        if self.problems:
            first, *others = self.problems
            more = f" (and {len(others)} more like it)" if others else ""
            raise ValueError(one_line(f"the LoRaD does not fit this network: {first}{more}"))

    def __str__(self) -> str:
        return f"{len(self.paths)} of {self.layers} layers, rank {self.rank}, {self.architecture}"


@dataclass
class LoRaD:
    """A LoRaD adapter: low-rank rotation angles for the linear layers of one network architecture.

    Attributes:
        factors: key of a layer as in the file, without ``.lorad_a`` and ``.lorad_b`` ->
            (theta_a (out, r), theta_b (r, in/2)); r may differ from layer to layer.
        metadata: what is known of it.

    Raises:
        ValueError: no layers, or factors whose shapes or types do not belong together; one line.
    """

    factors: dict[str, Pair]
    metadata: Metadata = field(default_factory=Metadata)

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("a LoRaD needs the factors of at least one layer")
        for key, (a, b) in self.factors.items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or 0 in (*a.shape, *b.shape):
                raise ValueError(f"{key}: factors of shapes {tuple(a.shape)} and {tuple(b.shape)} do not multiply")
            if a.dtype not in FACTOR_DTYPES or b.dtype not in FACTOR_DTYPES:
                raise ValueError(f"{key}: factors must be float32, bfloat16 or float16, not {a.dtype} and {b.dtype}")

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(b.shape[0] for _, b in self.factors.values())

    @property
    def parameters_count(self) -> int:
        """How many numbers it holds."""
        return sum(a.numel() + b.numel() for a, b in self.factors.values())

    @property
    def one_step(self) -> OneStep | None:
        """The schedule of a one-step student; None for an ordinary adapter, which changes no sampling."""
        return self.metadata.one_step

    @classmethod
    def create(
        cls,
        module: nn.Module,
        rank: int,
        architecture: str | None = None,
        layers: Iterable[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> LoRaD:
        """A new adapter that turns nothing yet: theta_a zeros, theta_b xavier-uniform, float32 on the CPU.

        Args:
            module: the network; only the shapes of its layers are looked at.
            rank: of every layer, nominal: it is not lowered where in/2 is smaller.
            architecture: found out if not given.
            layers: paths of the layers to turn; by default the student's.
            generator: of the random numbers.

        Raises:
            ValueError: an unknown network or layer, or an odd number of inputs; one line.
        """
        if rank < 1:
            raise ValueError(f"the rank must be at least 1, not {rank}")
        architecture = architecture or detect_architecture(module)
        shapes = linear_shapes(module)
        factors = {}
        for path in student_layers(module, architecture) if layers is None else layers:
            if path not in shapes:
                raise ValueError(f"{path}: the network has no linear layer of this name")
            out_features, in_features = shapes[path]
            if in_features % 2:
                raise ValueError(f"{path}: {in_features} inputs do not make pairs")
            bound = math.sqrt(6.0 / (rank + in_features // 2))
            theta_b = torch.empty(rank, in_features // 2, device="cpu").uniform_(-bound, bound, generator=generator)
            factors[adapter_key(path, architecture)] = (torch.zeros(out_features, rank, device="cpu"), theta_b)
        return cls(factors, Metadata(architecture=architecture))

    @classmethod
    def from_module(cls, module: nn.Module, name: str = "lorad", metadata: Metadata | None = None) -> LoRaD:
        """The adapter of this name on a network (see :meth:`apply_to`), copied; what a trainer saves.

        Raises:
            ValueError: the network has no such adapter.
        """
        live = factors_of(module, name)
        if not live:
            raise ValueError(f"the network has no adapter named {name!r}")
        metadata = metadata or Metadata(architecture=detect_architecture(module))
        factors = {
            adapter_key(path, metadata.architecture): (a.detach().float().clone(), b.detach().float().clone())
            for path, (a, b) in live.items()
        }
        return cls(factors, metadata)

    # On file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LoRaD:
        """Read an adapter file, or the authors' factors (.safetensors, or .pth with nothing but tensors in it).

        Everything is checked before it is believed; the file is closed and not mapped when this returns.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, not finite, of a newer format, or something else than a LoRaD, which is
                named. Both with a message of one line.
        """
        path = Path(path)
        try:
            if path.suffix.lower() in PICKLE_ENDINGS:
                tensors = read_pickle(path)
                if classify({name: tuple(t.shape) for name, t in tensors.items()}) is LORAD_ENDINGS:
                    raise ValueError("a LoRaD is a .safetensors file; of pickles only the authors' factors are read")
                return _from_authors(tensors)
            header = read_header(path)
            if classify(header.shapes) is AUTHORS_ENDINGS:
                return _from_authors(read_tensors(header))
            names = pairs_of_names(header.places, LORAD_ENDINGS)
            metadata = Metadata.from_strings(header.metadata, architecture_of(names, header.shapes))
            tensors = read_tensors(header)
            expected = header.metadata.get("wadi.sha256")
            if expected is not None and content_sha256(tensors, header.metadata) != expected:
                raise ValueError("the file is damaged: its content is not what its checksum says; download it again")
            return finite(cls({key: (tensors[a], tensors[b]) for key, (a, b) in names.items()}, metadata))
        except RefusedFile:
            raise
        except ValueError as error:
            raise refusal(path, str(error)) from error

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """Write the adapter, whole or not at all.

        Raises:
            OSError: it cannot be written.
            ValueError: numbers that are not finite, or too large for ``dtype``. Both with a message of one line.
        """
        if dtype not in FACTOR_DTYPES:
            raise ValueError(f"an adapter is saved in float32, bfloat16 or float16, not {dtype}")
        path = Path(path)
        cast = {key: (a.detach().to("cpu", dtype), b.detach().to("cpu", dtype)) for key, (a, b) in self.factors.items()}
        finite(LoRaD(cast, self.metadata))
        tensors = {key + ending: cast[key][place] for key in cast for ending, place in LORAD_ENDINGS.items()}
        strings = self.metadata.to_strings(self.rank, path.stem)
        strings |= sd_scripts_hashes(tensors, strings)
        strings["wadi.sha256"] = content_sha256(tensors, strings)
        write_safetensors(path, tensors, strings)

    # On a network

    def matched(self, network: Network) -> Match:
        """How this adapter fits a network, live or by the shapes in its file's header; changes nothing.

        With a live network the note on another base needs a checksum over its weights (a second for SD 1.5); it is
        computed only if the adapter names its base.

        Raises:
            ValueError: not a network that LoRaD is made for; one line.
        """
        match = self._match(network)
        trained_on = self.metadata.base_sha256
        if trained_on is None or match.problems or not isinstance(network, nn.Module):
            return match
        if network_sha256(network, match.architecture) == trained_on:
            return match
        note = "this LoRaD was trained on another base, or on this one in another precision: results will differ"
        return replace(match, notes=(*match.notes, note))

    def _match(self, network: Network) -> Match:
        architecture, shapes = detect_architecture(network), linear_shapes(network)
        own = self.metadata.architecture
        any_unet = own == "unet-custom" and architecture != "pixart-alpha"
        problems = []
        if own != architecture and not any_unet:
            problems.append(f"it is made for {own}, this is {architecture}")
        paths = layers_of_keys(self.factors, network, architecture)
        if not paths:
            problems.append(f"none of its {len(self.factors)} layers is in the network")
        for key, (a, b) in self.factors.items():
            if key not in paths:
                problems.append(f"the network has no layer for {key}")
            elif shapes[paths[key]] != (a.shape[0], 2 * b.shape[1]):
                needed = (a.shape[0], 2 * b.shape[1])
                problems.append(f"{paths[key]} has a weight of shape {shapes[paths[key]]}, it needs {needed}")
                del paths[key]
        return Match(paths, len(self.factors), self.rank, architecture, tuple(problems))

    def apply_to(self, module: nn.Module, strength: float = 1.0, name: str = "lorad") -> None:
        """Put the adapter on a network, live: its base weights stay as they are, bit for bit.

        Several adapters under several names add their angles. At strength 0 the network is the bare base.

        Raises:
            ValueError: it does not fit; one line, and nothing has been changed.
        """
        match = self._match(module)
        match.check()
        attach(module, {path: self.factors[key] for key, path in match.paths.items()}, name, strength)

    def remove(self, module: nn.Module, name: str = "lorad") -> None:
        """Take the adapter off a network again."""
        detach(module, name)

    def fuse_into(self, module: nn.Module, strength: float = 1.0, keep_backup: bool = True) -> Fused:
        """Turn the network's own weights; see :func:`fuse`."""
        return fuse(module, [(self, strength)], keep_backup)


class Fused:
    """What :func:`fuse` did to a network, to be undone by :meth:`restore`."""

    def __init__(self) -> None:
        self._backup: dict[str, tuple[nn.Parameter, Tensor | None]] = {}

    @property
    def layers(self) -> list[str]:
        """Paths of the layers whose weights are turned."""
        return list(self._backup)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the very bits of the original weights back; a second time it does nothing.

        Raises:
            ValueError: no backup was kept.
        """
        kept = [(weight, original) for weight, original in self._backup.values() if original is not None]
        if len(kept) < len(self._backup):
            raise ValueError("no backup was kept: load the network again")
        for weight, original in kept:
            weight.copy_(original)
        self._backup = {}


@torch.no_grad()
def fuse(module: nn.Module, stack: Iterable[tuple[LoRaD, float]], keep_backup: bool = True) -> Fused:
    """Turn a network's own weights by the summed angles of adapters, (LoRaD, strength) each.

    Each weight is rounded to its type once, however many adapters there are. At strength 0 nothing is touched.

    Args:
        keep_backup: keep the original weights in main memory, so that :meth:`Fused.restore` can put them back.

    Raises:
        ValueError: an adapter does not fit, or they do not belong together; one line, and nothing has been changed.
    """
    stack = [(lorad, number) for lorad, strength in stack if (number := entries.strength(strength)) != 0.0]
    check_together(lorad for lorad, _ in stack)
    parts: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for lorad, strength in stack:
        match = lorad._match(module)
        match.check()
        for key, path in match.paths.items():
            parts.setdefault(path, []).append((*lorad.factors[key], strength))
    fused = Fused()
    try:
        for path, factors in parts.items():
            weight = module.get_parameter(f"{path}.weight")
            fused._backup[path] = (weight, weight.detach().to("cpu", copy=True) if keep_backup else None)
            rotate_(weight, factors)
    except BaseException:  # out of memory, or interrupted: not half of it
        if keep_backup:
            fused.restore()
        raise
    return fused


def check_together(adapters: Iterable[LoRaD]) -> OneStep | None:
    """The one-step schedule that adapters share; None if none of them is a one-step student.

    Leave out those of strength 0: they touch neither weights nor sampling.

    Raises:
        ValueError: they disagree on alpha_T^2, timestep or prediction type, so no sampling suits them all.
    """
    adapters = list(adapters)
    schedules = list(dict.fromkeys(lorad.one_step for lorad in adapters if lorad.one_step is not None))
    if len(schedules) > 1:
        said = " and ".join(f"({', '.join(map(str, vars(schedule).values()))})" for schedule in schedules[:2])
        raise ValueError(f"these LoRaDs cannot be used together: their one-step schedules differ, {said}")
    predictions = sorted({lorad.metadata.prediction_type for lorad in adapters})
    if len(predictions) > 1:
        raise ValueError(f"these LoRaDs cannot be used together: they are for {' and '.join(predictions)} networks")
    return schedules[0] if schedules else None


def _from_authors(tensors: Mapping[str, Tensor]) -> LoRaD:
    """The authors' factors, named by canonical layer paths. They are one-step students with the default schedule."""

    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise ValueError("factors must be floating-point numbers")
    renamed = {layer_path(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise ValueError("two tensors name the same layer")
    names = pairs_of_names(renamed, AUTHORS_ENDINGS)
    architecture = architecture_of_paths(names, {name: tuple(tensor.shape) for name, tensor in renamed.items()})
    factors = {adapter_key(path, architecture): (renamed[a].float(), renamed[b].float()) for path, (a, b) in names.items()}
    schedule = OneStep()
    return finite(LoRaD(factors, Metadata(architecture, schedule.alpha_T_squared, schedule.timestep)))


def finite(lorad: LoRaD) -> LoRaD:
    """The adapter itself, if all of its angles are numbers that mean something.

    Raises:
        ValueError: NaN, Inf, or factors so large that their product could overflow.
    """
    for key, (a, b) in lorad.factors.items():
        largest = a.abs().amax().item() * b.abs().amax().item() * b.shape[0]
        if not largest < ANGLE_LIMIT:  # a NaN is less than nothing, so it ends here too
            raise ValueError(f"the layer {key[:80]!r} holds NaN, Inf or absurdly large numbers")
    return lorad
