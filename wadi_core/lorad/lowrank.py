"""Low-rank fits of a table of angles: how LoRaD factors come out of two weights. Free functions on tensors.

Angles that were recovered from stored weights are low-rank plus what rounding did to them. The plain truncated SVD is
the best estimate while what it leaves over is rounding. Where the rank cuts off more than that, an error of an angle
costs as much as its pair of weights is long, so a fit weighted by squared pair norms is the better one. An
elementwise weight is no SVD: separable weights are (rows and columns are scaled), and a few steps of alternating
least squares on the rest follow. Source of those: Srebro and Jaakkola, "Weighted low-rank approximations" (2003);
Hastie et al., "Matrix completion and low-rank SVD via fast alternating least squares" (2015).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SUSPECT = 2.0  # radians: larger angles are looked at twice, for they may have gone round
WEIGHT_LIMIT = 4.0  # of the mean; a weighted step is as short as the heaviest entry is heavy
REFINEMENTS = 4
GAPS = 0.2  # the share of angles that may be missing when the others are to tell what they were
COMPLETIONS = 12  # alternating steps for each rank that a table with gaps is filled in with


class Decomposition(NamedTuple):
    """A truncated singular value decomposition that waits for its rank.

    Attributes:
        matrix: (m, n) what was decomposed.
        basis: its singular vectors on the shorter side, (min(m, n), min(m, n)), a column each, largest first.
        energies: squared singular values, descending, (min(m, n),).
    """

    matrix: Tensor
    basis: Tensor
    energies: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors of this rank in the sense of least squares: (m, rank) and (rank, n), equally large."""
        basis = self.basis[:, :rank]
        a, b = (self.matrix @ basis, basis.T) if self._tall else (basis, basis.T @ self.matrix)
        return balanced(a, b)

    @property
    def _tall(self) -> bool:
        return self.matrix.shape[0] >= self.matrix.shape[1]


def decompose(matrix: Tensor) -> Decomposition:
    """Singular vectors and energies by way of the smaller Gram matrix: several times faster than an SVD.

    Singular values below the square root of the precision, relative to the largest, are noise: pass float64 where
    that matters.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    energies, basis = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    return Decomposition(matrix, basis.flip(1), energies.flip(0).clamp_min(0.0))


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, each column of ``a`` as long as its row of ``b``: both then fit float16's range."""
    tiny = torch.finfo(a.dtype).tiny
    ratio = (b.norm(dim=1).clamp_min(tiny) / a.norm(dim=0).clamp_min(tiny)).sqrt()
    usable = ratio.isfinite() & (ratio > 0)
    ratio = torch.where(usable, ratio, torch.ones_like(ratio))
    return a * ratio, b / ratio[:, None]


def smallest_rank(decomposition: Decomposition, tolerance: float, noise: float = 0.0) -> int:
    """The smallest rank that leaves no more over than a tolerance, or than noise accounts for; at least 1.

    Args:
        tolerance: of the relative error, in the Frobenius norm.
        noise: squared Frobenius norm that independent errors of the entries are expected to have. A fit of rank r
            takes in the share r/m + r/n - r^2/mn of it.
    """
    energies = decomposition.energies
    ranks = torch.arange(1, len(energies) + 1, device=energies.device)
    left = energies.flip(0).cumsum(0).flip(0)
    left = torch.cat((left[1:], left.new_zeros(1)))
    rows, columns = decomposition.matrix.shape
    noise_left = 1.1 * noise * (1 - ranks / rows) * (1 - ranks / columns)
    enough = left <= noise_left.clamp_min(tolerance**2 * float(energies.sum()))
    return int(ranks[enough][0])


def rank_of_energy(decomposition: Decomposition, share: float) -> int:
    """The smallest rank that keeps this share of the energy, the sum of squared singular values; at least 1."""
    kept = decomposition.energies.cumsum(0)
    return min(int((kept < share * kept[-1] * (1 - 1e-12)).sum()) + 1, len(kept))


def weighted_factors(matrix: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (m, rank), (rank, n) that make the sum of ``weights * (matrix - a @ b)^2`` small; a local minimum's slope.

    Args:
        matrix: (m, n).
        weights: (m, n), not negative, not all zero.
    """
    rows = _at_least_a_little(weights.mean(1, keepdim=True).sqrt())
    columns = _at_least_a_little((weights / rows**2).mean(0, keepdim=True).sqrt())
    a, b = decompose(matrix * rows * columns).factors(rank)
    return balanced(*_alternate(matrix, weights, *balanced(a / rows, b / columns), REFINEMENTS))


def unwrapped(theta: Tensor, weights: Tensor, tolerance: float = 1e-2) -> Tensor | None:
    """Angles as they were before they were taken modulo 2 pi, read off the low rank of the rest.

    Large angles are left out, the gaps are filled in with growing rank until the others are met, and each angle moves
    by the turns that bring it closest to what was filled in. Angles that went nearly all the way round look small:
    those that a fit of the others misses by a radian are left out as well.

    Args:
        theta: (m, n) in (-pi, pi].
        weights: (m, n) how much each matters; the angles of pairs next to nothing are no reason to doubt the others.
        tolerance: the relative error at which a rank is large enough.

    Returns:
        None if no angle has to move, or nothing can be told.
    """
    large = theta.abs() > SUSPECT
    if not (large & (weights > 1e-4 * weights.mean())).any() or large.double().mean() > GAPS:
        return None
    guess, rank = theta.masked_fill(large, 0.0), 1
    while rank <= min(theta.shape) // 2:
        known, factors = ~large, decompose(guess).factors(rank)
        for _ in range(2):
            factors = _alternate(theta, known.to(theta.dtype), *factors, COMPLETIONS)
            filled = factors[0] @ factors[1]
            missed = known & ((filled - theta).abs() > 1.0)
            if not missed.any() or missed.double().mean() > GAPS / 10:
                break
            known &= ~missed
        if (filled - theta)[known].norm() <= tolerance * theta[known].norm():
            turns = ((filled - theta) / (2 * math.pi)).round()
            return theta + 2 * math.pi * turns if turns.any() else None
        guess, rank = torch.where(known, theta, filled), 2 * rank
    return None


def _at_least_a_little(scale: Tensor) -> Tensor:
    """Scales that can be divided by: a row of zeros weighs a thousandth of the mean."""
    return scale.clamp_min(1e-3 * float(scale.mean()) or 1.0)


def _alternate(matrix: Tensor, weights: Tensor, a: Tensor, b: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Alternating least squares on the matrix, filled in with the fit where it weighs less than the heaviest."""
    limit = float(weights.max().minimum(WEIGHT_LIMIT * weights.mean()))
    share = (weights / limit).clamp_max(1.0)
    for _ in range(steps):
        target = torch.lerp(a @ b, matrix, share)
        a = _least_squares(b.T, target.T).T
        target = torch.lerp(a @ b, matrix, share)
        b = _least_squares(a, target)
    return a, b


def _least_squares(a: Tensor, target: Tensor) -> Tensor:
    """b with the smallest ``|a @ b - target|``; directions that ``a`` hardly has are held still by a small ridge."""
    gram = a.T @ a
    ridge = 1e-12 * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, a.T @ target)
