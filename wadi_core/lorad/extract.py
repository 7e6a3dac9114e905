"""A LoRaD out of two networks: the base, and the one-step student that came of it by rotation.

The angles are exact while they lie inside (-pi, pi); see :mod:`~.rotation`. What remains is a low-rank fit for each
layer (:mod:`~.lowrank`), and to say how good it is: a student that was not made by rotating pairs of weights, such as
one whose weights were all trained, has changed the norms of pairs, and no LoRaD can follow it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..schedule import OneStep
from .adapter import LoRaD
from .layers import adapter_key
from .lowrank import Decomposition, decompose, rank_of_energy, smallest_rank, unwrapped, weighted_factors
from .metadata import Metadata
from .rotation import recover_angles, rotate
from .weights import Weights

NOMINAL_RANK = 256  # where no smaller rank is enough
TOLERANCE = 3e-6  # of a layer's angles, relative: a third of the 1e-5 that a round trip in float32 may cost
ARITHMETIC = 1e-6  # of a weight, relative: what computing a rotation in float32 may leave
MOSTLY = 0.99  # the share of a change that a rotation must explain for it to be called one
WORTH_IT = 0.99  # of the error: a weighted fit is taken if it is smaller than this


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. Errors and changes are Frobenius norms.

    Attributes:
        path: canonical path of the layer.
        shape: (out, in).
        rank: of its factors.
        change: ``|W_student - W_base| / |W_base|``.
        explained: share of ``|W_student - W_base|^2`` that a rotation of pairs by the best angles, of any rank, makes.
        error: ``|W_extracted - W_student| / |W_student - W_base|`` at the rank.
        rounding: what of ``error`` the rounding of the stored weights accounts for, an estimate.
        norm_change: ``|n_student - n_base| / |n_base|``, n being the norms of all pairs.
        norms_kept: whether rounding accounts for ``norm_change``.
        angle_rms, angle_max: of the recovered angles in radians.
        wrapped: angles found to lie beyond pi, and put back there.
        weighted: whether the fit weighted by pair norms was the better one.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    change: float
    explained: float
    error: float
    rounding: float
    norm_change: float
    norms_kept: bool
    angle_rms: float
    angle_max: float
    wrapped: int
    weighted: bool

    @property
    def is_rotation(self) -> bool:
        """Whether the change is a rotation, as far as the precision of the weights tells."""
        return self.norms_kept or self.explained >= MOSTLY


@dataclass(frozen=True)
class Extraction:
    """What an extraction found.

    Attributes:
        layers: a report for each layer of the LoRaD.
        unchanged: paths of the layers that are the same in both networks; the LoRaD has no factors for them.
        change, explained, error: as of :class:`LayerReport`, over all layers together.
    """

    layers: tuple[LayerReport, ...]
    unchanged: tuple[str, ...]
    change: float
    explained: float
    error: float

    @property
    def not_rotated(self) -> tuple[LayerReport, ...]:
        """The layers whose change is not a rotation."""
        return tuple(layer for layer in self.layers if not layer.is_rotation)

    @property
    def is_rotation(self) -> bool:
        """Whether the student is the base with its weights rotated."""
        return self.explained >= MOSTLY or not self.not_rotated

    @property
    def wrapped(self) -> int:
        """Angles beyond pi, of all layers."""
        return sum(layer.wrapped for layer in self.layers)


@dataclass
class _Squares:
    """Sums of squares over layers, of which the totals are made."""

    base: float = 0.0
    change: float = 0.0
    radial: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class _Fit:
    """Factors of one layer, and the sums that its report is made of."""

    a: Tensor
    b: Tensor
    report: LayerReport
    squares: _Squares = field(repr=False)


@torch.no_grad()
def extract(
    base: Weights,
    student: Weights,
    rank: int | None = None,
    energy: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LoRaD, Extraction]:
    """The LoRaD that turns ``base`` into ``student``; the two may differ in layout and precision.

    Without ``rank`` and ``energy`` each layer gets the smallest rank that leaves nothing over but rounding, or 256 if
    there is none. No rank exceeds what the layer's angles can have, in/2 or out: that loses nothing. Factors are float32.

    Args:
        rank: of every layer.
        energy: share of the squared angles to keep, in (0, 1], from which each layer's rank follows.
        progress: called with the number of layers done, and of all.

    Returns:
        The LoRaD, which says that it is a one-step student of the default schedule if the student does not say
        otherwise, and the report.

    Raises:
        ValueError: networks of different architecture or shapes, no difference between them, weights that are not
            finite, or a rank or energy that makes no sense; one line.
        OSError: a file cannot be read.
    """
    if rank is not None and energy is not None:
        raise ValueError("either a rank or an energy is given, not both")
    if rank is not None and rank < 1:
        raise ValueError(f"the rank must be at least 1, not {rank}")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"the energy is a share, above 0 and at most 1, not {energy}")
    shapes = comparable_layers(base, student)
    factors, reports, unchanged, total = {}, [], [], _Squares()
    for done, path in enumerate(shapes):
        if progress:
            progress(done, len(shapes))
        original, changed = base.linear(path), student.linear(path)
        for weights, weight in ((base, original), (student, changed)):
            if not weight.float().isfinite().all():
                raise weights.refusal(f"the weight of {path} holds NaN or Inf")
        precisions = (base.dtype(base.layout.places[path].name), student.dtype(student.layout.places[path].name))
        fit = fit_layer(path, original, changed, precisions, rank, energy)
        if fit is None:
            unchanged.append(path)
            total.base += float(original.double().square().sum())
            continue
        factors[adapter_key(path, base.architecture)] = (fit.a.float(), fit.b.float())
        reports.append(fit.report)
        for name, value in vars(fit.squares).items():
            setattr(total, name, getattr(total, name) + value)
    if progress:
        progress(len(shapes), len(shapes))
    if not factors:
        raise ValueError("base and student have the same linear layers: there is nothing to extract")
    report = Extraction(
        layers=tuple(reports),
        unchanged=tuple(unchanged),
        change=math.sqrt(total.change / total.base) if total.base else 0.0,
        explained=1.0 - total.radial / total.change,
        error=math.sqrt(total.error / total.change),
    )
    return LoRaD(factors, _metadata(base, student)), report


def comparable_layers(base: Weights, student: Weights) -> dict[str, tuple[int, int]]:
    """Canonical path -> (out, in) of the linear layers that two networks of one kind have.

    Raises:
        ValueError: they are not of one kind; one line.
    """
    if base.architecture != student.architecture:
        raise ValueError(f"base and student are different networks: {base.architecture} and {student.architecture}")
    own, other = base.layout.shapes, student.layout.shapes
    for path in own.keys() ^ other.keys():
        raise ValueError(f"base and student are different networks: only one of them has the layer {path}")
    for path, shape in own.items():
        if tuple(shape) != tuple(other[path]):
            raise ValueError(f"base and student are different networks: {path} is {shape} in one, {other[path]} in the other")
    return {path: (shape[0], shape[1]) for path, shape in own.items() if shape[1] % 2 == 0}


def fit_layer(
    path: str,
    base: Tensor,
    student: Tensor,
    precisions: tuple[torch.dtype, torch.dtype],
    rank: int | None = None,
    energy: float | None = None,
) -> _Fit | None:
    """Factors of one layer's angles and a report; None if the two weights are the same.

    Args:
        base, student: (out, in).
        precisions: the types in which the two are stored, from which follows what rounding did.
        rank, energy: as in :func:`extract`.
    """
    base, student = base.double(), student.double()
    change = _squared(student - base)
    if change == 0.0:
        return None
    theta = recover_angles(base, student)
    norms = base.unflatten(1, (-1, 2)).norm(dim=-1)
    weights = norms.square()
    radial = _squared(student.unflatten(1, (-1, 2)).norm(dim=-1) - norms)
    rounding, angle_noise = _rounding(base, student, precisions)

    angles = decompose(theta)
    chosen = _choose_rank(angles, rank, energy, angle_noise)
    a, b = angles.factors(chosen)
    error, wrapped, weighted = _squared(rotate(base, a @ b) - student), 0, False

    put_back = unwrapped(theta, weights)
    if put_back is not None:
        others = decompose(put_back)
        other_chosen = _choose_rank(others, rank, energy, angle_noise)
        factors = others.factors(other_chosen)
        other_error = _squared(rotate(base, factors[0] @ factors[1]) - student)
        simpler = smallest_rank(others, TOLERANCE, angle_noise) < smallest_rank(angles, TOLERANCE, angle_noise)
        if simpler or other_error < WORTH_IT**2 * error:
            wrapped = int((put_back != theta).sum())
            (a, b), theta, chosen, error = factors, put_back, other_chosen, other_error

    # Below twice the rounding a weighted fit would only follow the rounding of the heaviest pairs more closely.
    if error > 4.0 * (rounding + radial) and chosen < min(theta.shape):
        factors = weighted_factors(theta, weights, chosen)
        other_error = _squared(rotate(base, factors[0] @ factors[1]) - student)
        if other_error < WORTH_IT**2 * error:
            (a, b), error, weighted = factors, other_error, True

    size = _squared(base)
    report = LayerReport(
        path=path,
        shape=(base.shape[0], base.shape[1]),
        rank=chosen,
        change=math.sqrt(change / size) if size else math.inf,
        explained=1.0 - radial / change,
        error=math.sqrt(error / change),
        rounding=math.sqrt(rounding / change),
        norm_change=math.sqrt(radial / size) if size else math.inf,
        norms_kept=radial <= 2.0 * rounding + ARITHMETIC**2 * size,
        angle_rms=float(theta.square().mean().sqrt()),
        angle_max=float(theta.abs().max()),
        wrapped=wrapped,
        weighted=weighted,
    )
    return _Fit(a, b, report, _Squares(size, change, radial, error))


def _choose_rank(angles: Decomposition, rank: int | None, energy: float | None, noise: float) -> int:
    most = len(angles.energies)
    if rank is not None:
        return min(rank, most)
    if energy is not None:
        return rank_of_energy(angles, energy)
    return min(smallest_rank(angles, TOLERANCE, noise), NOMINAL_RANK)


def _rounding(base: Tensor, student: Tensor, precisions: tuple[torch.dtype, torch.dtype]) -> tuple[float, float]:
    """What storing the weights has done: expected squared norms of the errors of the weight, and of the angles.

    The student's last digits are always rounded. The base's count where it is the coarser one of the two, for then
    the student was made from a finer copy; a copy of the same precision is taken for the one that was rotated.
    """
    squares = _rounding_variance(student, precisions[1])
    if _epsilon(precisions[0]) > _epsilon(precisions[1]):
        squares = squares + _rounding_variance(base, precisions[0])
    x, y = student.unflatten(1, (-1, 2)).unbind(-1)
    of_x, of_y = squares.unflatten(1, (-1, 2)).unbind(-1)
    norms = x.square() + y.square()
    of_angles = (y.square() * of_x + x.square() * of_y) / norms.square()
    # An angle can be off by pi at most, and that of a pair without length has been set to 0.
    return float(squares.sum()), float(of_angles.nan_to_num(0.0, 0.0, 0.0).clamp_max(math.pi**2 / 3).sum())


def _rounding_variance(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Variance of the error of each number that is rounded to a type: a twelfth of its last digit's square."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(weight.abs().clamp_min(info.smallest_normal))
    last_digit = torch.ldexp(torch.full_like(weight, info.eps / 2), exponent)
    return last_digit.square() / 12


def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _squared(tensor: Tensor) -> float:
    return float(tensor.square().sum())


def _metadata(base: Weights, student: Weights) -> Metadata:
    """One step of the schedule that the student's file names, or else of the released weights'."""
    said = Metadata.from_strings({key: text for key, text in student.metadata.items() if key.startswith("wadi.")})
    schedule = said.one_step or OneStep()
    return Metadata(
        architecture=base.architecture,
        alpha_T_squared=schedule.alpha_T_squared,
        timestep=schedule.timestep,
        input_scale=schedule.input_scale,
        prediction_type=schedule.prediction_type if said.one_step else base.prediction_type or schedule.prediction_type,
        base_sha256=base.sha256(),
    )
