"""Several processes train as one does: the same samples, the same losses, the same gradients."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training import command, tiny

from benchmarks.report import origin
from benchmarks.speed.scaling import as_markdown, free_port, launcher
from trainer.distill.distillation import Distillation
from trainer.distill.roles import FAKE, STUDENT
from trainer.distill.session import DistillationSession, train
from trainer.engine.checkpoints import Checkpoints, read_checkpoint
from trainer.engine.logs import SKIPPED, step_seconds
from trainer.engine.processes import Processes

STEPS = 10


def launch(words: list[str], count: int) -> None:
    """Start a script as ``accelerate launch`` does, on the CPU with gloo."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = [sys.executable, *launcher(count), *words]
    run = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def losses(folder: Path) -> list[dict[str, float]]:
    with open(folder / "losses.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


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


RECIPE = {"loss": "sid", "normalize": True, "fake_updates": 2, "adversary": "features", "adversary_steps": 3}
RECIPE |= {"f_weight": "hellinger", "anchor_steps": 2, "start": "625", "steps": 4}


@pytest.mark.parametrize("changes", [{}, RECIPE], ids=["paper", "sid and an adversary"])
def test_two_processes_are_as_good_as_one(base: Path, prompts: Path, tmp_path: Path, changes: dict) -> None:
    changes = {"steps": STEPS, **changes}
    alone = run(base, prompts, tmp_path / "one", 1, **changes)
    pair = run(base, prompts, tmp_path / "two", 2, micro_batch=1, **changes)  # and accumulate
    assert len(pair[0]) == changes["steps"]
    assert_same(alone, pair)
    assert len(pair[1]["random"]) == 2 and len(alone[1]["random"]) == 1
    assert (tmp_path / "two" / "one-step.safetensors").is_file()
    for name, value in alone[1].get("adversary", {}).items():
        torch.testing.assert_close(value, pair[1]["adversary"][name], rtol=1e-4, atol=1e-8)
    assert ("adversary" in alone[1]) == (changes.get("adversary") == "features")


def test_ctrl_c_in_a_terminal_reaches_all_of_them_and_they_save(base: Path, prompts: Path, tmp_path: Path) -> None:
    words = command(base, prompts, tmp_path, steps=100000, batch=8, micro_batch=1, save_every=2, sheet_every=100000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    together = subprocess.Popen(
        [sys.executable, *launcher(2), *words], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("step-*.pt")) and time.monotonic() < deadline and together.poll() is None:
        time.sleep(0.05)
    os.killpg(together.pid, signal.SIGINT)  # to the launcher, which hands it on, and to the processes themselves
    _, told = together.communicate(timeout=600)
    assert told.count("then saving; press again to leave without saving") == 1, told[-3000:]
    assert "of 100000 steps; the same command goes on from there" in told
    state = Checkpoints(tmp_path).latest()
    assert state is not None and 2 <= state["step"] < 100000 and len(state["random"]) == 2
    assert (tmp_path / "one-step.safetensors").is_file()


def by_hand(words: list[list[str]]) -> list[tuple[int, str]]:
    """Start a process for each command line, as ranks of one gloo group; exit status and errors of each."""
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": str(len(words))}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": str(len(words))}
    started = [
        subprocess.Popen([sys.executable, *each], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stderr=subprocess.PIPE, text=True)
        for rank, each in enumerate(words)
    ]  # fmt: skip
    errors = [process.communicate(timeout=600)[1] for process in started]
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


def test_ranks_with_disks_of_their_own_are_refused(base: Path, prompts: Path, tmp_path: Path) -> None:
    train(tiny(base, prompts, tmp_path / "0", steps=2))
    words = [command(base, prompts, tmp_path / str(rank), steps=4) for rank in range(2)]
    for status, told in by_hand(words):
        (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
        assert status == 1 and "do not go on from the same checkpoint: process 0 has step 2, process 1 has none;" in line
    assert not (tmp_path / "1").exists() and Checkpoints(tmp_path / "0").latest()["step"] == 2


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (None, "process 0 has step 2, process 1 has none;"),
        ((4, "abc"), "process 0 has step 2, process 1 has step 4;"),
        ((2, "abc"), "process 0 has step 2, process 1 has step 2, with other contents;"),
    ],
)
def test_what_processes_disagree_about_is_told(
    other: tuple[int, str] | None, told: str, base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(base, prompts, tmp_path, steps=2)
    train(config)
    run = Distillation(config)
    monkeypatch.setattr(run.processes, "count", 2)
    monkeypatch.setattr(run.processes, "any", lambda flag: flag)
    monkeypatch.setattr(run.processes, "gather", lambda value: ["", ""] if value == "" else [value, other])
    with pytest.raises(ValueError, match=f"do not go on from the same checkpoint: {told}"):
        DistillationSession(run)
    monkeypatch.setattr(run.processes, "gather", lambda value: ["", ""] if value == "" else [value, value])
    assert DistillationSession(run).run.step == 2


def test_what_fails_in_one_process_fails_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, said = Processes("cpu"), []
    monkeypatch.setattr(processes, "count", 2)
    monkeypatch.setattr(processes, "gather", lambda value: said.append(value) or [value, "the disk is full"])
    with pytest.raises(ValueError, match="process 1: the disk is full"):
        processes.together(lambda: 1)

    def broken() -> None:
        raise OSError("no folder")

    with pytest.raises(OSError, match="no folder"):
        processes.together(broken)
    assert said == ["", "no folder"]


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
