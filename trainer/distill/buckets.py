"""The size of the pictures of a step."""

from __future__ import annotations

from wadi_core import base as bases

from ..data.random_draws import BUCKET, uniform64
from ..models.base_models import LATENT_CHANNELS
from ..settings.distillation import TrainConfig


def latent_shape(config: TrainConfig, native: tuple[int, int], step: int) -> tuple[int, int, int]:
    """(c, h, w) of a step's latents: all of its pictures are in one bucket, which follows from the seed and the step.

    Args:
        native: width and height in pixels where there are no buckets.
    """
    sizes = config.sizes or [native]
    width, height = sizes[uniform64(config.seed, BUCKET, step) % len(sizes)]
    return LATENT_CHANNELS, height // bases.FACTOR, width // bases.FACTOR
