"""A base as a folder that stock pipelines of diffusers load: its networks as they are, and the one-step scheduler."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from . import configs
from .files import new_folder
from .lorad.checkpoint import write_safetensors
from .lorad.folders import STEM
from .lorad.metadata import schedule_strings

if TYPE_CHECKING:
    from .base import Base
    from .schedule import OneStep


def write(folder: str | os.PathLike[str], base: Base, one_step: OneStep, is_one_step: bool) -> None:
    """Write a folder in diffusers layout, whole or not at all.

    Args:
        folder: one that does not exist yet, or an empty one.
        base: its U-Net is written as it is, with adapters fused.
        one_step: the schedule of the scheduler.
        is_one_step: whether the U-Net is a one-step network, which the file of its weights then says.

    Raises:
        OSError: it cannot be written, or there is something of this name; one line.
    """
    from diffusers import StableDiffusionPipeline

    from .scheduler import OneStepScheduler

    pipe = StableDiffusionPipeline(
        vae=base.vae,  # type: ignore[arg-type]
        text_encoder=base.text_encoder,  # type: ignore[arg-type]
        tokenizer=base.tokenizer,
        unet=base.unet,  # type: ignore[arg-type]
        scheduler=OneStepScheduler.of(one_step),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    with new_folder(folder) as temporary:
        pipe.save_config(temporary)
        for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
            getattr(pipe, part).save_pretrained(temporary / part)
        pipe.unet.save_config(temporary / "unet")
        metadata = {"format": "pt", **(schedule_strings(one_step) if is_one_step else {})}
        write_safetensors(temporary / "unet" / f"{STEM}.safetensors", base.unet.state_dict(), metadata)
        _name_padding(temporary / "tokenizer" / "tokenizer_config.json", base)


def _name_padding(settings: Path, base: Base) -> None:
    """Write the token that fills up short prompts, which the loaded tokenizer is not told (see ``base``)."""
    pad = base.tokenizer.convert_ids_to_tokens(base.pad)
    settings.write_text(json.dumps({**configs.read(settings), "pad_token": pad}, indent=2), encoding="utf-8")
