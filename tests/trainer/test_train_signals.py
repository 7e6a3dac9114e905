"""Ctrl-C and SIGTERM: the first one saves the last whole step, a second one leaves, and a save under way is not lost."""

from __future__ import annotations

import contextlib
import copy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning_runs import invert_config, make_place, personalize_config
from training import small_base, tiny, write_prompts

from benchmarks.robustness.interruptions import differing
from trainer.distill.distillation import Distillation
from trainer.distill.session import DistillationSession
from trainer.engine.checkpoints import Checkpoints, read_checkpoint
from trainer.engine.session import Session
from trainer.engine.signals import Left, StepAbandoned, stop_signals
from trainer.finetune.session import FinetuningSession
from trainer.invert import Inversion
from trainer.personalize import Personalization
from trainer.settings import cli
from trainer.settings.finetuning import PersonalizeConfig

KINDS = ("distillation", "personalisation", "inversion")
SAID = "then saving; press again to leave without saving\n"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Of a program in the background a shell may have switched the signal off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A run of a kind, with its session: three calls a step, four with those of an anchor."""
    place = make_place(tmp_path_factory.mktemp("place"))
    base = small_base(place / "distilled")
    prompts = write_prompts(place / "prompts.txt")

    def build(kind: str, output: Path, **changes: object) -> Session[Any]:
        output.mkdir(exist_ok=True)
        changes = {"steps": 3, "batch": 3, "micro_batch": 1, "save_every": 1, "decay_steps": 2, **changes}
        if kind == "distillation":
            return DistillationSession(Distillation(tiny(base, prompts, output, **changes)))
        if kind == "inversion":
            return FinetuningSession(Inversion(invert_config(place, output, **changes)))
        changes |= {"anchor_weight": 1.0, "anchor_every": 3, "anchor_steps": 2}
        return FinetuningSession(Personalization(personalize_config(place, output, **changes)))

    return build


def test_the_first_signal_says_what_happens_and_a_second_one_leaves(capfd: pytest.CaptureFixture) -> None:
    with stop_signals() as stop:
        assert not stop
        stop.seconds = 12.4
        signal.raise_signal(signal.SIGINT)
        assert stop and stop.caught == [signal.SIGINT]
        assert capfd.readouterr().err == f"\nfinishing this step (about 12 s), {SAID}"
        with pytest.raises(Left) as left:
            signal.raise_signal(signal.SIGTERM)
        assert left.value.number == signal.SIGTERM
    with stop_signals(tell=False):
        signal.raise_signal(signal.SIGINT)
    with stop_signals():
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == f"\nfinishing this step, {SAID}"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_closed_terminal_is_one_request_however_often_it_is_told(capfd: pytest.CaptureFixture) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with stop_signals() as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGHUP)
            assert stop.caught == [signal.SIGHUP]
            with pytest.raises(Left):
                signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err == f"\nfinishing this step, {SAID}"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_under_nohup_a_closed_terminal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_launcher_hands_on_is_the_same_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with stop_signals(tell=False) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert len(stop.caught) == 2
        stop._first -= 10.0
        with pytest.raises(Left):
            signal.raise_signal(signal.SIGINT)


def test_a_second_signal_waits_for_a_save_and_a_third_does_not(capfd: pytest.CaptureFixture) -> None:
    with stop_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        written = []
        with pytest.raises(Left) as left, stop.saving():
            signal.raise_signal(signal.SIGTERM)
            written.append("whole")
        assert written == ["whole"] and left.value.number == signal.SIGTERM
        assert "a checkpoint is being written: leaving as soon as it is whole" in capfd.readouterr().err
        with pytest.raises(Left), stop.saving():
            signal.raise_signal(signal.SIGINT)
            written.append("not reached")
        assert written == ["whole"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_status_says_which_signal_it_was(
    number: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def run(config: PersonalizeConfig) -> None:
        with stop_signals(tell=False):
            signal.raise_signal(number)
            signal.raise_signal(number)

    monkeypatch.setattr(sys, "argv", ["personalize.py"])
    assert cli.main("About.", PersonalizeConfig, run) == status
    assert capsys.readouterr().err == "stopped; started again it goes on from its newest checkpoint, if there is one\n"


@pytest.mark.parametrize("kind", KINDS)
def test_an_abandoned_step_changes_nothing(kind: str, make: Callable[..., Any], tmp_path: Path) -> None:
    run = make(kind, tmp_path).run
    run.train_step()
    before = copy.deepcopy(run.state())
    calls = 4 if kind == "personalisation" else 3
    for left_at in range(1, calls + 1):
        looks = iter(range(1, 100))

        def look(left_at: int = left_at, looks: Iterator[int] = looks) -> None:
            if next(looks) == left_at:
                raise StepAbandoned

        with pytest.raises(StepAbandoned):
            run.train_step(look)
        assert differing(before, run.state(), "") == []
        assert all(parameter.grad is None for parameter in trained(run))
    run.train_step()
    straight = make(kind, tmp_path / "straight").run
    straight.train_step()
    straight.train_step()
    assert differing(only_learned(straight.state()), only_learned(run.state()), "") == []


def trained(run: Any) -> list[torch.nn.Parameter]:
    updaters = run.updaters.values() if isinstance(run, Distillation) else [run.updater]
    return [parameter for updater in updaters for parameter in updater.parameters]


def only_learned(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in ("settings", "random")}


@contextlib.contextmanager
def at_draw(session: Session[Any], count: int, then: Callable[[], None]) -> Iterator[None]:
    """Something happens in a run's so many-th call."""
    drawing = "_draw" if isinstance(session.run, Distillation) else "draw"
    original, calls = getattr(session.run, drawing), iter(range(1, 1000))

    def draw(*arguments: Any) -> Any:
        if next(calls) == count:
            then()
        return original(*arguments)

    setattr(session.run, drawing, draw)
    yield
    delattr(session.run, drawing)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_within_a_step_saves_the_last_whole_one(kind: str, make: Callable[..., Any], tmp_path: Path) -> None:
    per_step = {"distillation": 6, "personalisation": 4, "inversion": 3}[kind]
    session = make(kind, tmp_path / "stopped", save_every=100)
    with at_draw(session, per_step + 2, lambda: signal.raise_signal(signal.SIGINT)):
        written = session.go()
    assert written.is_file()
    assert [path.name for path in session.checkpoints.paths()] == ["step-00000001.pt"]
    assert session._stop.seconds > 0
    make(kind, tmp_path / "stopped").go()
    make(kind, tmp_path / "straight").go()
    stopped, straight = (read_checkpoint(tmp_path / name / "step-00000003.pt") for name in ("stopped", "straight"))
    assert differing(only_learned(straight), only_learned(stopped), "") == []


def test_a_second_signal_leaves_at_once_and_the_checkpoint_before_stays(make: Callable[..., Any], tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    session = make("distillation", tmp_path)
    with pytest.raises(Left), at_draw(session, 8, twice):
        session.go()
    assert [path.name for path in session.checkpoints.paths()] == ["step-00000001.pt"]
    assert not (tmp_path / "one-step.safetensors").exists() and not list(tmp_path.glob(".wadi-*"))
    assert read_checkpoint(tmp_path / "step-00000001.pt")["step"] == 1


@pytest.mark.parametrize(("signals", "saved"), [(2, True), (3, False)])
def test_signals_while_a_checkpoint_is_written(
    signals: int, saved: bool, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.save

    def interrupted(state: dict, file: Any) -> None:
        original({"half": "a checkpoint"}, file)
        for _ in range(signals if state["step"] == 2 else 0):
            signal.raise_signal(signal.SIGTERM)
        file._file.seek(0)
        file._file.truncate()
        original(state, file)

    session = make("distillation", tmp_path)
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(Left):
        session.go()
    assert [path.name for path in Checkpoints(tmp_path).paths()] == [f"step-{n:08d}.pt" for n in ((1, 2) if saved else (1,))]
    assert Checkpoints(tmp_path).latest()["step"] == (2 if saved else 1)
    assert not (tmp_path / "one-step.safetensors").exists() and not list(tmp_path.glob(".wadi-*"))
