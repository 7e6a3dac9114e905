"""How good wadi-mini is: teacher in many steps, teacher in one, student in one, against real scenes.

    python benchmarks/mini_quality.py                                   the model in this checkout
    python benchmarks/mini_quality.py --model runs/teacher --lorad runs/vsd/student.safetensors --output runs/look

Writes ``mini-quality.json`` (every figure, count and seed) and ``mini-quality.png`` (the same captions and noise side
by side, not chosen by eye). What is measured, and how, is in the report under "method". A run that was stopped goes
on where it was; sets whose weights and settings have not changed are taken from ``--work``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks import ruler
from benchmarks.sets import SAMPLERS, Generated, Real, Reconstructed, Source, feature_set, images_of
from benchmarks.streams import Stream
from trainer.efficientnet import load_lite
from trainer.features import GRAIN, Eye
from trainer.watch import contact_sheet
from wadi_core import OneStepPipeline, __version__, mini
from wadi_core import base as bases
from wadi_core.files import atomic_write, one_line
from wadi_core.pictures import to_pictures

SOURCES = ("autoencoder", "teacher", "teacher-one-step", "student")
DIVERSITY = Stream("diversity", 500_000_000, noises=8)
SHEET = (
    Stream("sheet-single", 600_000_000, pair=False, noises=2),
    Stream("sheet-pair", 610_000_000, pair=True, noises=2),
    Stream("sheet-held-out", 620_000_000, pair=True, held=True, noises=2),
)
SHEET_ROWS = 7  # of each kind
METHOD = {
    "features": "EfficientNet-Lite0 (ImageNet), mean of the last map, 1280 numbers, pictures enlarged to 224 px (bicubic)",
    "grain": "normal noise on every picture, real or generated, before its features; standard deviation in grey levels of 255",
    "fd": "Frechet distance after a PCA to 64 dimensions fitted on other real scenes, in float64",
    "fd_above_floor": "fd less the fd of two real sets of the same size",
    "kid": "unbiased, kernel (x.y/1280 + 1)^3 on all 1280 numbers, mean and standard error over disjoint blocks of 500",
    "retrieval_single": "pictures of one object whose nearest prototype of all objects is the one in the caption",
    "retrieval_pair": "pictures of two objects whose two nearest prototypes are the two in the caption",
    "retrieval_pair_each": "objects in pictures of two that are among the two nearest prototypes",
    "diversity": "mean distance between pictures of one caption and other noise, in the 64 dimensions",
    "captions": "of generated pictures: from other scenes of the same distribution as the real ones",
}


@dataclass(frozen=True)
class Group:
    """Two real sets and the captions of the generated ones, all of one distribution."""

    name: str
    real: Stream
    other: Stream
    captions: Stream


GROUPS = (
    Group("main", *(Stream("main", seed) for seed in (200_000_000, 300_000_000, 400_000_000))),
    Group(
        "held-out",
        *(Stream("held-out", seed, pair=True, held=True) for seed in (210_000_000, 310_000_000, 410_000_000)),
    ),
)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and the contact sheet written on the way.

    Raises:
        OSError, ValueError: a file is missing or does not fit; one line.
    """
    work, count = Path(options.work), options.count
    eye = Eye(load_lite().to(options.device), options.grain)
    gauge = ruler.Ruler.learn(work, eye, options.study)

    def features(source: Source, stream: Stream, pictures: int = count) -> np.ndarray:
        return feature_set(work, eye, source, stream, pictures)

    def diversity(source: Source) -> float:
        return gauge.diversity(features(source, DIVERSITY, options.diversity_captions * DIVERSITY.noises), DIVERSITY.noises)

    references, groups, columns = {}, {}, {}
    for group in GROUPS:
        references[group.name] = features(Real(), group.real)
        floor = gauge.distances(features(Real(), group.other), references[group.name])
        ceiling = gauge.retrieval(references[group.name], group.real.shown(range(count)))
        groups[group.name] = {"real against real": floor, "real": ceiling, "sets": {}}
    groups["main"]["real"]["diversity"] = diversity(Real())
    for key, source in _sources(options):
        for group in GROUPS[:1] if isinstance(source, Reconstructed) else GROUPS:
            # The autoencoder's pictures are those of the other real set, so that the floor is their own.
            stream = group.other if isinstance(source, Reconstructed) else group.captions
            made = features(source, stream)
            found = gauge.distances(made, references[group.name])
            found["fd_above_floor"] = found["fd"] - groups[group.name]["real against real"]["fd"]
            groups[group.name]["sets"][key] = found | gauge.retrieval(made, stream.shown(range(count)))
        if isinstance(source, Generated):
            groups["main"]["sets"][key]["diversity"] = diversity(source)
            columns[key] = [_pictures(work, source, stream) for stream in SHEET]
    if columns:
        _write_sheet(Path(options.output) / "mini-quality.png", columns, options.steps)
    return {
        "command": _command(options),
        "wadi": __version__,
        "machine": _machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]},
        "method": METHOD,
        "settings": {
            "pictures_per_set": count,
            "study_pictures": 2 * options.study,
            "pca_variance_kept": gauge.projection.kept,
            "teacher_steps": options.steps,
            "guidance": options.guidance,
            "sampler": options.sampler,
            "many_steps_and_decoding_in": "float32" if options.float32 else "bfloat16",
            "grain": options.grain,
            "diversity": {"captions": options.diversity_captions, "noises": DIVERSITY.noises},
        },
        "seeds": _seeds(),
        "groups": groups,
        "ratios": {name: ratios(group["sets"]) for name, group in groups.items()},
    }


def _sources(options: argparse.Namespace) -> Iterator[tuple[str, Source]]:
    """What is measured, one after the other: all share one pipeline, whose LoRaD is changed between them."""
    device = torch.device(options.device)
    pipe = OneStepPipeline(bases.load(options.model, device, torch.float32), device, torch.float32)
    one = {"pipe": pipe, "batch": options.batch, "bfloat16": not options.float32}
    many = {"guidance": options.guidance, "sampler": options.sampler}
    if "autoencoder" in options.only:
        yield "autoencoder", Reconstructed(pipe, bfloat16=not options.float32)
    if "teacher" in options.only:
        yield "teacher", Generated(**one, **many, name="teacher", steps=options.steps)
    if "teacher-one-step" in options.only:
        yield "teacher-one-step", Generated(**one, name="teacher-one-step")
    if "student" in options.only:
        pipe.set_lorad(options.lorad or mini.lorad_path())
        yield "student", Generated(**one, name="student")


def ratios(sets: dict[str, dict[str, float]]) -> dict[str, float]:
    """What decides whether a student is trained: its figures over the teacher's, where both were measured."""
    found = {}
    student = sets.get("student", {})
    for other, label in (("teacher", "student_over_teacher"), ("teacher-one-step", "student_over_teacher_one_step")):
        for figure in ("fd_above_floor", "kid", "retrieval_single", "retrieval_pair", "diversity"):
            below = sets.get(other, {}).get(figure)
            if figure in student and below:
                found[f"{label}_{figure}"] = student[figure] / below
    return found


def _pictures(work: Path, source: Generated, stream: Stream) -> list[Any]:
    return to_pictures(images_of(work, source, stream, SHEET_ROWS * stream.noises))


def _write_sheet(path: Path, columns: dict[str, list[list[Any]]], steps: int) -> None:
    """Rows of captions; for each noise the pictures of all generators side by side."""
    titles = {"teacher": f"teacher, {steps} steps", "teacher-one-step": "teacher, 1 step", "student": "student, 1 step"}
    rows, captions = [], []
    for kind, stream in enumerate(SHEET):
        for row in range(SHEET_ROWS):
            indices = range(row * stream.noises, (row + 1) * stream.noises)
            captions.append(stream.scene(indices.start).caption + (" (held out)" if stream.held else ""))
            rows.append([columns[key][kind][index] for index in indices for key in columns])
    picture = contact_sheet(rows, captions, [titles[key] for key in columns] * SHEET[0].noises)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        picture.save(file, "png", optimize=True)


def _seeds() -> dict[str, Any]:
    streams = {"study_single": ruler.SINGLE, "study_pair": ruler.PAIR, "diversity": DIVERSITY}
    streams |= {stream.name.replace("-", "_"): stream for stream in SHEET}
    for group in GROUPS:
        name = group.name.replace("-", "_")
        streams |= {f"{name}_real": group.real, f"{name}_other_real": group.other, f"{name}_generated": group.captions}
    return {name: stream.first for name, stream in streams.items()}


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cores": cores}
    if hasattr(os, "sysconf"):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return found


def _command(options: argparse.Namespace) -> str:
    """The command line; of a path outside of this folder only the name."""
    words = [Path(word).name if os.path.isabs(word) else word for word in options.words]
    return shlex.join(["python", "benchmarks/mini_quality.py", *words])


def table(report: dict[str, Any]) -> str:
    """The figures as a Markdown table for each group."""
    lines = []
    for name, group in report["groups"].items():
        rows = {"real": group["real against real"] | group["real"], **group["sets"]}
        figures = list(dict.fromkeys(figure for row in rows.values() for figure in row))
        lines += [f"| {name} | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
        for key, row in rows.items():
            cells = (f"{row[figure]:.4g}" if figure in row else "" for figure in figures)
            lines.append(f"| {key} | " + " | ".join(cells) + " |")
        lines += ["", *(f"{label}: {value:.3f}" for label, value in report["ratios"][name].items()), ""]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--count", type=int, default=5000, help="pictures of each set (default: 5000)")
    add("--study", type=int, default=6000, help="pictures of one object, and of two, to learn from (default: 6000 each)")
    add("--diversity-captions", type=int, default=64, metavar="N", help="captions, 8 pictures each (default: 64)")
    add("--output", default="docs", metavar="DIR", help="where the report and the sheet go (default: docs)")
    add("--work", default="runs/quality", metavar="DIR", help="where sets are kept (default: runs/quality)")
    add("--model", default="mini", metavar="DIR", help="teacher in diffusers layout (default: the one in the package)")
    add("--lorad", metavar="FILE", help="the student's adapter (default: the one in the package)")
    add("--only", nargs="+", choices=SOURCES, default=list(SOURCES), help="measure these alone")
    add("--steps", type=int, default=25, help="of the teacher (default: 25)")
    add("--guidance", type=float, default=3.0, help="of the teacher in many steps (default: 3)")
    add("--sampler", choices=SAMPLERS, default="dpm", help="dpm (DPM-Solver++, default) or ddim")
    add("--float32", action="store_true", help="many steps and decoding in float32 too, not in bfloat16")
    add("--grain", type=float, default=GRAIN, help=f"on every picture, in grey levels (default: {GRAIN:g}; see features.py)")
    add("--batch", type=int, default=64, help="pictures a network call (default: 64)")
    add("--device", default="cpu", help="cpu (default), cuda and so on")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = _parser()
    words = sys.argv[1:] if words is None else list(words)
    options = parser.parse_args(words)
    options.words = words
    if options.count < 2 or options.batch < 1 or options.steps < 2 or options.diversity_captions < 1 or options.grain < 0:
        parser.error("at least 2 pictures, 2 steps, 1 caption, batches of 1 and grain of 0 are needed")
    if "student" in options.only and options.model != "mini" and not options.lorad:
        parser.error("--model needs --lorad, or --only without the student")
    logging.getLogger("wadi").setLevel(logging.ERROR)  # that one call of the bare teacher is blurred is the point here
    try:
        report = measure(options)
        path = Path(options.output) / "mini-quality.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())
    except (OSError, ValueError) as error:
        if options.debug:
            raise
        sys.stderr.write(f"mini_quality: error: {one_line(error)}\n")
        return 1
    sys.stdout.write(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
