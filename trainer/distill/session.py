"""A distillation from its start to its end: what is shown of it, and the student that it writes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wadi_core import pictures
from wadi_core.sheets import contact_sheet

from ..engine.logs import LossTable
from ..engine.session import Session, run_session
from ..models.adapters import LoRaDAdapter
from ..settings.distillation import TrainConfig
from . import export
from .angles import angles_by_block
from .distillation import Distillation
from .roles import FAKE, STUDENT

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("wadi")

SHEET_SEEDS = (0, 100)  # of the first picture in each row
PLOTTED = ("fake_loss", "vsd_grad", "x0_std")


class DistillationSession(Session[Distillation]):
    """Drives a distillation to its end, or to a signal."""

    def __init__(self, run: Distillation) -> None:
        super().__init__(run)
        if self.first:
            self.angles = LossTable(self.output / "angles.csv", run.step)

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
        if self.events is not None:
            self.events.scalars(step, found)
            self.events.picture(step, "samples", sheet)

    def sheet(self) -> Image:
        """One-step pictures of fixed prompts, two seeds each."""
        return contact_sheet([self.run.pictures(self.run.prompts.shown, seed) for seed in SHEET_SEEDS])

    def _finish(self) -> Path:
        (picture,) = self.run.pictures(self.run.prompts.shown[:1], SHEET_SEEDS[0])
        path = export.export(self.run, self.output, picture)
        logger.info("the student is %s", path)
        return path


def train(config: TrainConfig) -> Path | None:
    """A whole distillation; returns the student's file, in the process that wrote it.

    Raises:
        OSError, ValueError: with one line.
    """
    advice = "take a smaller micro_batch, gradient_checkpointing=true or base_weights=fp8; --dry-run shows where it goes"
    return run_session(config, lambda processes: DistillationSession(Distillation(config, processes)), advice)
