"""The ablation's benchmark: what is compared, that it goes on where it was stopped, and its page."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import pytest
import torch

from benchmarks.ablation import ablation, ablation_page
from benchmarks.quality.sets import Generated
from trainer.settings import fields as settings
from trainer.settings.cli import DIVERGED
from trainer.settings.distillation import TrainConfig
from wadi_core.lorad.checkpoint import write_safetensors


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return settings.load(TrainConfig, ablation.PRESET)


def test_every_arm_of_the_paper_is_there(config: TrainConfig) -> None:
    arms = {arm.name: arm for arm in ablation.arms(config)}
    assert {arm.kind for arm in arms.values()} == set(ablation.KINDS)
    assert [arms[f"lorad-{rank}"].rank for rank in (8, 16, 32, 64)] == [8, 16, 32, 64]
    lorad, same_rank, same_size = (arms[name] for name in ("lorad", "lora-same-rank", "lora-same-size"))
    assert lorad.rank == same_rank.rank == config.student_rank and same_rank.parameters > lorad.parameters
    assert same_size.rank < lorad.rank
    assert abs(same_size.parameters / lorad.parameters - 1) < 0.02
    assert arms["dora"].parameters > same_rank.parameters  # the norms
    assert arms["full"].parameters > 5 * lorad.parameters


class Runs:
    """In place of the trainer: runs that are over at once, some of which diverge or are stopped."""

    def __init__(self) -> None:
        self.started: list[dict[str, str]] = []
        self.status: Callable[[dict[str, str]], int] = lambda given: 0

    def __call__(self, command: list[str], check: bool) -> subprocess.CompletedProcess:
        given = dict(word.split("=", 1) for word in command[4:])
        self.started.append(given)
        status, folder = self.status(given), Path(given["output"])
        if status in (0, DIVERGED):
            folder.mkdir(parents=True, exist_ok=True)
        if status == 0:
            (folder / "student.safetensors").touch()
            (folder / f"step-{int(given['steps']):08d}.pt").touch()
            (folder / "losses.csv").write_text("step,seconds\n1,60\n2,120\n3,30\n")
        return subprocess.CompletedProcess(command, status)


class Figures:
    """In place of the measurement: in the screening better the nearer a rate is to 3e-3, after it all the same."""

    def __init__(self, *_: object) -> None:
        pass

    def weigh(self, student: Path) -> dict[str, float]:
        far = 0.0
        if student.parent.parent.name == "screen":
            rate = re.search(r"-([0-9.]+(e-[0-9]+)?)$", student.parent.name)
            far = abs(math.log10(float(rate[1]) / 3e-3))
        return {"fd": 20.0 + far} | {name: 10.0 for name, _, _ in ablation_page.FIGURES}

    def distance(self, student: Path, count: int) -> dict[str, float]:
        return {"fd": self.weigh(student)["fd"]}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    stand_in = Runs()
    monkeypatch.setattr(ablation.subprocess, "run", stand_in)
    monkeypatch.setattr(ablation, "Scales", Figures)
    return stand_in


def words(what: str, folder: Path) -> list[str]:
    return [what, "batch=2", "--work", str(folder / "runs"), "--output", str(folder / "docs"), "--steps", "5"]


def test_it_goes_on_where_it_was_stopped(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert ablation.main(words("run", tmp_path)) == 1
    assert "the screening is not finished" in capsys.readouterr().err
    runs.status = lambda given: DIVERGED if given["adapter"] == "full" and given["student_lr"] == "0.003" else 0
    assert ablation.main(words("screen", tmp_path)) == 0
    tried = sum(map(len, ablation.RATES.values()))
    assert len(runs.started) == tried and "diverged at a rate of 0.003" in capsys.readouterr().err
    assert ablation.main(words("screen", tmp_path)) == 0
    assert len(runs.started) == tried  # nothing is done twice
    runs.started.clear()
    runs.status = lambda given: 1 if len(runs.started) == 4 else 0
    assert ablation.main(words("run", tmp_path)) == 1
    assert "the same command goes on with it" in capsys.readouterr().err
    assert ablation.main(words("page", tmp_path)) == 0
    assert ablation.main(words("run", tmp_path)) == 0
    assert len(runs.started) == 27 + 1
    assert all(given["batch"] == "2" and given["steps"] == "5" for given in runs.started)
    assert {given["seed"] for given in runs.started} == {"0", "1", "2"}
    assert {given["student_lr"] for given in runs.started if given["adapter"] == "lorad"} == {"0.006"}
    assert ablation.main(words("page", tmp_path)) == 0
    page = (tmp_path / "docs" / "ablation.md").read_text()
    ranks = [rank for rank in (8, 16, 32, 48, 64) if f"| LoRaD, rank {rank} |" in page.split("## Rank")[1]]
    assert "| LoRaD, rank 48 |" in page.split("## Rank")[0] and ranks == [8, 16, 32, 48, 64] and "batch=2" in page
    assert page.count("--count 5000 batch=2") == 3 and "not significant" in page and "0.83" in page
    assert json.loads((tmp_path / "docs" / "ablation.json").read_text())["rows"][0]["mean"]["seconds"] == 150
    assert (tmp_path / "docs" / "ablation.png").stat().st_size > 1000
    rates = page.split("## Learning rates")[1]
    assert "| full | " in rates and " diverged |" in rates
    assert "| FD at a rate of | 0.0001 | 0.0003 | 0.001 | 0.0025 | 0.003 | 0.006 | 0.015 | 0.04 |" in rates
    assert "| lorad |  |  |  |  |  | **20.3** | 20.7 | 21.1 |" in rates
    assert str(tmp_path) not in page


def test_seeds_can_be_shared_out(runs: Runs, tmp_path: Path) -> None:
    assert ablation.main(words("screen", tmp_path)) == 0
    runs.started.clear()
    assert ablation.main([*words("run", tmp_path), "--seeds", "1"]) == 0
    assert len(runs.started) == 9 and {given["seed"] for given in runs.started} == {"1"}
    assert ablation.main([*words("run", tmp_path), "--seeds", "0", "2"]) == 0
    assert len(runs.started) == 27
    assert ablation.main(words("run", tmp_path)) == 0  # all of them: nothing is left to do
    assert len(runs.started) == 27


def test_the_screening_s_runs_are_those_of_the_first_seed(runs: Runs, tmp_path: Path) -> None:
    assert ablation.main([*words("screen", tmp_path), "--screen-steps", "5"]) == 0
    runs.started.clear()
    assert ablation.main([*words("run", tmp_path), "--screen-steps", "5"]) == 0
    first = [given for given in runs.started if given["seed"] == "0"]
    assert {Path(given["output"]).parent.name for given in first} == {"lora-same-size"} | {f"lorad-{r}" for r in ablation.RANKS}
    assert len(runs.started) == 27 - len(ablation.SCREENED)
    assert ablation.main([*words("page", tmp_path), "--screen-steps", "5"]) == 0
    report = json.loads((tmp_path / "docs" / "ablation.json").read_text())
    assert [row["seeds"] for row in report["rows"]] == [3] * 9


def test_a_kind_without_a_rate_is_named(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs.status = lambda given: DIVERGED if given["adapter"] == "dora" else 0
    assert ablation.main(words("screen", tmp_path)) == 0
    capsys.readouterr()
    assert ablation.main(words("run", tmp_path)) == 1
    assert "dora diverged at each of 0.0025, 0.006, 0.015" in capsys.readouterr().err


def test_students_of_both_kinds_of_files_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRaD and a whole network with the same weights are the same student."""
    folder, made = networks.write_base(tmp_path / "model")
    unet = made["unet"]
    lorad = networks.random_lorad(unet)
    lorad.save(tmp_path / "lorad.safetensors", dtype=torch.float32)
    lorad.fuse_into(unet)
    write_safetensors(tmp_path / "whole.safetensors", dict(unet.state_dict()), {"format": "pt"})
    seen: list[torch.Tensor] = []

    def look(work: Path, eye: object, source: object, stream: object, count: int) -> np.ndarray:
        if isinstance(source, Generated):
            seen.append(source.latents(stream, range(2)))
        return np.zeros((count, 2))

    scales = ablation.Scales.__new__(ablation.Scales)
    scales.work, scales.count, scales.base, scales.eye, scales.floor = tmp_path, 4, str(folder), None, 1.0

    class Gauge:
        distances = staticmethod(lambda made, real: {"fd": 3.0, "kid": 0.1})
        diversity = staticmethod(lambda made, noises: 2.0)

    class Judge:
        retrieval = staticmethod(lambda made, shown: {"retrieval_single": 0.5, "retrieval_pair": 0.25})

    scales.gauge, scales.judge = Gauge(), Judge()
    monkeypatch.setattr(ablation, "feature_set", look)
    figures = [scales.weigh(tmp_path / f"{name}.safetensors") for name in ("lorad", "whole")]
    assert figures[0] == figures[1] and figures[0]["fd_above_floor"] == 2.0 and figures[0]["diversity"] == 2.0
    main, spread = seen[:2]  # each drawn once
    torch.testing.assert_close(main, seen[2], rtol=1e-3, atol=1e-3)
    assert not torch.equal(main, spread)  # pictures of other captions, for the diversity
