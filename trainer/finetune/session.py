"""A finetuning run from its start to its end: what is shown of it, and the files that it writes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from wadi_core import pictures
from wadi_core.files import one_line

from ..engine.processes import Processes
from ..engine.session import Session, run_session
from ..settings.finetuning import FinetuningConfig
from .finetuning import SHEET_SEED, STUDENT, TEACHER, FinetuningRun

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("wadi")

C = TypeVar("C", bound=FinetuningConfig)


class FinetuningSession(Session[FinetuningRun]):
    """Drives a finetuning run to its end, or to a signal."""

    def _show(self) -> None:
        run, step = self.run, self.run.step
        self.table.plot(self.output / "losses.png", ("loss", "denoising", "anchor"), run.config.name)
        sheet = self.sheet()
        pictures.save(sheet, self.output / f"sheet-{step:06d}.png")
        self.events.picture(step, "samples", sheet)

    def sheet(self) -> Image:
        """A row for each prompt, the same noise for teacher and student."""
        return self.run.sheet()

    def _finish(self) -> Path:
        run = self.run
        (picture,) = run.pictures(run.shown[:1], SHEET_SEED, STUDENT if run.one_step is not None else TEACHER)
        written = run.write(self.output, picture)
        logger.info("written: %s", ", ".join(map(str, written)))
        return written[0]


def learn(config: C, make: Callable[[C, Processes], FinetuningRun]) -> Path | None:
    """A whole finetuning run; returns the (first) file that it wrote.

    Raises:
        OSError, ValueError: with one line.
    """
    if config.pictures and os.path.realpath(config.output) == os.path.realpath(config.pictures):
        raise ValueError(one_line(f"output: {config.output} is the folder of pictures; name another, or one inside it"))
    advice = "take a smaller micro_batch, gradient_checkpointing=true or base_weights=fp8"
    return run_session(config, lambda processes: FinetuningSession(make(config, processes)), advice)
