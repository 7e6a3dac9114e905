"""What training changed in the weights: their norms or their directions. The analysis that LoRaD comes from.

A row w of a linear weight (one output) has the norm |w| and the direction w / |w|. Between teacher t and student s

    norm change       | |w_s| - |w_t| | / |w_t|                 in per cent, mean over the rows of a layer
    direction change  | w_s / |w_s| - w_t / |w_t| |             in per cent: the chord, nearly the angle in radians
    energy            sum of the largest 30 % of the squared singular values of D_s - D_t over the sum of all,
                      D being the matrix of a layer's directions: how low the rank of the change is

Rows whose norm is zero in either network are left out. Totals are mean and standard deviation over layers, each
layer counting once. Linear layers only, those that LoRaD turns. Source: section 3 of Wang et al., "WaDi", 2026, for
what is compared; the exact forms are this project's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .extract import comparable_layers
from .rotation import angles
from .weights import Entry, Weights

RANK_SHARE = 0.3


@dataclass(frozen=True)
class LayerChange:
    """How one layer changed.

    Attributes:
        path: canonical path of the layer.
        shape: (out, in).
        norm, direction: mean change over rows, in per cent.
        energy: share of the energy of the directions' change at 30 % of the rank; None if no direction changed.
    """

    path: str
    shape: tuple[int, int]
    norm: float
    direction: float
    energy: float | None


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over layers."""

    mean: float
    std: float


@dataclass(frozen=True)
class Analysis:
    """How a network changed, layer by layer and in total."""

    layers: tuple[LayerChange, ...]

    @property
    def norm(self) -> Spread:
        """Norm change in per cent."""
        return _spread([layer.norm for layer in self.layers])

    @property
    def direction(self) -> Spread:
        """Direction change in per cent."""
        return _spread([layer.direction for layer in self.layers])

    @property
    def energy(self) -> Spread | None:
        """Share of energy at 30 % of the rank; None if no direction changed."""
        energies = [layer.energy for layer in self.layers if layer.energy is not None]
        return _spread(energies) if energies else None


@torch.no_grad()
def analyze(teacher: Weights, student: Weights, progress: Callable[[int, int], None] | None = None) -> Analysis:
    """Compare two networks of one architecture, in any layouts and precisions.

    Args:
        progress: called with the number of layers done, and of all.

    Raises:
        ValueError: networks of different architecture or shapes; one line.
        OSError: a file cannot be read.
    """
    comparable_layers(teacher, student)
    paths = list(teacher.layers())
    layers = []
    for done, path in enumerate(paths):
        if progress:
            progress(done, len(paths))
        layers.append(compare_layer(path, teacher.linear(path), student.linear(path)))
    if progress:
        progress(len(paths), len(paths))
    return Analysis(tuple(layers))


def compare_layer(path: str, teacher: Tensor, student: Tensor) -> LayerChange:
    """The changes of one layer, from its two weights (out, in); computed in float64.

    Raises:
        ValueError: NaN or Inf in a weight; one line.
    """
    teacher, student = teacher.double(), student.double()
    if not (teacher.isfinite().all() and student.isfinite().all()):
        raise ValueError(f"the weight of {path} holds NaN or Inf")
    before, after = teacher.norm(dim=1), student.norm(dim=1)
    there = (before > 0) & (after > 0)
    before, after = before[there], after[there]
    difference = student[there] / after[:, None] - teacher[there] / before[:, None]
    shape = (teacher.shape[0], teacher.shape[1])
    if not there.any():
        return LayerChange(path, shape, 0.0, 0.0, None)
    norm = 100 * float(((after - before).abs() / before).mean())
    direction = 100 * float(difference.norm(dim=1).mean())
    return LayerChange(path, shape, norm, direction, energy_at(difference, RANK_SHARE))


def energy_at(matrix: Tensor, rank_share: float) -> float | None:
    """Share of the squared singular values that the largest of them hold; None for a matrix of zeros.

    Args:
        matrix: (m, n).
        rank_share: which part of all min(m, n) singular values is kept, rounded up.
    """
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)
    total = float(energies.sum())
    return float(energies[: math.ceil(rank_share * len(energies))].sum()) / total if total > 0 else None


def swapped(teacher: Weights, student: Weights, keep: str) -> Iterator[Entry]:
    """The swap experiment: the student with the teacher's norms, or with the teacher's directions.

    Each row of a linear layer gets its norm from one network and its direction from the other; everything else is the
    student's, in the student's layout and types. Rows without length stay the student's.

    Args:
        keep: what stays the student's, ``directions`` (rows get the teacher's norms) or ``norms``.

    Returns:
        Entries for :func:`~.weights.write_stream`; tensors are made when they are asked for.

    Raises:
        ValueError: different networks, another word, or weights with a scale beside them; one line.
    """
    if keep not in ("directions", "norms"):
        raise ValueError(f"either the directions or the norms of the student are kept, not {keep!r}")
    comparable_layers(teacher, student)
    lying: dict[str, list[tuple[str, slice]]] = {}
    for path, place in student.layers().items():
        lying.setdefault(place.name, []).append((path, place.rows or slice(None)))
        if student.scale_of(place.name):
            raise student.refusal(f"{place.name} has a scale beside it: convert it to a plain type first")

    def made(name: str) -> Tensor:
        tensor = student.tensor(name)
        if name not in lying:
            return tensor
        whole = tensor.clone()
        for path, rows in lying[name]:
            own, other = whole[rows].double(), teacher.linear(path).double()
            lengths, directions = (other, own) if keep == "directions" else (own, other)
            whole[rows] = _with_norms_of(lengths, directions, own).to(whole.dtype)
        return whole

    for name in student.names:
        yield name, student.dtype(name), student.shape(name), lambda name=name: made(name)


def _with_norms_of(lengths: Tensor, directions: Tensor, otherwise: Tensor) -> Tensor:
    norms, own = lengths.norm(dim=1, keepdim=True), directions.norm(dim=1, keepdim=True)
    return torch.where((norms > 0) & (own > 0), directions * (norms / own), otherwise)


@dataclass(frozen=True)
class AngleStatistics:
    """Sizes of an adapter's angles in radians.

    Attributes:
        mean, rms, max: of the absolute angles of all layers.
        beyond: the share of them above pi/2, where a pair points away from where it did.
    """

    mean: float
    rms: float
    max: float
    beyond: float


_MOST_ANGLES = 1 << 32  # ten times those of Stable Diffusion 1.5
_ANGLES_AT_ONCE = 1 << 22


@torch.no_grad()
def angle_statistics(factors: Iterable[tuple[Tensor, Tensor]]) -> AngleStatistics:
    """Statistics over all angles of all layers, from the factors (out, r), (r, in/2) of each; some rows at a time.

    Raises:
        ValueError: the factors stand for more angles than any network has; one line.
    """
    pairs = list(factors)
    count, total, squares, largest, beyond = sum(a.shape[0] * b.shape[1] for a, b in pairs), 0.0, 0.0, 0.0, 0
    if count > _MOST_ANGLES:
        raise ValueError(f"these layers have {count:,} angles in all, more than any network: the file's shapes are damaged")
    parts = ((rows, b) for a, b in pairs for rows in a.split(max(1, _ANGLES_AT_ONCE // b.shape[1])))
    for rows, across in parts:
        sizes = angles(rows, across).abs_()
        total += float(sizes.sum(dtype=torch.float64))
        squares += float(sizes.square().sum(dtype=torch.float64))
        largest = max(largest, float(sizes.max()))
        beyond += int((sizes > math.pi / 2).sum())
    return AngleStatistics(total / count, math.sqrt(squares / count), largest, beyond / count)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.pstdev(values))
