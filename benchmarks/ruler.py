"""What pictures of scenes are measured with: a projection and prototypes, learned from real scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.features import Eye
from trainer.metrics import Projection, frechet, kid, spread
from trainer.mini import scenes

from .retrieval import Prototypes
from .sets import Real, feature_set
from .streams import Stream

COMPONENTS = 64
KID_BLOCK = 500
# Training scenes have seeds that start from 0; these, and those of all other sets, are far from them.
SINGLE = Stream("study-single", 100_000_000, pair=False, each=True)
PAIR = Stream("study-pair", 110_000_000, pair=True)


@dataclass(frozen=True)
class Ruler:
    """What pictures are measured with, learned from real scenes that are in no other set."""

    projection: Projection
    single: Prototypes
    pair: Prototypes

    @classmethod
    def learn(cls, work: Path, eye: Eye, count: int) -> Ruler:
        """From ``count`` pictures of single objects and as many of two.

        Raises:
            ValueError: ``count`` is so small that an object is in none of them.
        """
        single = feature_set(work, eye, Real(), SINGLE, count)
        pair = feature_set(work, eye, Real(), PAIR, count)
        objects = len(scenes.things())
        return cls(
            Projection.fit(np.concatenate([single, pair]), COMPONENTS),
            Prototypes.fit(single, SINGLE.shown(range(count)), objects),
            Prototypes.fit(pair, PAIR.shown(range(count)), objects),
        )

    def distances(self, features: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """Frechet and kernel distance of two sets of features (n, 1280)."""
        distance, error = kid(features, reference, KID_BLOCK)
        return {
            "fd": frechet(self.projection(features), self.projection(reference)),
            "kid": distance,
            "kid_standard_error": error,
        }

    def retrieval(self, features: np.ndarray, shown: Sequence[Sequence[int]]) -> dict[str, float]:
        """Shares of right guesses among the features (n, 1280) of pictures that should show the objects ``shown``."""
        found = {}
        sizes = np.array([len(indices) for indices in shown])
        for size, prototypes, name in ((1, self.single, "retrieval_single"), (2, self.pair, "retrieval_pair")):
            rows = np.flatnonzero(sizes == size)
            if len(rows):
                hits = prototypes.hits(features[rows], [shown[row] for row in rows])
                found[name] = float((hits == size).mean())
                if size == 2:
                    found["retrieval_pair_each"] = float(hits.mean() / 2)
        return found

    def diversity(self, features: np.ndarray, noises: int) -> float:
        """Mean distance between pictures of one caption; ``noises`` rows in a row of features (n, 1280) share one."""
        projected = self.projection(features)
        return spread(projected.reshape(-1, noises, projected.shape[1]))
