"""Which objects does a picture show? The nearest of the prototypes, which are made from real pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
SHRINKAGE = 0.1  # of the covariance towards a multiple of the identity


@dataclass(frozen=True)
class Prototypes:
    """The mean feature of each object's real pictures, centred, whitened and normalised.

    Whitening with the covariance of all pictures takes the weight from what changes whatever the object is:
    background, place, size and, where a picture shows two objects, the other one. (The scores are then those of a
    ridge regression on the objects, up to the length of each prototype.)

    Attributes:
        mean: (d,) of all features.
        whiten: (d, d), features to whitened ones.
        prototypes: (objects, d), rows of length one.
    """

    mean: Array
    whiten: Array
    prototypes: Array

    @classmethod
    def fit(cls, features: Array, shown: Sequence[Sequence[int]], objects: int, shrinkage: float = SHRINKAGE) -> Prototypes:
        """Learn from ``features`` (n, d) of real pictures, of which picture i shows the objects ``shown[i]``.

        Raises:
            ValueError: an object is in no picture.
        """
        features = np.asarray(features, np.float64)
        member = np.zeros((len(features), objects))
        for row, indices in enumerate(shown):
            member[row, list(indices)] = 1
        counts = member.sum(0)
        if (counts == 0).any():
            raise ValueError(f"no picture shows object {int(counts.argmin())}: its prototype needs one at least")
        mean = features.mean(0)
        covariance = np.cov(features, rowvar=False)
        width = len(covariance)
        # An absolute floor too: features that never vary would leave nothing to divide by.
        covariance += (shrinkage * np.trace(covariance) / width + 1e-12) * np.eye(width)
        whiten = np.linalg.cholesky(np.linalg.inv(covariance))
        prototypes = (member.T @ features / counts[:, None] - mean) @ whiten
        return cls(mean, whiten, prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True).clip(min=1e-12))

    def name(self, features: Array, how_many: int = 1) -> NDArray[np.integer]:
        """The ``how_many`` objects that each picture most likely shows, (n, how_many), the likeliest first."""
        return np.argsort(-self.scores(features), axis=1, kind="stable")[:, :how_many]

    def scores(self, features: Array) -> Array:
        """How much each picture looks like each object, (n, objects)."""
        return (np.asarray(features, np.float64) - self.mean) @ self.whiten @ self.prototypes.T

    def hits(self, features: Array, shown: Sequence[Sequence[int]]) -> NDArray[np.integer]:
        """How many of the objects each picture should show are among as many guesses, (n,).

        All of ``shown`` have the same length k; the count goes from 0 to k.
        """
        wanted = np.asarray([list(indices) for indices in shown])
        guessed = self.name(features, wanted.shape[1])
        return (guessed[:, :, None] == wanted[:, None, :]).any(2).sum(1)
