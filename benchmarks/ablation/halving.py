"""Which adapter learns best, each at its own best learning rate: a screening by successive halving, then seeds.

    python benchmarks/ablation/halving.py screen         rates of each arm, ever fewer of them for ever more steps
    python benchmarks/ablation/halving.py final          each arm at its best rate, several seeds
    python benchmarks/ablation/halving.py page           docs/halving.md: differences, with their intervals

All go on where they were stopped; `--hours H` begins no further run after that time. Every arm gets the same number of rates
and the same steps for them, so none is tuned longer than another. Runs of one seed see the same captions and noise in all
arms, and their students are judged on the same captions and noise. So arms are compared seed by seed, and what a seed does to
all of them falls out of the difference. Settings of the trainer can be added as ``key=value``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.ablation.ablation import PRESET, RATES, Arm, Scales, keep, told, train
from trainer.distill.estimate import empty_network, trained_parameters
from trainer.engine.optim import Diverged
from trainer.settings import fields as settings
from trainer.settings.distillation import TrainConfig
from wadi_core.files import atomic_write, one_line
from wadi_core.lorad.layers import student_layers
from wadi_core.output import take_any_text

KINDS = ("lorad", "lora", "dora", "oft", "full")
LABELS = {"lorad": "LoRaD", "lora": "LoRA", "dora": "DoRA", "oft": "OFT", "full": "all weights"}
MIDDLE = {kind: math.sqrt(min(rates) * max(rates)) for kind, rates in RATES.items()} | {"oft": RATES["lorad"][1]}
SPREAD = 4.0  # the smallest and the largest rate are so many times smaller and larger than the middle one
ETA = 3  # of the rates of a rung one in so many goes on, for so many times the steps
CONSTANT = ("anchor_end=1", "timestep_high_end=0")  # while screening no rate falls: a rung goes on where the last one ended
# Student's t at 97.5 % for 1 to 30 degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
     2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def equal_arms(config: TrainConfig) -> list[Arm]:
    """A LoRaD of the preset's rank, and each other adapter at the rank with which it trains as many numbers."""
    network, _ = empty_network(config)
    layers, rank = student_layers(network), config.student_rank
    target = trained_parameters(network, layers, "lorad", rank)

    def arm(kind: str) -> Arm:
        own = rank
        if kind not in ("lorad", "full"):
            own = min(range(2, 4 * rank), key=lambda other: abs(trained_parameters(network, layers, kind, other) - target))
        size = "" if kind == "full" else f", {'blocks of' if kind == 'oft' else 'rank'} {own}"
        return Arm(kind, LABELS[kind] + size, kind, own, "adapter", trained_parameters(network, layers, kind, own))

    return [arm(kind) for kind in KINDS]


def rates_of(kind: str, count: int) -> list[float]:
    """So many learning rates, evenly spaced by their logarithms."""
    places = [2 * index / (count - 1) - 1 if count > 1 else 0.0 for index in range(count)]
    return [float(f"{MIDDLE[kind] * SPREAD**place:.3g}") for place in places]


def rungs(count: int, steps: int) -> list[tuple[int, int]]:
    """(rates, steps) of each rung, the last of a single rate at ``steps``."""
    levels = [count]
    while levels[-1] > 1:
        levels.append(math.ceil(levels[-1] / ETA))
    return [(left, max(1, round(steps / ETA ** (len(levels) - 1 - level)))) for level, left in enumerate(levels)]


@dataclass(frozen=True)
class Trial:
    """One run of the screening: an arm at a rate, for so many steps."""

    arm: Arm
    rate: float
    steps: int


Judged = Callable[[Trial], float]  # the distance of its student; infinite where it diverged


def halve(arm: Arm, count: int, steps: int, judged: Judged) -> Iterator[tuple[Trial, float]]:
    """Every trial of an arm with its distance, rung by rung; the last one is at the best rate."""
    left = rates_of(arm.kind, count)
    for keeping, length in rungs(count, steps):
        left = left[:keeping]
        found = []
        for rate in sorted(left):
            trial = Trial(arm, rate, length)
            found.append((judged(trial), rate))
            yield trial, found[-1][0]
        left = [rate for _, rate in sorted(found)]


@dataclass(frozen=True)
class Difference:
    """How much farther one arm is than another, over seeds that they share.

    Attributes:
        mean, low, high: of the differences, with the interval that holds the true one in 95 of 100 such studies.
        p: how often signs that were thrown at random would show at least as large a difference.
        seeds: how many.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out no difference at all."""
        return self.low > 0 or self.high < 0


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """first - second, seed by seed: Student's interval, and the exact test by flipped signs.

    Raises:
        ValueError: fewer than two seeds, or not as many of each.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"a difference needs at least two seeds that both arms have, not {len(first)} and {len(second)}")
    apart = [x - y for x, y in zip(first, second, strict=True)]
    middle, count = mean(apart), len(apart)
    reach = T[min(count - 1, len(T)) - 1] * stdev(apart) / math.sqrt(count)
    flips = [abs(mean(sign * x for sign, x in zip(signs, apart, strict=True))) for signs in product((1, -1), repeat=count)]
    p = sum(flip >= abs(middle) - 1e-12 for flip in flips) / len(flips)
    return Difference(middle, middle - reach, middle + reach, p, count)


class Deadline:
    """Begins no run after some hours."""

    def __init__(self, hours: float) -> None:
        self._end = time.monotonic() + 3600 * hours if hours else math.inf

    def check(self) -> None:
        """Raises TimeoutError after the end; one line."""
        if time.monotonic() > self._end:
            raise TimeoutError("the hours are over; the same command goes on from here")


def screen_trial(options: argparse.Namespace, scales: Callable[[], Scales], deadline: Deadline) -> Judged:
    """Trains and measures a trial, or reads what was measured of it before."""

    def judged(trial: Trial) -> float:
        folder = options.work / "screen" / f"{trial.arm.name}-{trial.rate:g}"
        kept = folder / f"rung-{trial.steps}.json"
        if kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))["fd"]
            return math.inf if found is None else found
        if (folder / "diverged").is_file():
            return math.inf
        deadline.check()
        words = [*CONSTANT, *options.settings]
        try:
            student = train(folder, trial.arm, trial.rate, options.seeds[0], trial.steps, words, decay=0)
        except Diverged as error:
            sys.stderr.write(f"{error}\n")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "diverged").write_text("", encoding="utf-8")
            return math.inf
        return keep(kept, scales().distance(student, options.screen_count))["fd"]

    return judged


def screen(options: argparse.Namespace, arms: Sequence[Arm], judged: Judged) -> dict[str, float]:
    """The best rate of each arm.

    Raises:
        ValueError: an arm diverged at each rate; one line. TimeoutError: the hours are over.
    """
    best = {}
    for arm in arms:
        trials = list(halve(arm, options.rates, options.steps, judged))
        if not any(map(math.isfinite, (distance for _, distance in trials))):
            raise ValueError(f"{arm.label} diverged at each of its rates: try lower ones")
        last, _ = trials[-1]
        best[arm.name] = last.rate
        tried = rates_of(arm.kind, options.rates)
        edge = " (at the edge of what was tried: the best may lie outside)" if last.rate in (tried[0], tried[-1]) else ""
        sys.stderr.write(f"{arm.label}: rate {last.rate:g}{edge}\n")
    return best


def final(
    options: argparse.Namespace, arms: Sequence[Arm], best: dict[str, float], scales: Callable[[], Scales], deadline: Deadline
) -> None:
    """Each arm at its best rate with every seed, all arms once before any of them twice."""
    for seed in options.seeds:
        for arm in arms:
            folder = options.work / "final" / arm.name / f"seed-{seed}"
            if not (folder / "figures.json").is_file():
                deadline.check()
                student = train(folder, arm, best[arm.name], seed, options.steps, options.settings)
                found = keep(folder / "figures.json", scales().weigh(student) | {"rate": best[arm.name]})
                told(f"{arm.name}, seed {seed}", found | {"seconds": 0.0})


def measured(options: argparse.Namespace, arms: Sequence[Arm]) -> dict[str, dict[int, dict[str, float]]]:
    """Arm -> seed -> figures, as far as they have been taken."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for arm in arms:
        for seed in options.seeds:
            kept = options.work / "final" / arm.name / f"seed-{seed}" / "figures.json"
            if kept.is_file():
                found.setdefault(arm.name, {})[seed] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def page(arms: Sequence[Arm], found: dict[str, dict[int, dict[str, float]]], figure: str = "fd_above_floor") -> str:
    """The page: each arm, and how far it is from LoRaD.

    Raises:
        FileNotFoundError: nothing has been measured yet; one line.
    """
    first = found.get("lorad")
    if not first:
        raise FileNotFoundError("nothing has been measured yet: python benchmarks/ablation/halving.py final")
    lines = ["# Adapters, each at its own best learning rate", ""]
    lines += [
        "| student | parameters | rate | seeds | FD above floor | farther than LoRaD by | 95 % interval | p |",
        "|---" * 8 + "|",
    ]
    said = []
    for arm in arms:
        if not (own := found.get(arm.name)):
            continue
        values = [figures[figure] for figures in own.values()]
        cells = [
            arm.label,
            f"{arm.parameters:,}",
            f"{next(iter(own.values()))['rate']:g}",
            str(len(own)),
            f"{mean(values):.2f}",
        ]
        shared = sorted(set(own) & set(first))
        if arm.name != "lorad" and len(shared) > 1:
            apart = difference([own[seed][figure] for seed in shared], [first[seed][figure] for seed in shared])
            cells += [f"{apart.mean:+.2f}", f"{apart.low:+.2f} to {apart.high:+.2f}", f"{apart.p:.3f}"]
            what = "worse" if apart.mean > 0 else "better"
            verdict = f"{what} than LoRaD" if apart.certain else "not told apart from LoRaD"
            said.append(f"- {arm.label}: {verdict}, over {apart.seeds} seeds.")
        else:
            cells += ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "The interval is Student's, over the differences seed by seed; p is of the exact test by flipped signs, which",
    ]
    lines += ["with five seeds cannot come below 0.0625.", "", *said]
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("what", choices=("screen", "final", "page"))
    add("settings", nargs="*", metavar="key=value", help="settings of the trainer that win over the preset's")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="arms (default: all)")
    add("--rates", type=int, default=9, help="learning rates of each arm (default: 9)")
    add("--steps", type=int, default=450, help="of the last rung and of the finalists (default: 450)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of the finalists; the first is the screening's")
    add("--hours", type=float, default=0.0, help="begin no run after so many hours (default: no limit)")
    add("--count", type=int, default=5000, help="pictures of each set (default: 5000)")
    add("--screen-count", type=int, default=500, help="pictures of each set of the screening (default: 500)")
    add("--study", type=int, default=6000, help="pictures of each kind to learn the measure from (default: 6000)")
    add("--work", type=Path, default=Path("runs/halving"), help="where runs are kept (default: runs/halving)")
    add("--quality", type=Path, default=Path("runs/quality"), help="where sets are kept (default: runs/quality)")
    add("--output", type=Path, default=Path("docs/halving.md"), help="the page (default: docs/halving.md)")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    take_any_text()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = _parser().parse_args(words)
    logging.getLogger("wadi").setLevel(logging.ERROR)
    made: list[Scales] = []

    def scales() -> Scales:
        """Made when something is to be measured: learning the measure takes minutes."""
        if not made:
            made.append(Scales(options.quality, options.count, options.study, config.base))
        return made[0]

    try:
        config: Any = settings.load(TrainConfig, PRESET, options.settings)
        arms = [arm for arm in equal_arms(config) if arm.kind in options.kinds]
        if options.what == "page":
            text = page(arms, measured(options, arms))
            with atomic_write(options.output) as file:
                file.write(text.encode())
            return 0
        deadline = Deadline(options.hours)
        best = screen(options, arms, screen_trial(options, scales, deadline))
        if options.what == "final":
            final(options, arms, best, scales, deadline)
    except TimeoutError as error:
        sys.stderr.write(f"halving: {error}\n")
    except (OSError, ValueError) as error:
        if options.debug:
            raise
        sys.stderr.write(f"halving: error: {one_line(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
