"""A run from its start, or from its newest checkpoint, to its end or to a signal: what is saved, written and shown."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from wadi_core import pictures
from wadi_core.files import atomic_write, one_line

from ..distill import export
from ..distill.angles import angles_by_block
from ..distill.distillation import Distillation
from ..distill.roles import FAKE, STUDENT
from ..models.adapters import LoRaDAdapter
from ..settings.distillation import TrainConfig
from ..settings.fields import as_yaml
from .checkpoints import Checkpoints, FolderLock, read_checkpoint
from .logs import Events, LossTable, contact_sheet, memory_in_use
from .processes import Processes
from .signals import stop_signals

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("wadi")

SHEET_SEEDS = (0, 100)  # of the first picture in each row
PLOTTED = ("fake_loss", "vsd_grad", "x0_std")


class Session:
    """Drives a :class:`~trainer.distill.distillation.Distillation`.

    Args:
        run: the distillation, at its start.

    Raises:
        OSError, ValueError: the output folder's checkpoints cannot be read, or are another run's; one line.
    """

    def __init__(self, run: Distillation) -> None:
        self.run, self.config, self.output = run, run.config, run.output
        self.first = run.processes.first
        self.checkpoints = Checkpoints(self.output, self.config.keep, self.config.keep_every)
        self._resume()
        self.began, self.start = time.monotonic(), run.step
        self._sums: dict[str, list[float]] = {}
        if self.first:
            with atomic_write(self.output / "config.yaml") as file:
                file.write(as_yaml(self.config).encode())
            self.table = LossTable(self.output / "losses.csv", run.step)
            self.angles = LossTable(self.output / "angles.csv", run.step)
            self.events = Events(self.output / "events", run.step) if self.config.tensorboard else None

    def _resume(self) -> None:
        wanted = self.config.resume
        if wanted == "new":
            if self.checkpoints.paths():
                raise ValueError(f"{self.output}: a run is here already, and resume=new; choose another output folder")
            return
        state = self.checkpoints.latest() if wanted == "latest" else read_checkpoint(wanted)
        if state is None:
            return
        later = [path for path in self.checkpoints.paths() if Checkpoints.step_of(path) > state["step"]]
        if later and wanted != "latest":
            # They would win over what this run writes as soon as it is stopped and goes on.
            raise ValueError(
                f"{self.output} holds {later[-1].name}, which is newer than {wanted}: choose another output folder, "
                "or remove the newer checkpoints"
            )
        self.run.load_state(state)
        if self.first:
            logger.info("the run goes on from step %d of %d", self.run.step, self.config.steps)

    def go(self) -> Path | None:
        """Train to the end, or to a signal; both leave a checkpoint and the student as it is then.

        Returns:
            the student's file, in the process that wrote it.
        """
        run = self.run
        with stop_signals() as caught, self._bar() as bar:
            stopped = run.processes.any(bool(caught))
            while run.step < self.config.steps and not stopped:
                self._take(run.train_step(), bar)
                stopped = run.processes.any(bool(caught))
            self.save()
        written = self._finish() if self.first else None
        run.processes.wait()
        return written

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.config.steps, initial=self.run.step, unit="step", mininterval=2, disable=None if self.first else True
        )

    def _take(self, values: dict[str, float], bar: tqdm) -> None:
        """What follows a step."""
        step, config = self.run.step, self.config
        last = step == config.steps
        for name, value in values.items():
            self._sums.setdefault(name, []).append(value)
        bar.update()
        if self.first and (step % config.log_every == 0 or last):
            self._log(bar)
        if step % config.save_every == 0 and not last:
            self.save()
        if self.first and (step % config.sheet_every == 0 or last):
            self._show()

    def save(self) -> None:
        """Write a checkpoint; all processes take part, one of them writes.

        Raises:
            OSError: it cannot be written; the line says which checkpoint is the newest whole one.
        """
        state = self.run.state()
        if not self.first:
            return
        try:
            self.checkpoints.save(self.run.step, state)
        except OSError as error:
            whole = self.checkpoints.paths()
            left = f"{whole[-1].name} is whole and the run goes on from it" if whole else "there is none from before"
            raise type(error)(one_line(f"{error}; make room and start again: {left}")) from error

    def _log(self, bar: tqdm) -> None:
        run = self.run
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        self._sums.clear()
        seconds = time.monotonic() - self.began
        speed = (run.step - self.start) * self.config.batch / max(seconds, 1e-9)
        memory = memory_in_use(run.device)
        shown = {name: f"{value:.3g}" for name, value in means.items() if not name.endswith("_norm")}
        bar.set_postfix({**shown, "img/s": f"{speed:.3g}", "GB": f"{memory / 1e9:.1f}"})
        row = means | {"skipped": run.guard.total, "images_per_second": speed, "memory_bytes": memory, "seconds": seconds}
        if run.average:
            row["ema_distance"] = self._average_distance()
        self.table.add(run.step, row)
        if self.events is not None:
            self.events.scalars(run.step, row)

    @torch.no_grad()
    def _average_distance(self) -> float:
        """How far the student is from its average, as a share of the student's own length."""
        live = self.run.student().parameters
        apart = sum((live[name] - value).square().sum() for name, value in self.run.average.items())
        length = sum(parameter.square().sum() for parameter in live.values())
        return float((apart / length).sqrt())

    def _show(self) -> None:
        step = self.run.step
        found = {}
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
        if self.events is not None:
            self.events.close()
        (picture,) = self.run.pictures(self.run.prompts.shown[:1], SHEET_SEEDS[0])
        path = export.export(self.run, self.output, picture)
        if self.run.step < self.config.steps:
            logger.info("stopped after %d of %d steps; the same command goes on from there", self.run.step, self.config.steps)
        logger.info("the student is %s", path)
        return path


def train(config: TrainConfig) -> Path | None:
    """A whole run; returns the student's file, in the process that wrote it.

    Raises:
        OSError, ValueError: with one line.
    """
    processes = Processes(config.device)
    # Before anything is loaded: a folder that cannot be used is found out at once.
    lock = FolderLock(config.output) if processes.first else None
    try:
        return Session(Distillation(config, processes)).go()
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU's memory is full (micro_batch={config.micro_batch}): take a smaller micro_batch, "
            "gradient_checkpointing=true or base_weights=fp8; --dry-run shows where the memory goes"
        ) from error
    finally:
        if lock is not None:
            lock.release()
        processes.close()
