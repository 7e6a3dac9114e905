"""Runs that lose nothing: checkpoints, the lock on a folder, a full disk, NaN and Inf, what may change in between."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from training import command, small_base, start, tiny

from trainer.distill.distillation import Distillation
from trainer.distill.roles import FAKE, STUDENT
from trainer.distill.session import DistillationSession, train
from trainer.engine.checkpoints import Checkpoints, FolderLock, read_checkpoint
from trainer.engine.optim import NonFiniteGuard, scheduled_lr


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step, "x": torch.ones(100)})
    assert names(tmp_path) == ["step-00000002.pt", "step-00000003.pt"]
    newest = tmp_path / "step-00000003.pt"
    newest.write_bytes(newest.read_bytes()[:300])
    assert checkpoints.latest()["step"] == 2
    (tmp_path / "step-00000002.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints can be read"):
        checkpoints.latest()
    assert Checkpoints(tmp_path / "empty").latest() is None
    with pytest.raises(ValueError, match="this is no checkpoint of a run"):
        read_checkpoint(newest)


def test_some_checkpoints_stay_for_good(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 11):
        checkpoints.save(step, {"step": step})
    assert names(tmp_path) == [f"step-{step:08d}.pt" for step in (4, 8, 9, 10)]


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1, "x": torch.ones(1000)})
    real_open = open

    class Full:
        """A file of a disk that has room for a kilobyte."""

        def __init__(self, file: Any) -> None:
            self._file, self._room = file, 1000

        def write(self, data: Any) -> int:
            self._room -= memoryview(data).nbytes
            if self._room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real_open(path, mode, *args, **kwargs)
        return Full(file) if "x" in mode else file

    monkeypatch.setattr("builtins.open", opened)
    with pytest.raises(OSError, match="No space left on device") as caught:
        checkpoints.save(2, {"step": 2, "x": torch.ones(1000)})
    assert "\n" not in str(caught.value) and "step-00000002.pt" in str(caught.value)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001.pt"]
    assert checkpoints.latest()["x"].shape == (1000,)


def test_a_run_on_a_full_disk_says_what_is_left(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Checkpoints.save

    def full(self: Checkpoints, step: int, state: dict) -> Path:
        if step > 2:
            raise OSError(errno.ENOSPC, f"{self.folder}: cannot be written: No space left on device")
        return original(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(OSError, match=r"make room and start again: step-00000002.pt is whole"):
        train(tiny(base, prompts, tmp_path))
    monkeypatch.undo()
    assert train(tiny(base, prompts, tmp_path)) is not None


def test_two_runs_in_one_folder_are_refused(base: Path, prompts: Path, tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(ValueError, match="another run is writing here"):
        FolderLock(tmp_path)
    other = start(command(base, prompts, tmp_path))
    _, told = other.communicate(timeout=1200)
    assert other.returncode == 1
    assert told.startswith("error: ") and told.count("\n") == 1 and "another run is writing here" in told
    lock.release()
    FolderLock(tmp_path).release()


def test_a_run_of_another_shape_is_refused(base: Path, prompts: Path, tmp_path: Path) -> None:
    train(tiny(base, prompts, tmp_path, steps=2))
    with pytest.raises(ValueError, match="holds a run with student_rank=4, not 8"):
        train(tiny(base, prompts, tmp_path, student_rank=8))
    with pytest.raises(ValueError, match="a run is here already, and resume=new"):
        train(tiny(base, prompts, tmp_path, resume="new"))
    other = small_base(tmp_path / "other", "sd21")
    with pytest.raises(ValueError, match="holds a run on another base"):
        train(tiny(other, prompts, tmp_path))
    more = tmp_path / "more.txt"
    more.write_text("a new prompt\n")
    with pytest.raises(ValueError, match="prompts are not those"):
        train(tiny(base, more, tmp_path))


def test_a_run_goes_on_from_a_checkpoint_by_its_path(base: Path, prompts: Path, tmp_path: Path) -> None:
    train(tiny(base, prompts, tmp_path / "a", steps=4, save_every=2, keep_last=5))
    first = tmp_path / "a" / "step-00000002.pt"
    train(tiny(base, prompts, tmp_path / "b", steps=4, resume=str(first)))
    one, other = (read_checkpoint(tmp_path / name / "step-00000004.pt") for name in "ab")
    assert all(torch.equal(one[STUDENT][name], other[STUDENT][name]) for name in one[STUDENT])


def test_what_would_be_overruled_later_is_refused(base: Path, prompts: Path, tmp_path: Path) -> None:
    train(tiny(base, prompts, tmp_path, steps=3, save_every=1, keep_last=3))
    with pytest.raises(ValueError, match="holds step-00000003.pt, which is newer than .*step-00000002.pt"):
        train(tiny(base, prompts, tmp_path, steps=4, resume=str(tmp_path / "step-00000002.pt")))
    stranger = tmp_path / "stranger.pt"
    torch.save({"step": 7, "network": {}}, stranger)
    with pytest.raises(ValueError, match="this checkpoint is not of a distillation"):
        train(tiny(base, prompts, tmp_path / "other", resume=str(stranger)))


def test_rates_rise_and_fall() -> None:
    assert [scheduled_lr(1.0, step, 100, 4, 0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [scheduled_lr(1.0, step, 100, 4, 0, head_start=10) for step in (0, 10, 11, 13, 50)] == [0.25, 0.25, 0.5, 1.0, 1.0]
    assert [round(scheduled_lr(1.0, step, 100, 0, 10), 3) for step in (89, 90, 95, 99)] == [1.0, 1.0, 0.5, 0.1]


def test_other_rates_are_allowed_and_told(base: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tiny(base, prompts, tmp_path, steps=2))
    with caplog.at_level(logging.WARNING, logger="wadi"):
        train(tiny(base, prompts, tmp_path, steps=3, student_lr=0.5, keep_last=4))
    (record,) = [record for record in caplog.records if "other settings" in record.message]
    assert record.message.endswith("student_lr 0.001 -> 0.5")


def test_nan_skips_the_update_and_is_counted(base: Path, prompts: Path, tmp_path: Path) -> None:
    run = Distillation(tiny(base, prompts, tmp_path, max_skipped=5))
    run.train_step()
    before = {role: run.roles.state(role) for role in (STUDENT, FAKE)}
    moments = [run.updaters[role].state()["optimizer"]["state"][0]["step"].clone() for role in (STUDENT, FAKE)]
    bias = run.model.network.conv_out.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
    run.train_step()
    assert run.guard.total == 2 and run.guard.in_a_row == {STUDENT: 1, FAKE: 1}
    for role, steps in zip((STUDENT, FAKE), moments, strict=True):
        now = run.roles.state(role)
        assert all(torch.equal(now[name], before[role][name]) for name in now)
        assert run.updaters[role].state()["optimizer"]["state"][0]["step"] == steps
    with torch.no_grad():
        bias.copy_(kept)
    log = run.train_step()
    assert run.guard.total == 2 and run.guard.in_a_row == {STUDENT: 0, FAKE: 0}
    assert all(value == value for value in log.values())
    with torch.no_grad():
        bias.fill_(float("inf"))
    with pytest.raises(
        ValueError, match="5 updates of the student in a row had NaN or Inf in a loss or gradient: lower student_lr"
    ) as caught:
        for _ in range(5):
            run.train_step()
    assert "\n" not in str(caught.value)


def test_one_role_cannot_hide_that_the_other_never_learns() -> None:
    guard = NonFiniteGuard(limit=3)
    for step in range(2):
        guard.note(step, STUDENT, False, 1.0)
        guard.note(step, FAKE, True, 1.0)
    again = NonFiniteGuard(limit=3)
    again.load_state(guard.state())
    with pytest.raises(ValueError, match="3 updates of the student in a row .* at a loss scale of 2:"):
        again.note(2, STUDENT, False, 2.0)
    assert again.total == 3


def test_one_bad_number_of_the_teacher_skips_the_student_alone(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Distillation(tiny(base, prompts, tmp_path))
    run.train_step()
    guided = run.roles.guided

    def spoiled(*args: Any) -> torch.Tensor:
        prediction = guided(*args).clone()
        prediction[0, 0, 0, 0] = float("nan")
        return prediction

    monkeypatch.setattr(run.roles, "guided", spoiled)
    before = {role: run.roles.state(role) for role in (STUDENT, FAKE)}
    run.train_step()
    moved = {role: any(not torch.equal(now, before[role][name]) for name, now in run.roles.state(role).items())
             for role in (STUDENT, FAKE)}  # fmt: skip
    assert moved == {STUDENT: False, FAKE: True}
    assert run.guard.total == 1


def test_what_a_run_shows(base: Path, prompts: Path, tmp_path: Path) -> None:
    run = Distillation(tiny(base, prompts, tmp_path, log_every=1, sheet_every=2, steps=4, tensorboard=True))
    session = DistillationSession(run)
    session.go()
    rows = session.table.rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    wanted = {"student_loss", "fake_loss", "student_norm", "fake_norm", "vsd_grad", "x0_std", "skipped", "ema_distance",
              "images_per_second", "memory_bytes", "seconds"}  # fmt: skip
    assert set(rows[-1]) == wanted | {"step"}
    blocks = {name.split("/")[1] for row in session.angles.rows for name in row if "/" in name}
    assert blocks == {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"}
    last = session.angles.rows[-1]
    assert 0 < last["student/mid_block/rms"] <= last["student/mid_block/max"]
    assert (tmp_path / "events").exists() == (session.events.trackers[0]._writer is not None)
