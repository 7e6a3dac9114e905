"""Looking at a run: a table of losses, its curve as a picture, sheets of samples."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from wadi_core.files import atomic_write
from wadi_core.packages import missing

logger = logging.getLogger("wadi")


class LossTable:
    """Appends rows to ``losses.csv``; rows after ``step`` are dropped when a run goes on from an older checkpoint."""

    def __init__(self, path: str | os.PathLike[str], resume_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, float]] = []
        self._draws = True
        if resume_step and self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if row["step"] <= resume_step]

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


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str] = (), titles: Sequence[str] = ()
) -> Image.Image:
    """Pictures of one size in a grid, with a title over each column and a caption left of each row."""
    width, height = rows[0][0].size
    left = 190 if captions else 0
    top = 22 if titles else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (width + 4), top + len(rows) * (height + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((left + column * (width + 4) + 4, 5), title, fill="black")
    for index, row in enumerate(rows):
        y = top + index * (height + 4)
        if captions:
            words, lines = captions[index].split(), [""]
            for word in words:
                lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 28 else [lines[-1], word]
            draw.multiline_text((6, y + 6), "\n".join(lines), fill="black")
        for column, picture in enumerate(row):
            sheet.paste(picture, (left + column * (width + 4), y))
    return sheet
