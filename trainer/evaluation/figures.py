"""The figures of an evaluation: a set of features against what is known of the real pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wadi_core.files import existing_file, refusal
from wadi_core.lorad.checkpoint import read_header, read_tensors, write_safetensors

from .extractors import Extractor
from .metrics import Array, Projection, frechet, frechet_of_moments, kid_figures, moments, precision_recall

NEIGHBOURS = 3  # of precision and recall, as in their paper
KID_BLOCK = 1000
FEW = 5  # pictures for each feature; with fewer the Frechet distance is mostly bias
KIND = "wadi-statistics"


@dataclass(frozen=True)
class Reference:
    """What is known of the real pictures: their features (n, d), or mean and covariance alone."""

    features: Array | None = None
    moments: tuple[Array, Array] | None = None

    @property
    def count(self) -> int | None:
        return None if self.features is None else len(self.features)

    @property
    def width(self) -> int:
        """Numbers of a feature."""
        if self.features is not None:
            return self.features.shape[1]
        if self.moments is not None:
            return len(self.moments[0])
        raise ValueError("nothing is known of the real pictures")


@dataclass
class Judgement:
    """The result.

    Attributes:
        figures: by name: fid, kid, kid_standard_error, precision, recall, clip_score, as far as they could be taken.
        notes: what a reader should know of them, a sentence each.
        settings: what they were taken of.
    """

    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def judge(features: Array, reference: Reference, components: int | None = None) -> Judgement:
    """Frechet distance, KID, precision and recall of generated features (n, d).

    Args:
        components: the Frechet distance is taken in so many principal components of the real features.

    Raises:
        ValueError: too few pictures, or features of another width; one line.
    """
    found = Judgement(settings={"generated": len(features), "real": reference.count or "statistics"})
    width = reference.width
    if features.shape[1] != width:
        raise ValueError(f"the statistics are of {width} features, and the extractor gives {features.shape[1]}")
    fewest = min(len(features), reference.count or len(features))
    if reference.moments is not None:
        found.figures["fid"] = frechet_of_moments(*moments(features), *reference.moments)
        found.notes.append("KID, precision and recall need the real pictures, or statistics with their features.")
    if reference.features is not None:
        if components and min(reference.features.shape) > components:
            project = Projection.fit(reference.features, components)
            found.figures["fid"] = frechet(project(features), project(reference.features))
            found.notes.append(f"The distance is taken in {components} principal components of the real features.")
            width = components
        else:
            found.figures["fid"] = frechet(features, reference.features)
        found.figures |= kid_figures(features, reference.features, KID_BLOCK)
        both = precision_recall(features, reference.features, NEIGHBOURS)
        found.figures["precision"], found.figures["recall"] = both
    if fewest < FEW * width:
        found.notes.append(f"{fewest} pictures are few for {width} features: the Frechet distance comes out too large.")
    return found


def write_statistics(path: Path, features: Array, extractor: Extractor, side: int | None) -> None:
    """Keep features (n, d) of real pictures in a file that :func:`read_statistics` takes.

    Raises:
        OSError: it cannot be written; one line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"kind": KIND, "extractor": extractor.key, "side": str(side)}
    write_safetensors(path, {"features": torch.from_numpy(features).contiguous()}, said)


def read_statistics(path: Path, extractor: Extractor, side: int | None) -> Reference:
    """What a file says of real pictures.

    Args:
        path: of :func:`write_statistics`, or an ``.npz`` with ``mu`` and ``sigma`` as pytorch-fid and others write it.
        extractor, side: with which the generated pictures are looked at; those of the file must be the same, as far
            as it names them.

    Raises:
        OSError, ValueError: it is missing, damaged, of another kind, or taken in another way; one line.
    """
    path = existing_file(path)
    if path.suffix.lower() == ".npz":
        return _read_npz(path)
    if path.suffix.lower() != ".safetensors":
        raise refusal(path, "real pictures are a folder, a .safetensors file of --save-statistics, or an .npz file")
    header = read_header(path)
    if header.metadata.get("kind") != KIND or list(header.shapes) != ["features"] or len(header.shapes["features"]) != 2:
        raise refusal(path, "this file holds no statistics of real pictures")
    if header.metadata.get("extractor") != extractor.key:
        raise refusal(path, f"these statistics were not taken with {extractor.name} and the same weights")
    if header.metadata.get("side") != str(side):
        raise refusal(path, f"these statistics were taken with --side {header.metadata.get('side')}, not {side}")
    return Reference(read_tensors(header)["features"].float().numpy())


def _read_npz(path: Path) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as read:
            mean, covariance = (np.asarray(read[name], np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise refusal(path, f"mu and sigma cannot be read from this file: {error}") from error
    except Exception as error:  # zipfile's own errors have no common base but this
        raise refusal(path, f"this is no .npz file: {error}") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise refusal(path, f"mu and sigma have the shapes {mean.shape} and {covariance.shape}, which do not fit")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise refusal(path, "mu or sigma holds NaN or Inf")
    return Reference(moments=(mean, covariance))
