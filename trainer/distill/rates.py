"""The learning rate of each role in each step."""

from __future__ import annotations

import math

from ..engine.optim import scheduled_lr
from ..settings.distillation import TrainConfig
from .adversary import ADVERSARY
from .roles import FAKE

FAKE_LR_RULES = {"same": lambda updates: 1.0, "sqrt": math.sqrt, "split": float}  # what fake_lr is divided by


def learning_rate(config: TrainConfig, role: str, step: int) -> float:
    """A role's learning rate in a step."""
    if role == ADVERSARY:
        return config.adversary_lr
    if role == FAKE:
        rate = config.fake_lr / FAKE_LR_RULES[config.fake_lr_rule](config.fake_updates)
        start, shape = 0, config.fake_lr_schedule
    else:
        rate, start, shape = config.student_lr, config.fake_head_start, config.lr_schedule
    return scheduled_lr(rate, step, config.steps, config.warmup, config.decay_steps, start, shape, config.lr_end)
