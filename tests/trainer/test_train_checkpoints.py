"""Damaged checkpoints of every kind give way to the one before; the lock, also where there is none; agreement of processes."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning_runs import make_place, personalize_config
from training import small_base, tiny, write_prompts

from trainer.distill.distillation import Distillation
from trainer.distill.roles import STUDENT
from trainer.distill.session import DistillationSession, train
from trainer.engine.checkpoints import Checkpoints, FolderLock, read_checkpoint
from trainer.finetune.session import FinetuningSession
from trainer.personalize import Personalization

NEWEST, BEFORE = "step-00000004.pt", "step-00000002.pt"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '4'}\nsize 2991106\n"


class Foreign:
    """Of a class that no checkpoint holds."""


fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")  # absent on Windows


def empty_archive(path: Path) -> None:
    path.unlink()
    zipfile.ZipFile(path, "w").close()


def folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def flipped_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(data)


FILES: dict[str, Callable[[Path], object]] = {
    "a page": lambda path: path.write_text("<html><body>Quota exceeded</body></html>\n"),
    "a git-lfs pointer": lambda path: path.write_text(LFS),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "cut to a head": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "an archive of nothing": empty_archive,
    "a flipped bit": flipped_bit,
    "a foreign class": lambda path: torch.save({"step": 4, "what": Foreign()}, path),
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps({"step": 4})),
    "a folder": folder,
    "a link to itself": link_to_itself,
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
}


def put(*keys: Any, value: Any) -> Callable[[dict], None]:
    """A change of one value deep inside."""

    def change(state: dict) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def first_name(part: Callable[[dict], dict], value: Any) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        values = part(state)
        values[next(iter(values))] = value

    return change


def dropped(*keys: Any) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


MOMENTS = ("updaters", STUDENT, "optimizer", "state")
INSIDE: dict[str, Callable[[dict], None]] = {
    "step as text": put("step", value="4"),
    "a step below zero": put("step", value=-1),
    "no step": dropped("step"),
    "no student": dropped(STUDENT),
    "no updaters": dropped("updaters"),
    "no random": dropped("random"),
    "settings as a list": put("settings", value=[1]),
    "prompts as text": put("prompts", value="a cat"),
    "skipped as a number": put("skipped", value=3),
    "skipped counts as text": put("skipped", value={"in_a_row": {STUDENT: "many"}, "total": 0}),
    "random as a list of text": put("random", value=["a", "b"]),
    "random without torch's": dropped("random", 0, "torch"),
    "torch's state cut off": put("random", 0, "torch", value=torch.zeros(3, dtype=torch.uint8)),
    "a student's tensor of another shape": first_name(lambda state: state[STUDENT], torch.zeros(1)),
    "a student's tensor of whole numbers": lambda state: state[STUDENT].update(
        {name: value.int() for name, value in state[STUDENT].items()}
    ),
    "a student's tensor as a number": first_name(lambda state: state[STUDENT], 0.5),
    "a student of other names": put(STUDENT, "more", value=torch.zeros(1)),
    "a student as a list": put(STUDENT, value=[]),
    "an average of another shape": first_name(lambda state: state["average"], torch.zeros(2, 2)),
    "moments of another shape": put(*MOMENTS, 0, "exp_avg", value=torch.zeros(1)),
    "moments as text": put(*MOMENTS, 0, "exp_avg", value="none"),
    "moments that are missing": dropped(*MOMENTS, 0, "exp_avg_sq"),
    "a count of steps that is missing": dropped(*MOMENTS, 0, "step"),
    "a count of steps of another shape": put(*MOMENTS, 0, "step", value=torch.zeros(2)),
    "no groups": put("updaters", STUDENT, "optimizer", "param_groups", value=[]),
}


def rewritten(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damage


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Distillation, Path]:
    """A run that can be loaded anew, and a folder with its checkpoints of steps 2 and 4."""
    place = tmp_path_factory.mktemp("begun")
    config = tiny(small_base(place / "base"), write_prompts(place / "prompts.txt"), place / "run", steps=4)
    train(config)
    return Distillation(config), place / "run"


@pytest.fixture
def copied(begun: tuple[Distillation, Path], tmp_path: Path) -> Distillation:
    """The run with a copy of the folder."""
    run, source = begun
    run.output = tmp_path / "run"
    shutil.copytree(source, run.output)
    return run


@pytest.mark.parametrize(
    "damage", [*FILES.values(), *map(rewritten, INSIDE.values())], ids=[*FILES, *INSIDE]
)  # fmt: skip
def test_the_checkpoint_before_a_damaged_one_is_taken(
    damage: Callable[[Path], object], copied: Distillation, caplog: pytest.LogCaptureFixture
) -> None:
    damage(copied.output / NEWEST)
    with caplog.at_level(logging.INFO, logger="wadi"):
        session = DistillationSession(copied)
    assert copied.step == 2
    whole = read_checkpoint(copied.output / BEFORE)
    assert all(torch.equal(whole[STUDENT][name], value) for name, value in copied.roles.state(STUDENT).items())
    told, goes_on = [record.message for record in caplog.records if record.name == "wadi"]
    assert told.startswith(f"{copied.output / NEWEST}: ") and told.endswith(f"; it is kept as {NEWEST}.damaged-1")
    assert "\n" not in told and goes_on == f"the run goes on from step 2 of 4 ({BEFORE})"
    assert (copied.output / f"{NEWEST}.damaged-1").is_symlink() or (copied.output / f"{NEWEST}.damaged-1").exists()
    # And nothing of it is in the way of what the run writes.
    copied.step = 4
    session.save()
    assert [path.name for path in session.checkpoints.paths()] == [BEFORE, NEWEST]


def test_one_that_may_not_be_read_gives_way_too(copied: Distillation, monkeypatch: pytest.MonkeyPatch) -> None:
    original = zipfile.ZipFile

    def opened(file: Any, *arguments: Any) -> zipfile.ZipFile:  # a path, or a file that is open
        if Path(file.name).name == NEWEST:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return original(file, *arguments)

    monkeypatch.setattr(zipfile, "ZipFile", opened)
    damaged: dict[Path, str] = {}
    path, state = Checkpoints(copied.output).newest(damaged)
    assert (path.name, state["step"]) == (BEFORE, 2)
    assert damaged == {copied.output / NEWEST: "cannot be read: Permission denied"}


@pytest.mark.parametrize("kind", ["a page", "a folder", "moments as text", "no student"])
def test_where_all_are_damaged_one_line_says_so_and_nothing_is_gone(kind: str, copied: Distillation) -> None:
    damage = FILES.get(kind) or rewritten(INSIDE[kind])
    damage(copied.output / NEWEST)
    damage(copied.output / BEFORE)
    before = sorted(path.name for path in copied.output.iterdir())
    with pytest.raises(
        ValueError, match=rf"none of the 2 checkpoints can be read \({NEWEST}: .*\); nothing was deleted"
    ) as said:
        DistillationSession(copied)
    assert "\n" not in str(said.value)
    assert sorted(path.name for path in copied.output.iterdir()) == before


def test_another_run_is_refused_and_not_taken_for_damaged(copied: Distillation) -> None:
    state = torch.load(copied.output / NEWEST, weights_only=True)
    state["settings"]["optimizer"] = "muon"
    torch.save(state, copied.output / NEWEST)
    with pytest.raises(ValueError, match="holds a run with optimizer=muon, not adamw; choose another output folder"):
        DistillationSession(copied)
    assert (copied.output / NEWEST).is_file()


def test_settings_of_the_optimizer_are_those_of_this_run(copied: Distillation) -> None:
    state = torch.load(copied.output / NEWEST, weights_only=True)
    state["updaters"][STUDENT]["optimizer"]["param_groups"][0]["betas"] = (0.5, 0.5)
    copied.load_state(state)
    assert copied.updaters[STUDENT].optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def old_names(state: dict[str, Any], **old: str) -> None:
    """Settings under the names that they had when the run began."""
    state["settings"] = {old.get(name, name): value for name, value in state["settings"].items()}


def test_a_run_that_began_under_old_names_of_settings_goes_on(copied: Distillation, caplog: pytest.LogCaptureFixture) -> None:
    def change(state: dict[str, Any]) -> None:
        old_names(state, student_lr="student_rate", fake_lr="fake_rate", max_grad_norm="clip", uncond_prob="null_share")
        state["settings"]["clip"] = 7.0

    rewritten(change)(copied.output / NEWEST)
    with caplog.at_level(logging.INFO, logger="wadi"):
        DistillationSession(copied)
    assert copied.step == 4
    told = [record.message for record in caplog.records if record.name == "wadi"]
    assert told[0] == "the run goes on with other settings than before: max_grad_norm 7.0 -> 1.0"


def test_a_finetuning_run_that_began_under_old_names_goes_on(run: Personalization, tmp_path: Path) -> None:
    shutil.copytree(run.output, tmp_path / "run")
    rewritten(lambda state: old_names(state, lr="rate", keep_last="keep"))(tmp_path / "run" / NEWEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "output", tmp_path / "run")
        FinetuningSession(run)
    assert run.step == 4


@pytest.mark.parametrize("damage", [
    FILES["a page"], *map(rewritten, (
        dropped("learned"), first_name(lambda state: state["learned"], torch.zeros(1)), put("updater", value={}),
        put("random", value=None), put("words", value=3), put("settings", value="none"),
    )),
])  # fmt: skip
def test_finetuning_runs_do_the_same(damage: Callable[[Path], object], run: Personalization, tmp_path: Path) -> None:
    shutil.copytree(run.output, tmp_path / "run")
    damage(tmp_path / "run" / NEWEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "output", tmp_path / "run")
        FinetuningSession(run)
    assert run.step == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Personalization:
    place = make_place(tmp_path_factory.mktemp("run"))
    (place / "run").mkdir()
    run = Personalization(personalize_config(place, place / "run"))
    FinetuningSession(run).go()
    return run


def test_a_checkpoint_that_was_just_written_is_never_the_one_to_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(4, {"step": 4})
    (tmp_path / "step-00000009.pt").write_text("later, and damaged")
    (tmp_path / "step-00000003.pt").mkdir()
    checkpoints.save(5, {"step": 5})
    assert [path.name for path in checkpoints.paths()] == [f"step-0000000{number}.pt" for number in (3, 5, 9)]


def test_what_a_killed_writer_left_goes_after_a_while(tmp_path: Path) -> None:
    old, new = (tmp_path / f".wadi-{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    Checkpoints(tmp_path).save(1, {"step": 1})
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        FolderLock(tmp_path).release()
    (message,) = {record.message for record in caplog.records}
    assert message.startswith(f"{tmp_path}: there are no locks on this file system ({os.strerror(number)}): the run goes on")


def test_other_errors_of_a_lock_are_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nothing can be written here"):
        FolderLock(tmp_path / "file" / "run")
    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="nothing can be written here: Input/output error"):
        FolderLock(tmp_path)


def test_the_lock_of_a_killed_run_blocks_nobody(tmp_path: Path) -> None:
    words = (
        "import sys, time; from trainer.engine.checkpoints import FolderLock; lock = FolderLock(sys.argv[1]); "
        "print('held', flush=True); "
    )
    other = subprocess.Popen([sys.executable, "-c", words + "time.sleep(600)", str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another run is writing here"):
        FolderLock(tmp_path)
    other.kill()
    other.wait()
    FolderLock(tmp_path).release()
