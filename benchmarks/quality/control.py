"""Whether a ControlNet that was trained for the multi-step teacher steers the one-step student as well.

    python benchmarks/quality/control.py                                        the model in this checkout
    python benchmarks/quality/control.py --model runs/teacher --lorad runs/vsd/student.safetensors --controlnet runs/canny

Edges of real scenes are the control maps; captions do not tell places, and of two objects every other caption names
only one. Writes ``mini-control.json`` (every figure, count and seed) and ``mini-control.png`` (the same maps, captions
and noise side by side, not chosen by eye). A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.quality import distances
from benchmarks.quality.sets import Generated, Real, Source, digest, grain_seeds, images_of, measured
from benchmarks.quality.streams import Stream
from trainer.evaluation.efficientnet import load_lite
from trainer.evaluation.features import LiteFeatures
from trainer.mini import scenes
from trainer.mini.controlnet import told_in_part
from trainer.mini.edges import agreement, control_maps, edges
from wadi_core import OneStepPipeline, mini
from wadi_core import base as bases
from wadi_core.control import ControlNet, Steered, Steering, load
from wadi_core.output import take_any_text
from wadi_core.pictures import to_pictures
from wadi_core.sheets import contact_sheet

TOLERANCES = (1, 2)  # pixels
FEATURES = 1280
SHEET_ROWS = 10
STRENGTHS = (1.0, 0.7)  # of the one-step LoRaD
CONTROL = "control"
TARGETS = {"f1_over_teacher": 0.85, "fd_above_floor_over_teacher": 1.3}
METHOD = {
    "control map": "canny (thresholds 100, 200) of the real scene whose caption the picture has",
    "captions": "tell no places; of scenes with two objects every other caption names only one of them",
    "f1_N": "edges of the picture against the map: an edge pixel is right if one of the other lies at most N pixels away",
    "bare, control": "without and with the ControlNet",
    "student at 0.7": "with the one-step LoRaD at this strength",
    "f1_N_gain": "f1_N with the ControlNet less f1_N without it, of the same network",
    "f1_N_over_teacher": "a student's gain over the teacher's",
    "fd_above_floor_over_teacher": "with the ControlNet",
    "features, grain, fd, kid": "as in mini-quality.json",
    "fd_above_floor": "fd less the fd of two real sets of the same size",
}


@dataclass(frozen=True)
class InPart(Stream):
    """Scenes of which captions tell only a part: of every other one with two objects, the one object."""

    def captions(self, rows: range) -> list[str]:
        plans = ((index, self.scene(index)) for index in rows)
        return [told_in_part(plan, index // 2) if index % 2 else plan.caption for index, plan in plans]

    def maps(self, rows: range) -> Tensor:
        """(n, 128, 128) bool: the edges of the scenes."""
        return edges(scenes.draw(self.scene(index)) for index in rows)

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"captions": "in part"}


REAL = Stream("control-real", 220_000_000)
OTHER = Stream("control-other", 320_000_000)
CAPTIONS = InPart("control", 420_000_000)
SHEET = InPart("sheet-control", 620_000_000)


@dataclass(frozen=True)
class Controlled(Generated):
    """What a pipeline makes when a ControlNet steers it by the edges of the scenes.

    Attributes:
        controlnet: the ControlNet.
        scale: of what it adds.
    """

    controlnet: ControlNet | None = None
    scale: float = 1.0

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"controlnet": digest([self.controlnet.network]), "scale": self.scale}

    def network(self, stream: InPart, rows: range) -> Callable[..., Any]:
        maps = control_maps(stream.maps(rows)).to(self.pipe.device)
        return Steered(self.pipe.base.unet, [Steering(self.controlnet.network, maps, self.scale)])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and the contact sheet written on the way.

    Raises:
        OSError, ValueError: a file is missing or does not fit; one line.
    """
    work, count = Path(options.work), options.count
    eye = LiteFeatures(load_lite().to(options.device), options.grain)
    gauge = distances.Ruler.learn(work, eye, options.study)

    def looked_at(source: Source, stream: Stream) -> np.ndarray:
        """Features, and how well the edges agree with those of the stream's scenes at each tolerance."""

        def look(images: Tensor, rows: range) -> Tensor:
            found = eye(images, grain_seeds(stream, rows))
            if not isinstance(stream, InPart):
                return found
            drawn, wanted = edges(to_pictures(images)), stream.maps(rows)
            return torch.cat([found, *(agreement(drawn, wanted, tolerance)[:, None] for tolerance in TOLERANCES)], dim=1)

        kind = "features-edges" if isinstance(stream, InPart) else "features"
        return measured(work, source, stream, count, f"{kind}-grain-{eye.grain:g}", look)

    reference = looked_at(Real(), REAL)
    floor = gauge.distances(looked_at(Real(), OTHER), reference)
    sets, columns = {}, {}
    for key, source in _sources(options):
        found = looked_at(source, CAPTIONS)
        figures = gauge.distances(found[:, :FEATURES], reference)
        figures["fd_above_floor"] = figures["fd"] - floor["fd"]
        agreements = found[:, FEATURES:].mean(0)
        sets[key] = figures | {f"f1_{n}": float(one) for n, one in zip(TOLERANCES, agreements, strict=True)}
        columns[key] = to_pictures(images_of(work, source, SHEET, SHEET_ROWS))
    _write_sheet(Path(options.output) / "mini-control.png", columns)
    return {
        **report.origin("control", options.words),
        "method": METHOD,
        "settings": {
            **report.how(options),
            "control_scale": options.scale,
        },
        "seeds": {stream.name: stream.first for stream in (distances.SINGLE, distances.PAIR, REAL, OTHER, CAPTIONS, SHEET)},
        "real against real": floor,
        "sets": sets,
        "gains": gains(sets),
        "targets": TARGETS,
    }


def _sources(options: argparse.Namespace) -> Iterator[tuple[str, Generated]]:
    """What is measured, one after the other: all share one pipeline, whose LoRaD is changed between them."""
    device = torch.device(options.device)
    pipe = OneStepPipeline(bases.load(options.model, device, torch.float32), device, torch.float32)
    controlnet = load(options.controlnet, pipe.base, device, torch.float32)
    one = {"pipe": pipe, "batch": options.batch, "bfloat16": not options.float32}
    many = {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}
    lorad = options.lorad or mini.lorad_path()
    students = {report.student_at(strength): ((lorad, strength), {}) for strength in options.strengths}
    for who, (one_step, how) in {"teacher": (None, many), **students}.items():
        pipe.set_lorad(one_step)
        yield f"{who}, {report.BARE}", Generated(**one, **how, name=who)
        yield f"{who}, {CONTROL}", Controlled(**one, **how, name=f"{who}-{CONTROL}", controlnet=controlnet, scale=options.scale)


def gains(sets: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What control gains the teacher and the students, and the students' figures over the teacher's."""
    found = report.gains(sets, [f"f1_{tolerance}" for tolerance in TOLERANCES])
    teacher = sets[f"teacher, {CONTROL}"]["fd_above_floor"]
    for key, row in found.items():
        if not key.startswith("teacher"):
            row["fd_above_floor_over_teacher"] = sets[key]["fd_above_floor"] / teacher
    return found


def _write_sheet(path: Path, columns: dict[str, list[Any]]) -> None:
    rows = range(SHEET_ROWS)
    scene = [scenes.draw(SHEET.scene(index)) for index in rows]
    maps = to_pictures(control_maps(SHEET.maps(rows)) * 2 - 1)
    shown = [scene, maps, *columns.values()]
    titles = ["scene", "its edges", *columns]
    picture = contact_sheet([[column[row] for column in shown] for row in rows], SHEET.captions(rows), titles)
    report.write_picture(path, picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--count", type=int, default=5000, help="pictures of each set (default: 5000)")
    add("--controlnet", default="mini", metavar="DIR", help="the ControlNet (default: the one in the package)")
    add("--scale", type=float, default=1.0, help="of what the ControlNet adds (default: 1)")
    add("--strengths", nargs="+", type=float, default=STRENGTHS, metavar="S", help="of the one-step LoRaD (default: 1 0.7)")
    report.add_options(parser)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    take_any_text()
    parser = _parser()
    options = report.read_options(parser, words)
    if options.model != "mini" and options.controlnet == "mini":
        parser.error("--model needs --controlnet")

    def act() -> str:
        found = measure(options)
        report.write_json(Path(options.output) / "mini-control.json", found)
        rows = {"real": found["real against real"], **found["sets"]}
        return report.table("control", rows) + report.table("gains", found["gains"])

    return report.ended("control", options.debug, act)


if __name__ == "__main__":
    sys.exit(main())
