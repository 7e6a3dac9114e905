"""Several processes train as one does: the same samples, the same losses, the same gradients."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import command, small_base, write_prompts

from benchmarks.report import origin
from benchmarks.speed.scaling import SKIPPED, as_markdown, launcher, step_seconds
from trainer.distill.roles import FAKE, STUDENT
from trainer.engine.checkpoints import read_checkpoint
from trainer.engine.processes import Processes

STEPS = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


def launch(words: list[str], count: int) -> None:
    """Start a script as ``accelerate launch`` does, on the CPU with gloo."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = [sys.executable, *launcher(count), *words]
    run = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def losses(folder: Path) -> list[dict[str, float]]:
    with open(folder / "losses.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def run(base: Path, prompts: Path, folder: Path, count: int, **changes: object) -> tuple[list[dict[str, float]], dict]:
    settings = {"steps": STEPS, "batch": 4, "precision": "fp64", "base_weights": "fp64", "log_every": 1, "save_every": STEPS}
    launch(command(base, prompts, folder, **{**settings, **changes}), count)
    return losses(folder), read_checkpoint(folder / f"step-{changes.get('steps', STEPS):08d}.pt")


def assert_same(one: tuple, other: tuple) -> None:
    for row, row2 in zip(one[0], other[0], strict=True):
        for name in ("student_loss", "fake_loss", "student_norm", "fake_norm", "vsd_grad"):
            assert row[name] == pytest.approx(row2[name], rel=1e-6, abs=1e-12), (row["step"], name)
    for role in (STUDENT, FAKE):
        for name, value in one[1][role].items():
            torch.testing.assert_close(value, other[1][role][name], rtol=1e-5, atol=1e-7)
        # The first moments are averages of the gradients: these are the same too, parameter by parameter.
        moments = [state[1]["updaters"][role]["optimizer"]["state"] for state in (one, other)]
        for index, moment in moments[0].items():
            torch.testing.assert_close(moment["exp_avg"], moments[1][index]["exp_avg"], rtol=1e-4, atol=1e-10)


def test_two_processes_are_as_good_as_one(base: Path, prompts: Path, tmp_path: Path) -> None:
    alone = run(base, prompts, tmp_path / "one", 1)
    pair = run(base, prompts, tmp_path / "two", 2, micro_batch=1)  # and accumulate
    assert len(pair[0]) == STEPS
    assert_same(alone, pair)
    assert len(pair[1]["random"]) == 2 and len(alone[1]["random"]) == 1
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 1


@pytest.mark.full
def test_four_processes_stop_together_and_go_on(base: Path, prompts: Path, tmp_path: Path) -> None:
    alone = run(base, prompts, tmp_path / "one", 1)
    run(base, prompts, tmp_path / "four", 4, steps=8)
    four = run(base, prompts, tmp_path / "four", 4)
    assert_same(alone, four)


def test_samples_are_shared_out_once() -> None:
    processes = Processes("cpu")
    assert processes.share(range(8), 0) == [range(8)]
    assert processes.share(range(8, 16), 4) == [range(8, 12), range(12, 16)]
    taken = []
    for rank in range(4):
        processes.rank, processes.count = rank, 4
        taken += [number for call in processes.share(range(100, 116), 2) for number in call]
    assert sorted(taken) == list(range(100, 116))
    with pytest.raises(ValueError, match="6 samples cannot be shared out among 4 processes"):
        processes.share(range(6), 0)


def test_steps_are_timed_without_the_first(tmp_path: Path) -> None:
    times = [9.0, 15.0, 17.0, 18.0, 21.0, 22.0]  # of which the first two are not like the others
    (tmp_path / "losses.csv").write_text("step,seconds\n" + "".join(f"{i + 1},{time}\n" for i, time in enumerate(times)))
    assert SKIPPED == 2 and step_seconds(tmp_path) == 1.0
    rows = [{"processes": 1, "batch": 8, "seconds": 4.0}, {"processes": 2, "batch": 16, "seconds": 5.0}]
    shown = as_markdown({**origin("scaling", ["--steps", "6"]), "rows": rows})
    assert "| 2 | 16 | 5.00 | 3.20 | 1.60 |" in shown
