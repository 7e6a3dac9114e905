"""Distances between sets of features, in float64, as plain functions of arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Projection:
    """A principal-component projection: ``(features - mean) @ basis``.

    Attributes:
        mean: (d,).
        basis: (d, k), orthonormal columns, the widest direction first.
        kept: share of the variance that the k directions hold.
    """

    mean: Array
    basis: Array
    kept: float

    @classmethod
    def fit(cls, features: Array, components: int = 64) -> Projection:
        """The ``components`` widest directions of ``features`` (n, d).

        Raises:
            ValueError: fewer than two rows, or fewer rows or columns than components.
        """
        features = np.asarray(features, np.float64)
        if features.shape[0] < 2 or min(features.shape) < components:
            raise ValueError(f"{components} components cannot be fitted on features of shape {features.shape}")
        mean = features.mean(0)
        values, vectors = np.linalg.eigh(np.cov(features, rowvar=False))
        order = np.argsort(values)[::-1][:components]
        return cls(mean, vectors[:, order], float(values[order].sum() / values.sum()))

    def __call__(self, features: Array) -> Array:
        """(n, d) to (n, k)."""
        return (np.asarray(features, np.float64) - self.mean) @ self.basis


def _root(symmetric: Array) -> Array:
    """The square root of a symmetric matrix without negative eigenvalues (rounding below zero is cut)."""
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def moments(features: Array) -> tuple[Array, Array]:
    """Mean (d,) and covariance (d, d) of features (n, d).

    Raises:
        ValueError: fewer than two rows have no covariance.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {features.shape} have no covariance")
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_of_moments(mean: Array, covariance: Array, other_mean: Array, other_covariance: Array) -> float:
    """Squared Frechet distance of two Gaussians.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))`` (Heusel et al., 2017), with the symmetric root in
    place of the root of C1 C2: the same trace, and never complex.
    """
    shift, root = mean - other_mean, _root(covariance)
    cross = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(min=0)).sum()
    return float(shift @ shift + np.trace(covariance) + np.trace(other_covariance) - 2 * cross)


def frechet(first: Array, second: Array) -> float:
    """Squared Frechet distance between the Gaussians of two sets (n, d) and (m, d).

    Raises:
        ValueError: a set has fewer than two rows, or the widths differ.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if min(len(first), len(second)) < 2 or first.shape[1:] != second.shape[1:]:
        raise ValueError(f"sets of shape {first.shape} and {second.shape} have no Frechet distance")
    return frechet_of_moments(*moments(first), *moments(second))


def _squared_mmd(first: Array, second: Array) -> float:
    """The unbiased squared maximum mean discrepancy under ``(x.y / d + 1)^3``; both sets (n, d), n >= 2."""

    def kernel(x: Array, y: Array) -> Array:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Array) -> float:
        matrix = kernel(x, x)
        return float((matrix.sum() - np.trace(matrix)) / (len(x) * (len(x) - 1)))

    return within(first) + within(second) - 2 * float(kernel(first, second).mean())


def kid(first: Array, second: Array, block: int = 500) -> tuple[float, float]:
    """Kernel distance of two sets (n, d) and (m, d), and its standard error.

    The unbiased estimate with the polynomial kernel (Binkowski et al., 2018), as the mean over disjoint blocks of
    both sets; the standard error comes from the spread between blocks. Rows that fill no block are left out.

    Returns:
        (estimate, standard error); the error is nan where there is only one block.

    Raises:
        ValueError: fewer than two rows in a set.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    smaller = min(len(first), len(second))
    if smaller < 2:
        raise ValueError("a kernel distance needs at least two rows in each set")
    block = min(block, smaller)
    starts = range(0, smaller - block + 1, block)
    blocks = [_squared_mmd(first[start : start + block], second[start : start + block]) for start in starts]
    error = float(np.std(blocks, ddof=1) / np.sqrt(len(blocks))) if len(blocks) > 1 else float("nan")
    return float(np.mean(blocks)), error


def kid_figures(first: Array, second: Array, block: int = 500) -> dict[str, float]:
    """:func:`kid` for a report: ``kid``, and ``kid_standard_error`` where it is known, as strict JSON has no nan."""
    distance, error = kid(first, second, block)
    return {"kid": distance} if np.isnan(error) else {"kid": distance, "kid_standard_error": error}


def spread(features: Array) -> float:
    """Mean Euclidean distance between two different rows of one caption's features, averaged over captions.

    Args:
        features: (captions, seeds, d), at least two seeds.
    """
    features = np.asarray(features, np.float64)
    seeds = features.shape[1]
    if seeds < 2:
        raise ValueError("diversity needs at least two seeds of each caption")
    squares = (features**2).sum(-1)
    squared = squares[:, :, None] + squares[:, None, :] - 2 * features @ features.transpose(0, 2, 1)
    distances = np.sqrt(squared.clip(min=0))
    first, second = np.triu_indices(seeds, 1)
    return float(distances[:, first, second].mean())


def precision_recall(generated: Array, real: Array, neighbours: int = 3, block: int = 1024) -> tuple[float, float]:
    """Improved precision and recall of generated features (n, d) against real ones (m, d).

    Around each point of a set lies a ball that reaches to its k-th nearest neighbour in the set. Precision is the
    share of generated points inside a ball of the real set, recall the share of real points inside a ball of the
    generated set (Kynkaanniemi et al., 2019).

    Args:
        neighbours: k.
        block: rows whose distances to all others are in memory at a time.

    Raises:
        ValueError: a set has no more than k points.
    """
    generated, real = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} pictures in each set")

    def share(points: Array, others: Array) -> float:
        return _inside(points, others, _radii(others, neighbours, block), block)

    return share(generated, real), share(real, generated)


def _squared_distances(points: Array, others: Array) -> Array:
    squares = (points**2).sum(1)[:, None] + (others**2).sum(1)[None]
    return (squares - 2 * points @ others.T).clip(min=0)


def _radii(points: Array, neighbours: int, block: int) -> Array:
    """Squared distance of each point to its k-th nearest neighbour among the others."""
    starts = range(0, len(points), block)
    # The nearest of all is the point itself.
    return np.concatenate(
        [
            np.partition(_squared_distances(points[start : start + block], points), neighbours, axis=1)[:, neighbours]
            for start in starts
        ]
    )


def _inside(points: Array, centres: Array, radii: Array, block: int) -> float:
    starts = range(0, len(points), block)
    found = [(_squared_distances(points[start : start + block], centres) <= radii).any(1) for start in starts]
    return float(np.concatenate(found).mean())
