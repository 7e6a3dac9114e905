"""What a forkserver imports once, so that a process that trains begins in a moment: for tests that start many."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # noqa: F401
from matplotlib import pyplot  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

from trainer.distill.session import train
from trainer.mini import scenes, teacher  # noqa: F401
from trainer.settings import fields as settings
from trainer.settings.distillation import TrainConfig


def run(preset: str, words: Sequence[str]) -> None:
    """A whole run in this process, on one thread."""
    os.environ["WORLD_SIZE"] = "1"
    torch.set_num_threads(1)
    train(settings.load(TrainConfig, preset, words))


def context() -> multiprocessing.context.ForkServerContext:
    """Processes that begin with this module imported."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([__name__])
    return made
