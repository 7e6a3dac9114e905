"""What a finished run hands over: the student as a file that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wadi_core.lorad import Metadata
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.pictures import thumbnail

from ..models.adapters import LoRaDAdapter
from .distillation import Distillation

if TYPE_CHECKING:
    from PIL.Image import Image


def describe(run: Distillation, picture: Image | None = None) -> Metadata:
    """All that a file says of the student."""
    config = run.config
    width, height = run.size
    return Metadata(
        architecture=run.model.architecture,
        alpha_T_squared=run.one_step.alpha_T_squared,
        timestep=run.one_step.timestep,
        prediction_type=run.one_step.prediction_type,
        input_scale=run.one_step.input_scale,
        base_sha256=run.model.base_sha256,
        title=config.name,
        resolution=f"{width}x{height}",
        license=config.license or None,
        thumbnail=None if picture is None else thumbnail(picture),
        # Names of sd-scripts, which managers of LoRAs list.
        extra={
            "ss_steps": str(run.step),
            "ss_seed": str(config.seed),
            "ss_learning_rate": f"{config.student_lr:g}",
            "ss_total_batch_size": str(config.batch),
            "ss_mixed_precision": config.precision,
            "ss_clip_skip": str(config.clip_skip + 1),  # as A1111 counts
        },
    )


def export(run: Distillation, folder: Path, picture: Image | None = None, stem: str = "") -> Path:
    """Write the student (its average, where one is kept): a LoRaD as such, any other kind as a whole network.

    A whole network is in diffusers' names, as float16, and says of itself that it is a one-step network.

    Raises:
        OSError, ValueError: it cannot be written, or holds NaN or Inf; one line.
    """
    path = folder / f"{stem or run.config.name}.safetensors"
    metadata = describe(run, picture)
    with run.averaged():
        student = run.student()
        if isinstance(student, LoRaDAdapter):
            student.lorad(metadata).save(path)
        else:
            tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in student.weights().items()}
            write_safetensors(path, tensors, metadata.to_strings(run.config.student_rank, path.stem))
    return path
