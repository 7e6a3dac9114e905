"""A run from its start, or from its newest checkpoint, to its end or to a signal: what is saved, written and shown."""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from wadi_core.files import atomic_write, one_line, sha256_of_file

from ..settings.fields import as_yaml
from .checkpoints import Checkpoints, DamagedCheckpoint, FolderLock, read_checkpoint, set_aside
from .logs import Events, LossTable, Progress, memory_in_use
from .optim import NonFiniteGuard
from .processes import Processes
from .signals import StepAbandoned, Stop, stop_signals
from .trackers import Trackers

logger = logging.getLogger("wadi")


class RunConfig(Protocol):
    """The settings that every run has."""

    output: str
    device: str
    resume: str
    steps: int
    batch: int
    micro_batch: int
    keep_last: int
    keep_every: int
    save_every: int
    log_every: int
    sheet_every: int
    tensorboard: bool


class Run(Protocol):
    """What a session drives: a distillation, or the finetuning on a few pictures."""

    config: Any  # a RunConfig; its class says the rest
    output: Path
    processes: Processes
    device: torch.device
    guard: NonFiniteGuard
    step: int

    def train_step(self, look: Callable[[], None]) -> dict[str, float]:
        """One step; ``look`` is called between network calls, and may leave it. Returns what to log."""
        ...

    def state(self) -> dict[str, Any]:
        """All that the run needs to go on bit for bit."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; ValueError if it belongs to another run, DamagedCheckpoint if it is damaged."""
        ...


R = TypeVar("R", bound=Run)


class Session(ABC, Generic[R]):
    """Drives a run. What kinds of runs do differently is :meth:`_show`, :meth:`_finish` and :meth:`_more_figures`.

    Args:
        run: at its start.

    Raises:
        OSError, ValueError: the output folder's checkpoints cannot be read, or are another run's; one line.
    """

    def __init__(self, run: R) -> None:
        self.run, self.output = run, run.output
        self.config: RunConfig = run.config
        self.first = run.processes.first
        self.checkpoints = Checkpoints(self.output, self.config.keep_last, self.config.keep_every)
        self._saved = -1  # the step of the newest checkpoint in the output folder
        self._resume()
        self.began, self.start = time.monotonic(), run.step
        self._sums: dict[str, list[float]] = {}
        self._stop = Stop()
        self._looked: float | None = None
        if self.first:
            with atomic_write(self.output / "config.yaml") as file:
                file.write(as_yaml(self.config).encode())
            self.table = LossTable(self.output / "losses.csv", run.step)
            self.events = self._trackers()
        self._over = False  # before all steps are done

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole, in all processes from the same."""
        damaged: dict[Path, str] = {}
        while found := self._agreed(damaged):
            path, state = found
            try:
                self.run.load_state(state)
                break
            except DamagedCheckpoint as error:
                if self.config.resume != "latest":
                    raise
                damaged[path] = str(error)
        if found is None or not self.first:
            return
        for path, why in damaged.items():
            logger.warning("%s: %s; it is kept as %s", path, why, set_aside(path).name)
        if found[0].parent.resolve() == self.output.resolve():
            self._saved = self.run.step
        done, steps = self.run.step, self.config.steps
        if done < steps:
            logger.info("the run goes on from step %d of %d (%s)", done, steps, found[0].name)
        else:
            fewer = f"; steps={steps} asks for no more" if done > steps else ""
            logger.info("finished, %d of %d steps%s; a larger steps= goes on from there", done, done, fewer)

    def _agreed(self, damaged: dict[Path, str]) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from, and what it holds; None to begin.

        Raises:
            OSError, ValueError: there is none that can be used, or processes have different ones; one line.
        """
        processes = self.run.processes
        found = processes.together(lambda: self._find(damaged))
        if processes.count == 1:
            return found
        each = processes.gather(None if found is None else (found[1]["step"], sha256_of_file(found[0])))
        if len(set(each)) > 1:
            other = next(rank for rank, one in enumerate(each) if one != each[0])
            has = [f"step {one[0]}" if one else "none" for one in (each[0], each[other])]
            same = ", with other contents" if has[0] == has[1] else ""
            raise ValueError(
                f"the processes do not go on from the same checkpoint: process 0 has {has[0]}, process {other} has {has[1]}"
                f"{same}; the output folder ({self.output}) has to be on a disk that all of them share, or the same on each"
            )
        return found

    def _find(self, damaged: dict[Path, str]) -> tuple[Path, dict[str, Any]] | None:
        """As :meth:`_agreed`, of this process alone."""
        wanted = self.config.resume
        if wanted == "new":
            if self.checkpoints.paths():
                raise ValueError(f"{self.output}: a run is here already, and resume=new; choose another output folder")
            return None
        if wanted == "latest":
            return self.checkpoints.newest(damaged)
        state = read_checkpoint(wanted)
        later = [path for path in self.checkpoints.paths() if Checkpoints.step_of(path) > state["step"]]
        if later:
            # They would win over what this run writes as soon as it is stopped and goes on.
            raise ValueError(
                f"{self.output} holds {later[-1].name}, which is newer than {wanted}: choose another output folder, "
                "or remove the newer checkpoints"
            )
        return Path(wanted), state

    def go(self) -> Path | None:
        """Train to the end, or to a signal; both leave a checkpoint and the student as it is then.

        Returns:
            the student's file, in the process that wrote it.
        """
        run, steps = self.run, self.config.steps
        with stop_signals(tell=self.first) as self._stop:
            with Progress(steps, run.step, shown=self.first) as progress, contextlib.suppress(StepAbandoned):
                while run.step < steps and not self._over:
                    values = run.train_step(self._look)
                    self._measure()
                    self._take(values, progress)
                    self._looked = None
            self.save()
            if self.first and run.step < steps and not self._over:
                logger.info("stopped after %d of %d steps; the same command goes on from there", run.step, steps)
            written = self._finish() if self.first else None
            if self.first:
                self.events.close()
            run.processes.wait()
        return written

    def _measure(self) -> None:
        """Take note of how long it takes from one look at the signals to the next."""
        now = time.monotonic()
        if self._looked is not None:
            self._stop.seconds = max(now - self._looked, 0.9 * self._stop.seconds)
        self._looked = now

    def _look(self) -> None:
        """Between two calls of a step: leave it if that was asked for in one of the processes.

        Raises:
            StepAbandoned: it was.
        """
        self._measure()
        if self.run.processes.any(bool(self._stop)):
            raise StepAbandoned

    def _take(self, values: dict[str, float], progress: Progress) -> None:
        """What follows a step."""
        step, config = self.run.step, self.config
        last = step == config.steps
        for name, value in values.items():
            self._sums.setdefault(name, []).append(value)
        progress.update(step)
        if self.first and (step % config.log_every == 0 or last):
            self._log(progress)
        if step % config.save_every == 0 and not last:
            self.save()
        if self.first and (step % config.sheet_every == 0 or last):
            self._show()
        self._over = self._judge(last)

    def save(self) -> None:
        """Write a checkpoint, unless this step has one; all processes take part, one of them writes.

        Raises:
            OSError: it cannot be written; the line says which checkpoint is the newest whole one.
        """
        processes = self.run.processes
        if processes.any(self._saved != self.run.step if self.first else False):
            state = self.run.state()
            processes.together(lambda: self._write(state) if self.first else None)

    def _write(self, state: dict[str, Any]) -> None:
        try:
            with self._stop.saving():
                path = self.checkpoints.save(self.run.step, state)
            self._saved = self.run.step
        except OSError as error:
            whole = self.checkpoints.paths()
            left = f"{whole[-1].name} is whole and the run goes on from it" if whole else "there is none from before"
            raise type(error)(one_line(f"{error}; make room and start again: {left}")) from error
        self._beside(path)

    def _log(self, progress: Progress) -> None:
        run = self.run
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        self._sums.clear()
        seconds = time.monotonic() - self.began
        speed = (run.step - self.start) * self.config.batch / max(seconds, 1e-9)
        memory = memory_in_use(run.device)
        figures = {name: f"{value:.3g}" for name, value in means.items() if not name.endswith("_norm")}
        progress.tell({**figures, "img/s": f"{speed:.3g}", "GB": f"{memory / 1e9:.1f}"})
        row = means | {"skipped": run.guard.total, "images_per_second": speed, "memory_bytes": memory, "seconds": seconds}
        row |= self._more_figures()
        self.table.add(run.step, row)
        self.events.scalars(run.step, row)

    def _more_figures(self) -> dict[str, float]:
        """Figures of the run as it is now, for the log."""
        return {}

    def _trackers(self) -> Trackers:
        """Where figures and sheets are shown beside the folder's own files."""
        return Trackers([Events(self.output / "events", self.run.step)] if self.config.tensorboard else [])

    def _beside(self, checkpoint: Path) -> None:
        """Write what else there is to keep with a checkpoint that has been written."""

    def _judge(self, last: bool) -> bool:
        """What is measured after a step, in all processes; whether the run ends here, in all of them the same."""
        return False

    @abstractmethod
    def _show(self) -> None:
        """Write charts and sheets of this step."""

    @abstractmethod
    def _finish(self) -> Path:
        """Write what was trained; returns the (first) file."""


def run_session(config: RunConfig, make: Callable[[Processes], Session[Any]], memory_advice: str) -> Path | None:
    """A whole run, from the lock on its output folder to its end.

    Args:
        make: the session, of the processes that train together; called once nobody else uses the folder.
        memory_advice: what helps where the GPU's memory is full.

    Returns:
        the (first) file that it wrote, in the process that wrote it.

    Raises:
        OSError, ValueError: with one line.
    """
    processes = Processes(config.device)
    lock = None
    try:
        # Before anything is loaded: a folder that cannot be used is found out at once.
        lock = processes.together(lambda: FolderLock(config.output) if processes.first else None)
        return make(processes).go()
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(f"the GPU's memory is full (micro_batch={config.micro_batch}): {memory_advice}") from error
    finally:
        if lock is not None:
            lock.release()
        processes.close()
