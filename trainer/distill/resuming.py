"""What a checkpoint of a distillation holds, and how a run goes on from one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wadi_core.schedule import OneStep

from ..data.prompts import Prompts
from ..engine.checkpoints import DamagedCheckpoint, check_like, check_same, damage_told, random_state, restore_random_state
from ..engine.optim import NonFiniteGuard, OptimizerStep
from ..engine.processes import Processes
from ..models.base_models import Model
from ..settings.distillation import TrainConfig
from ..settings.fields import settings_before
from .adversary import ADVERSARY, Adversary
from .roles import FAKE, STUDENT, Roles

logger = logging.getLogger("wadi")

# Settings with which a run cannot go on if they change.
FIXED = (
    "adapter",
    "fake_adapter",
    "student_rank",
    "fake_rank",
    "optimizer",
    "seed",
    "resolution",
    "prediction_type",
    "clip_skip",
)
# Settings that change nothing of what is learned.
HARMLESS = (
    *("version", "output", "name", "license", "steps", "device", "resume", "start_from", "base_config"),
    *("save_every", "keep_last", "keep_every", "save_lorad", "max_skipped", "embedding_cache", "offload"),
    *("log_every", "sheet_every", "sheet_prompts", "sheet_teacher_steps", "tensorboard", "wandb", "wandb_project", "webhook"),
    *("evaluate_every", "evaluate_count", "evaluate_prompts", "reference", "extractor", "inception", "clip_model", "best_by"),
    *("patience", "push_to_hub"),
)


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
    one_step: OneStep
    size: tuple[int, int]
    adversary: Adversary | None
    step: int

    def state(self) -> dict[str, Any]:
        """All that the run needs to go on bit for bit. With several processes all of them have to ask for it."""
        return {
            "step": self.step,
            "settings": dataclasses.asdict(self.config),
            "base_sha256": self.model.base_sha256,
            "architecture": self.model.architecture,
            "one_step": dataclasses.asdict(self.one_step),
            "size": list(self.size),
            "student": self.roles.state(STUDENT),
            "fake": self.roles.state(FAKE),
            "average": self.average,
            "updaters": {role: updater.state() for role, updater in self.updaters.items()},
            "skipped": self.guard.state(),
            "random": self.processes.gather(random_state()),
            "prompts": self.prompts.state(),
        } | ({} if self.adversary is None else {ADVERSARY: self.adversary.state()})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            DamagedCheckpoint: something in it is missing, or of another type or shape than here.
            ValueError: it belongs to a run of another shape. Both with one line.
        """
        if missing := sorted({"base_sha256", "settings", "prompts", STUDENT, FAKE} - set(state)):
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
        if self.adversary is not None and ADVERSARY in state:  # else it begins here
            check_like(state[ADVERSARY], self.adversary.state(), ADVERSARY)
            self.adversary.head.load_state_dict(state[ADVERSARY])
        for role, updater in self.updaters.items():
            if role != ADVERSARY or ADVERSARY in state:
                updater.load_state(state["updaters"][role])
        self.guard.load_state(state["skipped"])
        self.prompts.load_state(state["prompts"])
        self.step = state["step"]
        if self.processes.rank < len(state["random"]):
            restore_random_state(state["random"][self.processes.rank])
