"""A distillation from its start to its end: what is shown of it, and the student that it writes."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wadi_core import pictures
from wadi_core.files import one_line
from wadi_core.sheets import contact_sheet

from ..data.prompts import PromptList
from ..engine.logs import LossTable
from ..engine.session import Session, run_session
from ..engine.trackers import Trackers, WeightsAndBiases
from ..engine.webhook import notify
from ..models.adapters import LoRaDAdapter
from ..settings.distillation import TrainConfig
from . import export, uploading
from .angles import angles_by_block
from .distillation import Distillation
from .roles import FAKE, STUDENT
from .validation import Validation

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("wadi")

SHEET_SEEDS = (0, 100)  # of the first picture in each column
LARGEST_SHEET = 24  # prompts of one's own
PLOTTED = ("fake_loss", "vsd_grad", "x0_std")


class DistillationSession(Session[Distillation]):
    """Drives a distillation to its end, or to a signal."""

    def __init__(self, run: Distillation) -> None:
        super().__init__(run)
        config = run.config
        self.prompts: Sequence[str] = run.prompts.shown
        if config.sheet_prompts:
            self.prompts = list(PromptList.read(config.sheet_prompts))[:LARGEST_SHEET]
        self._teachers: list[Image] = []  # of the sheets: they never change
        self.validation = run.processes.together(lambda: Validation(run)) if config.evaluate_every else None
        if self.first:
            self.angles = LossTable(self.output / "angles.csv", run.step)
        self._over = run.processes.any(self.first and self.validation is not None and self.validation.over)

    def _trackers(self) -> Trackers:
        config, found = self.run.config, super()._trackers()
        if config.wandb != "off":
            settings = dataclasses.asdict(config) | {"webhook": ""}  # which may be a secret
            found.trackers.append(WeightsAndBiases(config.wandb, config.wandb_project, self.output, settings))
        return found

    @torch.no_grad()
    def _more_figures(self) -> dict[str, float]:
        """How far the student is from its average, as a share of the student's own length."""
        if not self.run.average:
            return {}
        live = self.run.student().parameters
        apart = torch.stack([(live[name] - value).square().sum() for name, value in self.run.average.items()]).sum()
        length = torch.stack([parameter.square().sum() for parameter in live.values()]).sum()
        return {"ema_distance": float((apart / length).sqrt())}

    def _show(self) -> None:
        step = self.run.step
        found: dict[str, float] = {}
        for role in (STUDENT, FAKE):
            adapter = self.run.roles.adapters[role]
            if isinstance(adapter, LoRaDAdapter):
                found |= {f"{role}/{name}": value for name, value in angles_by_block(adapter).items()}
        if found:
            self.angles.add(step, found)
        self.table.plot(self.output / "losses.png", PLOTTED, "distillation")
        sheet = self.sheet()
        pictures.save(sheet, self.output / f"sheet-{step:06d}.png")
        self.events.scalars(step, found)
        self.events.picture(step, "samples", sheet)

    def _judge(self, last: bool) -> bool:
        if self.validation is None or not (last or self.run.step % self.run.config.evaluate_every == 0):
            return False
        found = self.validation.take()
        if self.first and self.validation.best is not None and self.validation.best["step"] == self.run.step:
            self._tell("its best student so far", found)
        if self.first:
            self.events.scalars(self.run.step, {f"evaluation/{name}": value for name, value in found.items()})
        over = self.run.processes.any(self.first and self.validation.over)
        if over and self.first and self.validation.best is not None and not last:
            best = self.validation.best
            logger.info(
                "step %d: no better for %d evaluations, so the run ends; the best is that of step %d (%s %.4g)",
                self.run.step, self.run.config.patience, best["step"], best["name"], best["value"],
            )  # fmt: skip
        return over

    def _beside(self, checkpoint: Path) -> None:
        """The student as it is at a checkpoint, as a file that other programs load; it goes when the checkpoint goes."""
        config = self.run.config
        if not config.save_lorad or config.adapter != "lorad":
            return
        export.export(self.run, self.output, stem=f"{config.name}-{checkpoint.stem}")
        for path in self.output.glob(f"{config.name}-step-*.safetensors"):
            if not (self.output / f"{path.stem.removeprefix(f'{config.name}-')}.pt").exists():
                path.unlink(missing_ok=True)

    def sheet(self) -> Image:
        """A row for each prompt: the teacher's picture, then the student's of two seeds, the first from the same noise."""
        run, steps = self.run, self.run.config.sheet_teacher_steps
        columns, titles = [], []
        seeds = [range(first, first + len(self.prompts)) for first in SHEET_SEEDS]
        if steps:
            self._teachers = self._teachers or run.teacher_pictures(self.prompts, seeds[0], steps)
            columns, titles = [self._teachers], [f"teacher, {steps} steps"]
        for own in seeds:
            columns.append(run.pictures(self.prompts, own))
            titles.append("student")
        return contact_sheet([*zip(*columns, strict=True)], self.prompts, titles)

    def _finish(self) -> Path:
        config = self.run.config
        (picture,) = self.run.pictures(self.prompts[:1], SHEET_SEEDS[:1])
        path = export.export(self.run, self.output, picture)
        logger.info("the student is %s", path)
        if config.push_to_hub and self.run.step >= config.steps and config.adapter == "lorad":
            shown = self.output / f"{config.name}.png"
            pictures.save(picture, shown)
            uploading.push(config.push_to_hub, path, config.base, [shown], list(self.prompts[:1]))
        self._tell("finished" if self.run.step >= self.run.config.steps or self._over else "stopped", {})
        return path

    def _tell(self, what: str, figures: Mapping[str, float]) -> None:
        """Tell the web hook."""
        run = self.run
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        text = f"{run.output.name}: {what}, step {run.step} of {run.config.steps}{', ' if numbers else ''}{numbers}"
        notify(run.config.webhook, text, run=run.output.name, step=run.step, steps=run.config.steps, figures=dict(figures))


def train(config: TrainConfig) -> Path | None:
    """A whole distillation; returns the student's file, in the process that wrote it.

    Raises:
        OSError, ValueError: with one line.
    """
    advice = "take a smaller micro_batch, gradient_checkpointing=true or base_weights=fp8; --dry-run shows where it goes"
    try:
        return run_session(config, lambda processes: DistillationSession(Distillation(config, processes)), advice)
    except (OSError, ValueError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            notify(config.webhook, f"{Path(config.output).name}: ended with an error: {one_line(error)}", error=one_line(error))
        raise
