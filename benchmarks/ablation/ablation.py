"""The paper's ablation on wadi-mini: what the student is (LoRaD, LoRA, DoRA, all weights) and its rank, at equal steps.

    python benchmarks/ablation/ablation.py screen        learning rates: a run of each kind at each of some rates
    python benchmarks/ablation/ablation.py run           every arm with three seeds, at the best rate of its kind
    python benchmarks/ablation/ablation.py page          docs/ablation.md and .png from what has been measured so far

All three go on where they were stopped: a run is a folder of the trainer, which goes on by itself, and what has been
measured is kept beside it. Seeds can be shared out (`run --seeds 0` here, `run --seeds 1 2` there). Settings of the trainer
can be added to `screen` and `run` as ``key=value``; those of ``trainer/configs/mini.yaml`` hold otherwise. The fake score
is the same in every arm, so that what differs is the student alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks.ablation import ablation_page
from benchmarks.quality import distances
from benchmarks.quality.degraded_scenes import Rough
from benchmarks.quality.mini_quality import DIVERSITY, GROUPS
from benchmarks.quality.openings import bare_pipeline
from benchmarks.quality.sets import Generated, Real, feature_set
from trainer.distill.estimate import empty_network, trained_parameters
from trainer.engine.optim import Diverged
from trainer.evaluation.efficientnet import load_lite
from trainer.evaluation.features import LiteFeatures
from trainer.settings import fields as settings
from trainer.settings.cli import DIVERGED
from trainer.settings.distillation import TrainConfig
from wadi_core import LoRaD, OneStepPipeline
from wadi_core.files import atomic_write, one_line
from wadi_core.lorad.checkpoint import read_header, read_tensors
from wadi_core.lorad.layers import student_layers
from wadi_core.output import take_any_text

ROOT = Path(__file__).resolve().parents[2]
PRESET = ROOT / "trainer" / "configs" / "mini.yaml"
SEEDS = (0, 1, 2)
FIGURES, SCREENING = "figures.json", "screening.json"  # what was measured of a run, and of one of the screening
RANKS = (8, 16, 32, 64)
KINDS = ("lorad", "lora", "dora", "full")
SCREENED = ("lorad", "lora-same-rank", "dora", "full")  # the arm of each kind that its rates are tried with
# Learning rates to try, for the preset's Muon, whose steps have one size per element whatever is trained. LoRA's product
# starts at zero as LoRaD's angles do; all weights move at once in "full". They are tried for as many steps as the arms have:
# a rate can be the best after a third of these and run off later, as LoRA's does.
RATES = {
    "lorad": (6e-3, 1.5e-2, 4e-2),
    "lora": (2.5e-3, 6e-3, 1.5e-2),
    "dora": (2.5e-3, 6e-3, 1.5e-2),
    "full": (1e-4, 3e-4, 1e-3, 3e-3),
}


@dataclass(frozen=True)
class Arm:
    """One thing to compare.

    Attributes:
        name: of its folder.
        label: for people.
        kind: of the student's adapter.
        rank: of the student's adapter.
        group: ``adapter`` or ``rank``, the table it stands in.
        parameters: how many numbers it trains.
    """

    name: str
    label: str
    kind: str
    rank: int
    group: str
    parameters: int


def arms(config: TrainConfig) -> list[Arm]:
    """Everything that is compared, around a LoRaD of the preset's rank."""
    network, _ = empty_network(config)
    layers, rank = student_layers(network), config.student_rank

    def count(kind: str, rank: int) -> int:
        return trained_parameters(network, layers, kind, rank)

    target = count("lorad", rank)
    matched = min(range(1, rank + 1), key=lambda other: abs(count("lora", other) - target))
    rows = [
        ("lorad", f"LoRaD, rank {rank}", "lorad", rank, "adapter"),
        ("lora-same-rank", f"LoRA, rank {rank}", "lora", rank, "adapter"),
        ("lora-same-size", f"LoRA, rank {matched} (as many parameters)", "lora", matched, "adapter"),
        ("dora", f"DoRA, rank {rank}", "dora", rank, "adapter"),
        ("full", "all weights", "full", rank, "adapter"),
        *((f"lorad-{other}", f"LoRaD, rank {other}", "lorad", other, "rank") for other in RANKS),
    ]
    return [Arm(*row, parameters=count(row[2], row[3])) for row in rows]


def train(folder: Path, arm: Arm, rate: float, seed: int, steps: int, words: Sequence[str], decay: int | None = None) -> Path:
    """The student of one run, trained to its end; goes on from where it was.

    Args:
        decay: steps in which the rate falls at the end; half of them by default.

    Raises:
        Diverged: it makes nothing but NaN or Inf at this rate. OSError: it failed or was stopped. Both with one line.
    """
    student = folder / "student.safetensors"
    last = folder / f"step-{steps:08d}.pt"
    if student.is_file() and last.is_file():
        return student
    given = [f"output={folder}", "name=student", f"adapter={arm.kind}", f"student_rank={arm.rank}"]
    given += [f"student_lr={rate:g}", f"seed={seed}", f"steps={steps}", "tensorboard=false", "save_lorad=false"]
    given += [f"decay_steps={steps // 2 if decay is None else decay}"]
    command = [sys.executable, str(ROOT / "trainer" / "train.py"), "--config", str(PRESET), *given, *words]
    status = subprocess.run(command, check=False).returncode
    if status == DIVERGED:
        raise Diverged(f"{folder}: this run diverged at a rate of {rate:g}")
    if status or not last.is_file():
        raise OSError(f"{folder}: this run did not come to its end; the same command goes on with it")
    return student


class Scales:
    """Measures students: distances to real scenes, retrieval of what the caption names, diversity.

    Args:
        work: where real scenes and their features are kept.
        count: pictures of each set.
        study: pictures from which the measure is learned.
        base: the base that was distilled.
    """

    def __init__(self, work: Path, count: int, study: int, base: str) -> None:
        self.work, self.count, self.base = work, count, base
        self.eye = LiteFeatures(load_lite())
        self.gauge = distances.Ruler.learn(work, self.eye, study)
        self.judge = distances.Judge.learn(work, self.eye, study, Rough(self._pipeline()))
        real, other = (feature_set(work, self.eye, Real(), stream, count) for stream in (GROUPS[0].real, GROUPS[0].other))
        self.floor = self.gauge.distances(other, real)["fd"]

    def _pipeline(self) -> OneStepPipeline:
        return bare_pipeline(self.base, "cpu")

    def distance(self, student: Path, count: int) -> dict[str, float]:
        """How far ``count`` pictures of one student's file are from as many real ones: enough to choose a rate by."""
        return self._distances(self._made(self._source(student), count))

    def weigh(self, student: Path) -> dict[str, float]:
        """All figures of one student's file."""
        source = self._source(student)
        made = self._made(source, self.count)
        found = self._distances(made)
        found["fd_above_floor"] = found["fd"] - self.floor
        found |= self.judge.retrieval(made, GROUPS[0].captions.shown(range(self.count)))
        spread = feature_set(self.work, self.eye, source, DIVERSITY, 64 * DIVERSITY.noises)
        return found | {"diversity": self.gauge.diversity(spread, DIVERSITY.noises)}

    def _made(self, source: Generated, count: int) -> np.ndarray:
        return feature_set(self.work, self.eye, source, GROUPS[0].captions, count)

    def _distances(self, made: np.ndarray) -> dict[str, float]:
        return self.gauge.distances(made, feature_set(self.work, self.eye, Real(), GROUPS[0].real, len(made)))

    def _source(self, student: Path) -> Generated:
        pipe, header = self._pipeline(), read_header(student)
        if any(name.endswith(".lorad_a") for name in header.places):
            pipe.set_lorad(LoRaD.load(student))
        else:  # a whole network
            pipe.base.unet.load_state_dict({name: tensor.float() for name, tensor in read_tensors(header).items()})
        return Generated(pipe, student.parent.name, bfloat16=True)


def measured(kept: Path, weigh: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures of a run, measured once and kept in a file of its folder."""
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    return keep(kept, weigh() | {"seconds": seconds_of(kept.parent)})


def keep(kept: Path, figures: dict[str, float]) -> dict[str, float]:
    """Write the figures of a run beside it; returns them."""
    with atomic_write(kept) as file:
        file.write((json.dumps(figures, indent=1) + "\n").encode())
    return figures


def seconds_of(folder: Path) -> float:
    """How long a run took, by its table of losses; the time of a run that was stopped counts once for each start."""
    rows = (folder / "losses.csv").read_text(encoding="utf-8").splitlines()
    column = rows[0].split(",").index("seconds")
    times = [float(row.split(",")[column]) for row in rows[1:]]
    return sum(time for time, after in zip(times, [*times[1:], 0.0], strict=True) if after < time)


def screening(options: argparse.Namespace, config: TrainConfig) -> Iterator[tuple[Arm, float, Path]]:
    """Every run of the screening: an arm of each kind, its rates and folders."""
    for arm in arms(config):
        if arm.name in SCREENED:
            for rate in RATES[arm.kind]:
                yield arm, rate, screen_folder(options, arm, rate)


def screen_folder(options: argparse.Namespace, arm: Arm, rate: float) -> Path:
    """Where the screening keeps a run."""
    return options.work / "screen" / f"{arm.name}-{rate:g}"


def folder_of(options: argparse.Namespace, arm: Arm, rate: float, seed: int) -> Path:
    """Where an arm's run is kept. A run of the screening with as many steps is that of the first seed, not made twice."""
    if arm.name in SCREENED and seed == SEEDS[0] and options.screen_steps == options.steps:
        return screen_folder(options, arm, rate)
    return options.work / arm.name / f"seed-{seed}"


def screened(options: argparse.Namespace, config: TrainConfig) -> dict[str, dict[float, float]]:
    """Kind -> rate -> distance; infinite where it diverged.

    Raises:
        OSError: the screening is not finished; one line.
    """
    found: dict[str, dict[float, float]] = {kind: {} for kind in KINDS}
    for arm, rate, folder in screening(options, config):
        kept = folder / SCREENING
        if not kept.is_file():
            raise FileNotFoundError(f"{kept}: the screening is not finished: python benchmarks/ablation/ablation.py screen")
        found[arm.kind][rate] = json.loads(kept.read_text(encoding="utf-8"))["fd"]
    return found


def best_rates(found: dict[str, dict[float, float]]) -> dict[str, float]:
    """Kind -> the rate with the smallest distance.

    Raises:
        ValueError: a kind diverged at each of its rates; one line.
    """
    for kind, tried in found.items():
        if not any(map(math.isfinite, tried.values())):
            raise ValueError(f"{kind} diverged at each of {', '.join(f'{rate:g}' for rate in tried)}: try lower rates")
    return {kind: min(tried, key=tried.__getitem__) for kind, tried in found.items()}


def screen(options: argparse.Namespace, config: TrainConfig, scales: Scales) -> None:
    """Train and measure every run of the screening; a rate at which it diverges is a bad one, and no reason to stop."""
    for arm, rate, folder in screening(options, config):
        if (folder / SCREENING).is_file():
            continue
        try:
            student = train(folder, arm, rate, SEEDS[0], options.screen_steps, options.settings)
        except Diverged as error:
            keep(folder / SCREENING, {"fd": math.inf})
            sys.stderr.write(f"{error}\n")
        else:
            weigh = partial(scales.distance, student, options.screen_count)
            told(f"screen {arm.name} at {rate:g}", measured(folder / SCREENING, weigh))


def run(options: argparse.Namespace, config: TrainConfig, scales: Scales) -> None:
    """Train and measure every arm with every seed asked for; all arms once before any of them twice."""
    rates = best_rates(screened(options, config))
    for seed in options.seeds:
        for arm in arms(config):
            rate = rates[arm.kind]
            folder = folder_of(options, arm, rate, seed)
            student = train(folder, arm, rate, seed, options.steps, options.settings)
            told(f"{arm.name}, seed {seed}", measured(folder / FIGURES, partial(scales.weigh, student)))


def report(options: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """All that has been measured, for the page."""
    rows, tried = [], screened(options, config)
    rates = best_rates(tried)
    for arm in arms(config):
        kept = [folder_of(options, arm, rates[arm.kind], seed) / FIGURES for seed in SEEDS]
        figures = [json.loads(path.read_text(encoding="utf-8")) for path in kept if path.is_file()]
        if figures:
            values = {name: [row[name] for row in figures] for name in figures[0]}
            about = {"label": arm.label, "kind": arm.kind, "group": arm.group, "rank": arm.rank, "parameters": arm.parameters}
            means = {name: mean(found) for name, found in values.items()}
            spreads = {name: stdev(found) if len(found) > 1 else 0.0 for name, found in values.items()}
            # Other work on the machine, or a pause, makes a run longer and never shorter.
            about |= {"seeds": len(figures), "shortest_seconds": min(values["seconds"])}
            rows.append({**about, "mean": means, "spread": spreads})
    if not rows:
        raise FileNotFoundError(f"{options.work}: nothing has been measured yet: python benchmarks/ablation/ablation.py run")
    shown = {"steps": options.steps, "batch": config.batch, "count": options.count}
    shown |= {"screen_steps": options.screen_steps, "screen_count": options.screen_count}
    told = {kind: {f"{rate:g}": fd if math.isfinite(fd) else None for rate, fd in row.items()} for kind, row in tried.items()}
    return {"rows": rows, "rates": rates, "screening": told, "settings": shown, "words": options.settings}


def told(what: str, figures: dict[str, float]) -> None:
    """One line for whoever is waiting."""
    sys.stderr.write(f"{what}: FD {figures['fd']:.2f}, {figures['seconds'] / 60:.1f} minutes\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("what", choices=("screen", "run", "page"))
    add("settings", nargs="*", metavar="key=value", help="settings of the trainer that win over the preset's")
    add("--steps", type=int, default=150, help="of every arm (default: 150)")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="for `run`: only these (default: all)")
    add("--screen-steps", type=int, default=150, help="of the screening (default: 150)")
    add("--count", type=int, default=5000, help="pictures of each set (default: 5000)")
    add("--screen-count", type=int, default=500, help="pictures of each set of the screening (default: 500)")
    add("--study", type=int, default=6000, help="pictures of each kind to learn the measure from (default: 6000)")
    add("--work", type=Path, default=Path("runs/ablation"), help="where runs are kept (default: runs/ablation)")
    add("--quality", type=Path, default=Path("runs/quality"), help="where sets are kept (default: runs/quality)")
    add("--output", type=Path, default=Path("docs"), help="where the page goes (default: docs)")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    take_any_text()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = _parser().parse_args(words)
    logging.getLogger("wadi").setLevel(logging.ERROR)
    try:
        config = settings.load(TrainConfig, PRESET, options.settings)
        if options.what == "page":
            ablation_page.write(report(options, config), options.output)
        else:
            scales = Scales(options.quality, options.count, options.study, config.base)
            (screen if options.what == "screen" else run)(options, config, scales)
    except (OSError, ValueError) as error:
        if options.debug:
            raise
        sys.stderr.write(f"ablation: error: {one_line(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
