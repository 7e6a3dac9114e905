"""Looking at a run: its progress, a table of losses and their curve, events for TensorBoard."""

from __future__ import annotations

import csv
import io
import logging
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image
from tqdm import tqdm

from wadi_core.files import atomic_write
from wadi_core.packages import missing

from .checkpoints import set_aside

logger = logging.getLogger("wadi")

BAR = 10  # columns that a bar keeps beside its figures
SKIPPED = 2  # rows at the beginning, in which memory is found and files are read for the first time


class Progress:
    """How far a run is: a bar in a terminal, lines anywhere else (a file, Slurm, Docker).

    Args:
        steps: of the whole run.
        start: of them were done before.
        shown: say anything at all.
        unit: what is counted.
        file: a stream other than stderr.
    """

    def __init__(self, steps: int, start: int = 0, shown: bool = True, unit: str = "step", file: TextIO | None = None) -> None:
        self.steps, self.start, self.step, self.unit = steps, start, start, unit
        self.began = time.monotonic()
        file = file or sys.stderr
        self._shown = shown
        self._bar: tqdm | None = None
        if shown and start < steps and file is not None and file.isatty():
            width, shape, _ = self._layout({})
            self._bar = tqdm(total=steps, initial=start, unit=unit, mininterval=2, file=file, ncols=width, bar_format=shape)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int) -> None:
        """So many steps are done."""
        if self._bar is not None:
            self._bar.update(step - self.step)
        self.step = step

    def tell(self, figures: Mapping[str, str]) -> None:
        """Show figures of the last steps, beside the bar or in a line."""
        if self._bar is not None:
            self._bar.ncols, self._bar.bar_format, postfix = self._layout(figures)
            self._bar.set_postfix_str(postfix)
        elif self._shown:
            seconds = (time.monotonic() - self.began) / max(1, self.step - self.start)
            words = [f"{name} {value}" for name, value in figures.items()]
            words += [f"{seconds:.3g} s/{self.unit}", f"{duration(seconds * (self.steps - self.step))} left"]
            logger.info("%s %d of %d: %s", self.unit, self.step, self.steps, ", ".join(words))

    def tell_numbers(self, values: Mapping[str, float]) -> None:
        """:meth:`tell` with numbers."""
        self.tell({name: f"{value:.4g}" for name, value in values.items()})

    def _layout(self, figures: Mapping[str, str]) -> tuple[int, str | None, str]:
        """Columns of the terminal, the shape of the bar, and as many figures as leave it room."""
        width = shutil.get_terminal_size().columns
        room = width - BAR - len(f"100%|| {self.steps}/{self.steps} [00:00:00<00:00:00, 00.00{self.unit}/s]")
        chosen: list[str] = []
        for name, value in figures.items():
            if len(", ".join(["", *chosen, f"{name}={value}"])) > room:
                break
            chosen.append(f"{name}={value}")
        shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining}" if room < 0 else None
        return width, shape, ", ".join(chosen)


def duration(seconds: float) -> str:
    """A time as people say it, such as ``1 h 05 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def step_seconds(folder: str | os.PathLike[str]) -> float | None:
    """The median time of a run's steps by its ``losses.csv``; None where it does not say.

    Raises:
        OSError, ValueError: the table cannot be read.
    """
    with open(Path(folder) / "losses.csv", newline="", encoding="utf-8") as file:
        rows = [(float(row["step"]), float(row["seconds"])) for row in csv.DictReader(file) if row.get("seconds")]
    rows = rows[SKIPPED:] if len(rows) > SKIPPED + 1 else rows
    # Where a run went on after a stop its clock began again.
    times = [(y[1] - x[1]) / (y[0] - x[0]) for x, y in zip(rows, rows[1:], strict=False) if y[1] > x[1] and y[0] > x[0]]
    return statistics.median(times) if times else None


class LossTable:
    """Appends rows to ``losses.csv``; rows after ``step`` are dropped when a run goes on from an older checkpoint."""

    def __init__(self, path: str | os.PathLike[str], resume_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, float]] = []
        self._draws = True
        if resume_step and self.path.exists():
            try:
                with open(self.path, newline="", encoding="utf-8") as file:
                    rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
                self.rows = [row for row in rows if row["step"] <= resume_step]
            except (ValueError, TypeError, KeyError, csv.Error) as error:
                kept = set_aside(self.path).name
                logger.warning("%s is damaged (%s): it is kept as %s, and a new one begins", self.path, error, kept)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row and write the table anew (it is small: one row every so many steps)."""
        self.rows.append({"step": step, **values})
        names = list(dict.fromkeys(name for row in self.rows for name in row))

        text = io.StringIO(newline="")
        table = csv.DictWriter(text, names)
        table.writeheader()
        table.writerows(self.rows)
        with atomic_write(self.path) as file:
            file.write(text.getvalue().encode())

    def plot(self, path: str | os.PathLike[str], columns: Sequence[str], title: str) -> None:
        """Draw ``columns`` against the step, logarithmic, as one PNG; without matplotlib it is left out, which is said once."""
        if not self._draws:
            return
        try:
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot
        except ImportError as error:
            self._draws = False
            logger.info("no chart is drawn, the figures are in %s: %s", self.path.name, missing(error, "train"))
            return
        figure, axes = pyplot.subplots(figsize=(7, 3.6), dpi=120)
        for column in columns:
            if points := [(row["step"], row[column]) for row in self.rows if column in row]:
                axes.plot(*zip(*points, strict=True), label=column, linewidth=1.2)
        axes.set(xlabel="step", yscale="log", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
        figure.tight_layout()
        with atomic_write(path) as file:
            figure.savefig(file, format="png")
        pyplot.close(figure)


class Events:
    """Event files for TensorBoard; without tensorboard installed nothing is written, and that is said once.

    Args:
        folder: of the files.
        step: from which the run goes on: later events of an earlier start are dropped.
    """

    def __init__(self, folder: str | os.PathLike[str], step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info("tensorboard is not installed: no event files are written, the same figures are in losses.csv")
            self._writer = None
        else:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one number to each curve."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Add a picture."""
        if self._writer is not None:
            import numpy as np

            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU; on a CPU what this process has in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss
