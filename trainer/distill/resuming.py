"""What a checkpoint of a distillation holds, and how a run goes on from one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.prompts import Prompts
from ..engine.checkpoints import DamagedCheckpoint, check_like, check_same, damage_told, random_state, restore_random_state
from ..engine.optim import NonFiniteGuard, OptimizerStep
from ..engine.processes import Processes
from ..models.base_models import Model
from ..settings.distillation import TrainConfig
from ..settings.fields import settings_before
from .roles import FAKE, STUDENT, Roles

logger = logging.getLogger("wadi")

# Settings with which a run cannot go on if they change.
FIXED = ("adapter", "fake_adapter", "student_rank", "fake_rank", "optimizer", "seed", "resolution", "prediction_type")
# Settings that change nothing of what is learned.
HARMLESS = (
    "version",
    "output",
    "name",
    "license",
    "steps",
    "device",
    "save_every",
    "keep_last",
    "keep_every",
    "resume",
    "start_from",
)
HARMLESS += ("max_skipped", "log_every", "sheet_every", "tensorboard", "embedding_cache", "offload", "base_config")


class Resumable:
    """The state of a run: all that it needs to go on bit for bit."""

    config: TrainConfig
    output: Path
    model: Model
    roles: Roles
    updaters: dict[str, OptimizerStep]
    average: dict[str, Tensor]
    guard: NonFiniteGuard
    processes: Processes
    prompts: Prompts
    step: int

    def state(self) -> dict[str, Any]:
        """All that the run needs to go on bit for bit. With several processes all of them have to ask for it."""
        return {
            "step": self.step,
            "settings": dataclasses.asdict(self.config),
            "base_sha256": self.model.base_sha256,
            "student": self.roles.state(STUDENT),
            "fake": self.roles.state(FAKE),
            "average": self.average,
            "updaters": {role: updater.state() for role, updater in self.updaters.items()},
            "skipped": self.guard.state(),
            "random": self.processes.gather(random_state()),
            "prompts": self.prompts.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            DamagedCheckpoint: something in it is missing, or of another type or shape than here.
            ValueError: it belongs to a run of another shape. Both with one line.
        """
        if missing := sorted({"base_sha256", "settings", "prompts", *self.updaters} - set(state)):
            raise DamagedCheckpoint(f"this checkpoint is not of a distillation: it has no {missing[0]}")
        with damage_told():
            before = settings_before(self.config, state["settings"])
        if state["base_sha256"] != self.model.base_sha256:
            raise ValueError(f"{self.output} holds a run on another base; choose another output folder")
        now = dataclasses.asdict(self.config)
        check_same(before, now, FIXED, self.output)
        with damage_told():
            digest = state["prompts"]["digest"]
        self.prompts.check(digest)
        with damage_told():
            self._take_over(state)
        changed = [f"{name} {before[name]} -> {now[name]}" for name in now if now[name] != before[name]]
        if changed := [text for text in changed if text.partition(" ")[0] not in HARMLESS]:
            logger.warning("the run goes on with other settings than before: %s", ", ".join(changed))

    def _take_over(self, state: Mapping[str, Any]) -> None:
        """Everything of a checkpoint that is of this run."""
        for role in (STUDENT, FAKE):
            check_like(state[role], self.roles.adapters[role].parameters, role)
            self.roles.load_state(role, state[role])
        if self.config.ema:
            average = state["average"] or state[STUDENT]
            check_like(average, self.average, "average")
            self.average = {name: value.to(self.average[name], copy=True) for name, value in average.items()}
        for role, updater in self.updaters.items():
            updater.load_state(state["updaters"][role])
        self.guard.load_state(state["skipped"])
        self.prompts.load_state(state["prompts"])
        self.step = state["step"]
        if self.processes.rank < len(state["random"]):
            restore_random_state(state["random"][self.processes.rank])
