"""How good wadi-mini is: teacher in many steps, teacher in one, student in one, against real scenes.

    python benchmarks/quality/mini_quality.py                                   the model in this checkout
    python benchmarks/quality/mini_quality.py --model runs/teacher --lorad runs/vsd/student.safetensors --output runs/look

Writes ``mini-quality.json`` (every figure, count and seed) and ``mini-quality.png`` (the same captions and noise side
by side, not chosen by eye). What is measured, and how, is in the report under "method". A run that was stopped goes
on where it was; sets whose weights and settings have not changed are taken from ``--work``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from benchmarks import report
from benchmarks.quality import distances
from benchmarks.quality.degraded_scenes import Rough
from benchmarks.quality.sets import Generated, Real, Reconstructed, Source, feature_set, images_of
from benchmarks.quality.streams import Stream
from trainer.evaluation.efficientnet import load_lite
from trainer.evaluation.features import LiteFeatures
from trainer.models.placement import set_attention
from wadi_core import OneStepPipeline, mini
from wadi_core import base as bases
from wadi_core.output import take_any_text
from wadi_core.pictures import to_pictures
from wadi_core.sheets import contact_sheet

SOURCES = ("rough", "autoencoder", "teacher", "teacher-one-step", "student")
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
    "prototypes": "of clean real scenes, and of as many that were smeared, bent and had noise on their latents",
    "retrieval_single": "pictures of one object whose nearest prototype of all objects is the one in the caption",
    "retrieval_single_strict": "the same with prototypes of clean real scenes alone",
    "retrieval_pair": "pictures of two objects whose two nearest prototypes are the two in the caption",
    "retrieval_pair_each": "objects in pictures of two that are among the two nearest prototypes",
    "diversity": "mean distance between pictures of one caption and other noise, in the 64 dimensions",
    "rough": "real scenes as the prototypes know them beside the clean ones: says how well the judge names such",
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
    eye = LiteFeatures(load_lite().to(options.device), options.grain)
    gauge = distances.Ruler.learn(work, eye, options.study)
    pipe = _pipeline(options)
    judge = distances.Judge.learn(work, eye, options.study, Rough(pipe, bfloat16=not options.float32))

    def features(source: Source, stream: Stream, pictures: int = count) -> np.ndarray:
        return feature_set(work, eye, source, stream, pictures)

    def diversity(source: Source) -> float:
        return gauge.diversity(features(source, DIVERSITY, options.diversity_captions * DIVERSITY.noises), DIVERSITY.noises)

    references, groups, columns = {}, {}, {}
    for group in GROUPS:
        references[group.name] = features(Real(), group.real)
        floor = gauge.distances(features(Real(), group.other), references[group.name])
        ceiling = judge.retrieval(references[group.name], group.real.shown(range(count)))
        groups[group.name] = {"real against real": floor, "real": ceiling, "sets": {}}
    groups["main"]["real"]["diversity"] = diversity(Real())
    for key, source in _sources(options, pipe):
        for group in GROUPS if isinstance(source, Generated) else GROUPS[:1]:
            # Rough pictures and the autoencoder's are those of the other real set, so that the floor is their own.
            stream = group.captions if isinstance(source, Generated) else group.other
            made = features(source, stream)
            found = gauge.distances(made, references[group.name])
            found["fd_above_floor"] = found["fd"] - groups[group.name]["real against real"]["fd"]
            groups[group.name]["sets"][key] = found | judge.retrieval(made, stream.shown(range(count)))
        if isinstance(source, Generated):
            groups["main"]["sets"][key]["diversity"] = diversity(source)
            columns[key] = [_pictures(work, source, stream) for stream in SHEET]
    if columns:
        _write_sheet(Path(options.output) / "mini-quality.png", columns, options.steps)
    return {
        **report.origin("mini_quality", options.words),
        "method": METHOD,
        "settings": {
            **report.how(options),
            "pca_variance_kept": gauge.projection.kept,
            "diversity": {"captions": options.diversity_captions, "noises": DIVERSITY.noises},
        },
        "seeds": _seeds(),
        "groups": groups,
        "ratios": {name: ratios(group["sets"]) for name, group in groups.items()},
    }


def _pipeline(options: argparse.Namespace) -> OneStepPipeline:
    device = torch.device(options.device)
    pipe = OneStepPipeline(bases.load(options.model, device, torch.float32), device, torch.float32)
    width, height = pipe.native_size
    set_attention(pipe.base.unet, "auto", device, width * height // bases.FACTOR**2)  # a tenth faster on a CPU
    return pipe


def _sources(options: argparse.Namespace, pipe: OneStepPipeline) -> Iterator[tuple[str, Source]]:
    """What is measured, one after the other: all share one pipeline, whose LoRaD is changed between them."""
    one = {"pipe": pipe, "batch": options.batch, "bfloat16": not options.float32}
    many = {"guidance": options.guidance, "sampler": options.sampler}
    if "rough" in options.only:
        yield "rough", Rough(pipe, bfloat16=not options.float32)
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
    report.write_picture(path, picture)


def _seeds() -> dict[str, Any]:
    streams = {"study_single": distances.SINGLE, "study_pair": distances.PAIR, "diversity": DIVERSITY}
    streams |= {stream.name.replace("-", "_"): stream for stream in SHEET}
    for group in GROUPS:
        name = group.name.replace("-", "_")
        streams |= {f"{name}_real": group.real, f"{name}_other_real": group.other, f"{name}_generated": group.captions}
    return {name: stream.first for name, stream in streams.items()}


def tables(found: dict[str, Any]) -> str:
    """The figures as a Markdown table for each group, and the ratios that decide."""
    parts = []
    for name, group in found["groups"].items():
        rows = {"real": group["real against real"] | group["real"], **group["sets"]}
        parts += [
            report.table(name, rows),
            *(f"{label}: {value:.3f}\n" for label, value in found["ratios"][name].items()),
            "\n",
        ]
    return "".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--count", type=int, default=5000, help="pictures of each set (default: 5000)")
    add("--diversity-captions", type=int, default=64, metavar="N", help="captions, 8 pictures each (default: 64)")
    add("--only", nargs="+", choices=SOURCES, default=list(SOURCES), help="measure these alone")
    report.add_options(parser)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    take_any_text()
    parser = _parser()
    options = report.read_options(parser, words)
    if options.diversity_captions < 1:
        parser.error("at least 1 caption is needed")

    def act() -> str:
        found = measure(options)
        report.write_json(Path(options.output) / "mini-quality.json", found)
        return tables(found)

    return report.ended("mini_quality", options.debug, act)


if __name__ == "__main__":
    sys.exit(main())
