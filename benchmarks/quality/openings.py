"""How every comparison of wadi-mini's pictures begins: the eye that looks at them, distances, the pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.evaluation.efficientnet import load_lite
from trainer.evaluation.features import LiteFeatures
from wadi_core import OneStepPipeline
from wadi_core import base as bases

from . import distances


class Opening(NamedTuple):
    """Where sets are kept, how many pictures each has, and what looks at them."""

    work: Path
    count: int
    eye: LiteFeatures


def opened(options: argparse.Namespace) -> Opening:
    """The beginning of a benchmark with these options."""
    return Opening(Path(options.work), options.count, LiteFeatures(load_lite().to(options.device), options.grain))


def opened_with_distances(options: argparse.Namespace) -> tuple[Path, int, LiteFeatures, distances.Ruler]:
    """The same, and the distances between sets, for which pictures of ``--study`` are looked at."""
    work, count, eye = opened(options)
    return work, count, eye, distances.Ruler.learn(work, eye, options.study)


def bare_pipeline(model: str, device: str) -> OneStepPipeline:
    """The pipeline of a multi-step base in float32, without an adapter."""
    place = torch.device(device)
    return OneStepPipeline(bases.load(model, place, torch.float32), place, torch.float32)
