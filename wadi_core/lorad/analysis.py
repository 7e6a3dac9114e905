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

import io
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files import atomic_write
from .extract import comparable_layers
from .rotation import angles
from .weights import Entry, Weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


@torch.no_grad()
def angle_statistics(factors: Iterable[tuple[Tensor, Tensor]]) -> AngleStatistics:
    """Statistics over all angles of all layers, from the factors (out, r), (r, in/2) of each."""
    count, total, squares, largest, beyond = 0, 0.0, 0.0, 0.0, 0
    for a, b in factors:
        sizes = angles(a, b).abs_()
        count += sizes.numel()
        total += float(sizes.sum(dtype=torch.float64))
        squares += float(sizes.square().sum(dtype=torch.float64))
        largest = max(largest, float(sizes.max()))
        beyond += int((sizes > math.pi / 2).sum())
    return AngleStatistics(total / count, math.sqrt(squares / count), largest, beyond / count)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.pstdev(values))


# The picture

INK, QUIET, GRID = "#1f2933", "#6b7785", "#e4e8ec"
KINDS = {
    "self-attention": "#2f6fb5",
    "cross-attention": "#d1682b",
    "feed-forward": "#3d9a6b",
    "other": "#8a6bb0",
}


def kind_of(path: str) -> str:
    """What a layer does, as the picture colours it: one of :data:`KINDS`."""
    parts = {"attn1": "self-attention", "attn2": "cross-attention", "ff": "feed-forward"}
    return next((kind for part, kind in parts.items() if f".{part}." in path), "other")


def plot(analysis: Analysis, path: str | os.PathLike[str], title: str = "What distillation changed") -> Path:
    """Write :func:`picture` as a file.

    Raises:
        OSError: it cannot be written; one line.
    """
    content = picture(analysis, title)
    with atomic_write(path) as file:
        file.write(content)
    return Path(path)


def picture(analysis: Analysis, title: str) -> bytes:
    """An analysis drawn as the paper's motivation figure is drawn: a PNG with two panels.

    Left, each layer's norm change against its direction change, with the means over all layers; right, the energy at
    30 % of the rank, layer by layer in the network's order. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    scatter, row = figure.subplots(1, 2, width_ratios=(1, 1.25))
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold", x=0.01, ha="left")
    _draw_scatter(scatter, analysis)
    _draw_energy(row, analysis)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_scatter(axes: Axes, analysis: Analysis) -> None:
    _plain(axes, "norm against direction, a dot a layer")
    for kind, colour in KINDS.items():
        layers = [layer for layer in analysis.layers if kind_of(layer.path) == kind]
        points = [layer.direction for layer in layers], [layer.norm for layer in layers]
        if layers:
            axes.scatter(*points, s=16, color=colour, alpha=0.75, linewidths=0, label=kind)
    norm, direction = analysis.norm, analysis.direction
    axes.axhline(norm.mean, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.axvline(direction.mean, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    means = f"mean of all layers\nnorm {norm.mean:.2f} %, direction {direction.mean:.2f} %"
    axes.scatter([direction.mean], [norm.mean], s=110, marker="*", color=INK, zorder=3, label=means)
    # One scale for both, so that how far apart they are is seen; a network turned by LoRaD lies on the floor.
    most = max(*(max(layer.norm, layer.direction) for layer in analysis.layers), 1e-9) * 1.08
    axes.set_xlim(0, most)
    axes.set_ylim(-0.02 * most, most)
    axes.set_xlabel("direction change, %", color=INK)
    axes.set_ylabel("norm change, %", color=INK)
    axes.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=0.9, fontsize=8.5, labelcolor=INK)


def _draw_energy(axes: Axes, analysis: Analysis) -> None:
    _plain(axes, f"energy of the directions' change at {100 * RANK_SHARE:.0f} % of the rank")
    shares = [(place, layer) for place, layer in enumerate(analysis.layers) if layer.energy is not None]
    colours = [KINDS[kind_of(layer.path)] for _, layer in shares]
    axes.scatter([place for place, _ in shares], [100 * layer.energy for _, layer in shares], s=16, color=colours, linewidths=0)
    if analysis.energy is not None:
        mean = 100 * analysis.energy.mean
        axes.axhline(mean, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(f"mean {mean:.1f} %", (0, mean), (2, -14), textcoords="offset points", color=INK, fontsize=8.5)
    axes.set_ylim(0, 108)
    axes.set_xlim(-1, len(analysis.layers))
    axes.set_xlabel("layer, in the network's order", color=INK)
    axes.set_ylabel("energy kept, %", color=INK)


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=QUIET, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=8.5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
