"""What pictures of scenes are measured with: a projection and prototypes, learned from real scenes in no other set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.evaluation.features import LiteFeatures
from trainer.evaluation.metrics import Projection, frechet, kid_figures, spread
from trainer.evaluation.retrieval import Prototypes
from trainer.mini import scenes

from .degraded_scenes import Rough
from .sets import Real, feature_set
from .streams import Stream

COMPONENTS = 64
KID_BLOCK = 500
# Training scenes have seeds that start from 0; these, and those of all other sets, are far from them.
SINGLE = Stream("study-single", 100_000_000, pair=False, each=True)
PAIR = Stream("study-pair", 110_000_000, pair=True)


@dataclass(frozen=True)
class Ruler:
    """Measures how far sets of pictures are from each other.

    Attributes:
        projection: to the dimensions of the Frechet distance and of diversity.
    """

    projection: Projection

    @classmethod
    def learn(cls, work: Path, eye: LiteFeatures, count: int) -> Ruler:
        """From ``count`` pictures of single objects and as many of two."""
        features = [feature_set(work, eye, Real(), stream, count) for stream in (SINGLE, PAIR)]
        return cls(Projection.fit(np.concatenate(features), COMPONENTS))

    def distances(self, features: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """Frechet and kernel distance of two sets of features (n, 1280)."""
        distance = frechet(self.projection(features), self.projection(reference))
        return {"fd": distance, **kid_figures(features, reference, KID_BLOCK)}

    def diversity(self, features: np.ndarray, noises: int) -> float:
        """Mean distance between pictures of one caption; ``noises`` rows in a row of features (n, 1280) share one."""
        projected = self.projection(features)
        return spread(projected.reshape(-1, noises, projected.shape[1]))


def prototypes(work: Path, eye: LiteFeatures, count: int, stream: Stream, *kinds: Real | Rough) -> Prototypes:
    """Of all objects, from ``count`` pictures of a stream in each manner.

    Raises:
        ValueError: ``count`` is so small that an object is in none of them.
    """
    features = [feature_set(work, eye, kind, stream, count) for kind in kinds]
    shown = stream.shown(range(count)) * len(kinds)
    return Prototypes.fit(np.concatenate(features), shown, len(scenes.things()))


@dataclass(frozen=True)
class Judge:
    """Says which objects pictures show.

    Attributes:
        single, pair: prototypes of clean and rough scenes of one object, and of two.
        strict: prototypes of clean scenes of one object alone.
    """

    single: Prototypes
    pair: Prototypes
    strict: Prototypes

    @classmethod
    def learn(cls, work: Path, eye: LiteFeatures, count: int, rough: Rough) -> Judge:
        """From ``count`` pictures of single objects and as many of two, clean, and all of them again, rough.

        Raises:
            ValueError: ``count`` is so small that an object is in none of them.
        """

        streams = (SINGLE, Real(), rough), (PAIR, Real(), rough), (SINGLE, Real())
        return cls(*(prototypes(work, eye, count, stream, *kinds) for stream, *kinds in streams))

    def retrieval(self, features: np.ndarray, shown: Sequence[Sequence[int]]) -> dict[str, float]:
        """Shares of right guesses among the features (n, 1280) of pictures that should show the objects ``shown``."""
        rows = {size: [row for row, indices in enumerate(shown) if len(indices) == size] for size in (1, 2)}

        def hits(prototypes: Prototypes, size: int) -> np.ndarray:
            return prototypes.hits(features[rows[size]], [shown[row] for row in rows[size]])

        found = {}
        if rows[1]:
            found["retrieval_single"] = float(hits(self.single, 1).mean())
            found["retrieval_single_strict"] = float(hits(self.strict, 1).mean())
        if rows[2]:
            both = hits(self.pair, 2)
            found["retrieval_pair"] = float((both == 2).mean())
            found["retrieval_pair_each"] = float(both.mean() / 2)
        return found
