"""The picture of an analysis, drawn with Pillow: every host has it, and no plotting library is needed."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import atomic_write

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    from .analysis import Analysis

WIDTH, HEIGHT = 1500, 640
FINER = 3  # drawn larger by this factor and reduced, which makes edges smooth
INK, QUIET, GRID, PAPER = "#1f2933", "#6b7785", "#e4e8ec", "#ffffff"
KINDS = {
    "self-attention": "#2f6fb5",
    "cross-attention": "#d1682b",
    "feed-forward": "#3d9a6b",
    "other": "#8a6bb0",
}

Point = tuple[float, float]


def kind_of(path: str) -> str:
    """What a layer does, as the picture colours it: one of :data:`KINDS`."""
    parts = {"attn1": "self-attention", "attn2": "cross-attention", "ff": "feed-forward"}
    return next((kind for part, kind in parts.items() if f".{part}." in path), "other")


def picture(analysis: Analysis, title: str) -> bytes:
    """An analysis drawn as the paper's motivation figure is drawn: a PNG with two panels.

    Left, each layer's norm change against its direction change, with the means over all layers; right, the energy at
    30 % of the rank, layer by layer in the network's order.
    """
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (28, 34), title, 26, INK, "lm")
    _draw_changes(draw, analysis)
    _draw_energy(draw, analysis)
    content = io.BytesIO()
    sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(content, "png")
    return content.getvalue()


def plot(analysis: Analysis, path: str | os.PathLike[str], title: str = "What distillation changed") -> Path:
    """Write :func:`picture` as a file.

    Raises:
        OSError: it cannot be written; one line.
    """
    content = picture(analysis, title)
    with atomic_write(path) as file:
        file.write(content)
    return Path(path)


def _draw_changes(draw: ImageDraw, analysis: Analysis) -> None:
    # One scale for both, so that how far apart they are is seen; a network turned by LoRaD lies on the floor.
    most = max(*(max(layer.norm, layer.direction) for layer in analysis.layers), 1e-9) * 1.08
    panel = _Panel(draw, (76, 116, 640, 560), (0.0, most), (0.0, most))
    panel.frame("norm against direction, a dot a layer", "direction change, %", "norm change, %")
    panel.scale_x(_ticks(most))
    panel.scale_y(_ticks(most))
    for layer in analysis.layers:
        panel.dot((layer.direction, layer.norm), KINDS[kind_of(layer.path)])
    norm, direction = analysis.norm.mean, analysis.direction.mean
    panel.line((direction, 0.0), (direction, most))
    panel.line((0.0, norm), (most, norm))
    panel.cross((direction, norm))
    kinds = [kind for kind in KINDS if any(kind_of(layer.path) == kind for layer in analysis.layers)]
    rows = [(kind, KINDS[kind]) for kind in kinds]
    panel.legend([*rows, (f"mean: norm {norm:.2f} %, direction {direction:.2f} %", INK)])


def _draw_energy(draw: ImageDraw, analysis: Analysis) -> None:
    panel = _Panel(draw, (760, 116, 1470, 560), (-1.0, float(len(analysis.layers))), (0.0, 105.0))
    mean = None if analysis.energy is None else 100 * analysis.energy.mean
    title = "energy of the directions' change at 30 % of the rank"
    panel.frame(title if mean is None else f"{title}, mean {mean:.1f} %", "layer, in the network's order", "energy kept, %")
    panel.scale_x(_ticks(len(analysis.layers)))
    panel.scale_y([0.0, 20.0, 40.0, 60.0, 80.0, 100.0])
    for place, layer in enumerate(analysis.layers):
        if layer.energy is not None:
            panel.dot((float(place), 100 * layer.energy), KINDS[kind_of(layer.path)])
    if mean is not None:
        panel.line((-1.0, mean), (float(len(analysis.layers)), mean), INK)


class _Panel:
    """One diagram: a rectangle on the sheet, and the ranges of values that it shows."""

    def __init__(self, draw: ImageDraw, box: tuple[int, int, int, int], across: Point, up: Point) -> None:
        self.draw, self.box, self.across, self.up = draw, box, across, up

    def place(self, point: Point) -> Point:
        """Where a point of values lies on the sheet."""
        left, top, right, bottom = self.box
        x = left + (point[0] - self.across[0]) / (self.across[1] - self.across[0]) * (right - left)
        y = bottom - (point[1] - self.up[0]) / (self.up[1] - self.up[0]) * (bottom - top)
        return x, y

    def frame(self, title: str, across: str, up: str) -> None:
        left, top, right, bottom = self.box
        _write(self.draw, (left, top - 36), title, 18, QUIET, "lm")
        _write(self.draw, (left - 34, top - 12), up, 15, INK, "lm")
        _write(self.draw, ((left + right) / 2, bottom + 46), across, 16, INK, "mm")
        _stroke(self.draw, [(left, top), (left, bottom), (right, bottom)], QUIET, 1)

    def scale_x(self, values: Sequence[float]) -> None:
        for value in values:
            x, _ = self.place((value, self.up[0]))
            _stroke(self.draw, [(x, self.box[3]), (x, self.box[3] + 5)], QUIET, 1)
            _write(self.draw, (x, self.box[3] + 18), f"{value:g}", 14, QUIET, "mm")

    def scale_y(self, values: Sequence[float]) -> None:
        for value in values:
            _, y = self.place((self.across[0], value))
            if y < self.box[3]:
                _stroke(self.draw, [(self.box[0] + 1, y), (self.box[2], y)], GRID, 1)
            _write(self.draw, (self.box[0] - 8, y), f"{value:g}", 14, QUIET, "rm")

    def dot(self, point: Point, colour: str) -> None:
        x, y = self.place(point)
        _disc(self.draw, (x, y), 3.5, colour)

    def cross(self, point: Point) -> None:
        x, y = self.place(point)
        for dx, dy in ((7, 0), (0, 7)):
            _stroke(self.draw, [(x - dx, y - dy), (x + dx, y + dy)], INK, 3)

    def line(self, start: Point, end: Point, colour: str = QUIET) -> None:
        """A dashed line."""
        (x0, y0), (x1, y1) = self.place(start), self.place(end)
        count = max(1, int(math.hypot(x1 - x0, y1 - y0) / 9))
        for step in range(count):
            begin, stop = step / count, (step + 0.55) / count
            ends = [(x0 + (x1 - x0) * part, y0 + (y1 - y0) * part) for part in (begin, stop)]
            _stroke(self.draw, ends, colour, 1.5)

    def legend(self, rows: Sequence[tuple[str, str]]) -> None:
        font = _font(15)
        width = max(font.getlength(text) for text, _ in rows) / FINER
        x, y = self.box[2] - width, self.box[1] + 14.0
        back = (x - 26, y - 14, self.box[2] + 4, y + 22 * len(rows) - 8)
        self.draw.rectangle([side * FINER for side in back], PAPER)
        for text, colour in rows:
            _disc(self.draw, (x - 13, y), 4.5, colour)
            _write(self.draw, (x, y), text, 15, INK, "lm")
            y += 22


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 to ``most``, five or so."""
    rough = most / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * count for count in range(int(most / step) + 1)]


def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL.ImageFont import load_default

    return load_default(size * FINER)


def _write(draw: ImageDraw, place: Point, text: str, size: int, colour: str, anchor: str) -> None:
    draw.text((place[0] * FINER, place[1] * FINER), text, colour, _font(size), anchor=anchor)


def _stroke(draw: ImageDraw, points: Sequence[Point], colour: str, width: float) -> None:
    draw.line([(x * FINER, y * FINER) for x, y in points], colour, round(width * FINER))


def _disc(draw: ImageDraw, centre: Point, radius: float, colour: str) -> None:
    x, y = centre
    draw.ellipse([side * FINER for side in (x - radius, y - radius, x + radius, y + radius)], colour)
