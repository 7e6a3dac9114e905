"""Successive halving: every arm at the same budget, the best rate found, gone on where it was stopped, honest intervals."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from peft import OFTConfig, get_peft_model
from torch import nn

from benchmarks.ablation import halving
from benchmarks.ablation.ablation import PRESET, Arm
from trainer.models.adapters import oft_parameters
from trainer.settings import fields as settings
from trainer.settings.distillation import TrainConfig

LORAD, LORA = Arm("lorad", "LoRaD", "lorad", 48, "adapter", 10), Arm("lora", "LoRA", "lora", 37, "adapter", 10)


def options(work: Path, **changes: object) -> argparse.Namespace:
    given = {"work": work, "rates": 9, "steps": 450, "seeds": [0, 1], "settings": [], "screen_count": 8, **changes}
    return argparse.Namespace(**given)


def test_arms_train_as_many_numbers() -> None:
    arms = {arm.kind: arm for arm in halving.equal_arms(settings.load(TrainConfig, PRESET))}
    assert list(arms) == list(halving.KINDS)
    for kind, near in (("lora", 0.02), ("dora", 0.02), ("oft", 0.1)):  # blocks of OFT have to fit into each layer
        assert arms[kind].parameters == pytest.approx(arms["lorad"].parameters, rel=near)


@pytest.mark.parametrize(("inputs", "block"), [(64, 8), (64, 7), (96, 50), (64, 100), (72, 7)])
def test_numbers_of_oft_are_those_of_peft(inputs: int, block: int) -> None:
    model = nn.Sequential(nn.Linear(inputs, 16))
    made = get_peft_model(model, OFTConfig(r=0, oft_block_size=block, target_modules=["0"]))
    assert oft_parameters(inputs, block) == sum(p.numel() for p in made.parameters() if p.requires_grad)


def test_every_arm_gets_the_same_budget_and_its_best_rate() -> None:
    assert halving.rungs(9, 450) == [(9, 50), (3, 150), (1, 450)]
    assert halving.rungs(1, 450) == [(1, 450)]
    spent = {}
    for arm in (LORAD, LORA):
        rates = halving.rates_of(arm.kind, 9)
        assert rates == sorted(rates) and rates[-1] / rates[0] == pytest.approx(halving.SPREAD**2, rel=0.02)
        wanted = rates[6]
        trials = list(halving.halve(arm, 9, 450, lambda trial, wanted=wanted: abs(math.log(trial.rate / wanted))))
        assert trials[-1][0].rate == wanted and trials[-1][0].steps == 450
        spent[arm.kind] = [trial.steps for trial, _ in trials]
    assert spent["lorad"] == spent["lora"] == [50] * 9 + [150] * 3 + [450]


class Runs:
    """In place of training and measuring: students whose distance follows from rate and steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[tuple[str, float, int]] = []
        monkeypatch.setattr(halving, "train", self.train)

    def train(self, folder: Path, arm: Arm, rate: float, seed: int, steps: int, words: list, decay: int | None = None) -> Path:
        assert decay == 0 and words == [*halving.CONSTANT]
        self.trained.append((arm.name, rate, steps))
        if rate > 0.05:
            raise halving.Diverged("too fast")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "student").write_text(f"{rate} {steps}")
        return folder / "student"

    def distance(self, student: Path, count: int) -> dict[str, float]:
        rate, steps = map(float, student.read_text().split())
        return {"fd": abs(math.log(rate / 0.01)) + 1 / steps}


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch)
    left = [5]

    class Stops(halving.Deadline):
        def check(self) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise TimeoutError

    given = options(tmp_path)
    with pytest.raises(TimeoutError):
        halving.screen(given, [LORAD], halving.screen_trial(given, lambda: runs, Stops(0)))
    assert len(runs.trained) == 5
    left[0] = 1000
    best = halving.screen(given, [LORAD], halving.screen_trial(given, lambda: runs, Stops(0)))
    assert best == {"lorad": min(halving.rates_of("lorad", 9), key=lambda rate: abs(math.log(rate / 0.01)))}
    once = set(runs.trained)
    assert len(once) == len(runs.trained)  # what diverged was not tried again either
    halving.screen(given, [LORAD], halving.screen_trial(given, lambda: runs, Stops(0)))
    assert len(runs.trained) == len(once)
    with pytest.raises(TimeoutError):
        halving.Deadline(-1.0).check()


def test_a_difference_has_the_interval_of_the_textbook() -> None:
    first, second = [5.1, 6.0, 5.5, 5.9, 5.2], [4.8, 5.4, 5.4, 5.1, 5.0]
    apart = halving.difference(first, second)
    spread = math.sqrt(((0.3 - 0.4) ** 2 + (0.6 - 0.4) ** 2 + (0.1 - 0.4) ** 2 + (0.8 - 0.4) ** 2 + (0.2 - 0.4) ** 2) / 4)
    reach = 2.7764 * spread / math.sqrt(5)
    assert (apart.mean, apart.low, apart.high) == pytest.approx((0.4, 0.4 - reach, 0.4 + reach), abs=1e-3)
    assert apart.p == 2 / 32 and apart.certain
    none = halving.difference([1.0, 2.0, 3.0], [2.0, 1.0, 3.5])
    assert not none.certain and none.p > 0.5
    for df, t in enumerate(halving.T, 1):
        x = np.linspace(-t, t, 200_001)
        height = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        density = height * (1 + x**2 / df) ** (-(df + 1) / 2)
        assert (density[1:] + density[:-1]).sum() / 2 * (x[1] - x[0]) == pytest.approx(0.95, abs=1e-4)
    with pytest.raises(ValueError, match="at least two seeds"):
        halving.difference([1.0], [2.0])


def test_the_page_says_what_holds(tmp_path: Path) -> None:
    values = {"lorad": [5.0, 5.2, 5.1], "lora": [6.0, 6.3, 6.1]}
    for name, row in values.items():
        for seed, value in enumerate(row):
            place = tmp_path / "final" / name / f"seed-{seed}" / "figures.json"
            place.parent.mkdir(parents=True)
            place.write_text(json.dumps({"fd_above_floor": value, "rate": 0.01}))
    found = halving.measured(options(tmp_path, seeds=[0, 1, 2]), [LORAD, LORA])
    text = halving.page([LORAD, LORA], found)
    apart = statistics.mean(x - y for x, y in zip(values["lora"], values["lorad"], strict=True))
    assert f"| LoRA | 10 | 0.01 | 3 | 6.13 | {apart:+.2f} |" in text
    assert "- LoRA: worse than LoRaD, over 3 seeds." in text
    with pytest.raises(FileNotFoundError, match="nothing has been measured yet"):
        halving.page([LORAD], {})


def test_settings_of_the_screening_go_together() -> None:
    config: Callable[..., TrainConfig] = settings.load
    made = config(TrainConfig, PRESET, [*halving.CONSTANT, "decay_steps=0"])
    assert made.anchor_end == 1 and made.timestep_high_end == 0
