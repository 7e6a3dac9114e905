"""What a run says of its progress: a bar in a terminal, lines anywhere else, and where it is when it goes on."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from training import small_base, tiny, write_prompts

from trainer.distill.session import train
from trainer.engine.logs import LossTable, Progress, duration, step_seconds
from trainer.mini import controlnet

FIGURES = {"student_loss": "0.123", "fake_loss": "1.23", "img/s": "12.3", "GB": "10.1"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("place")
    return small_base(folder / "base"), write_prompts(folder / "prompts.txt")


@pytest.mark.parametrize(("columns", "figures"), [(40, 0), (60, 0), (90, 1), (100, 2), (200, 4)])
def test_a_bar_keeps_its_room(columns: int, figures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    with Progress(22000, 11000, file=terminal) as progress:
        progress.update(11001)
        progress.tell(FIGURES)
    for shown in terminal.getvalue().strip("\r\n").split("\r"):
        assert len(shown.rstrip()) <= columns
        if bar := re.search(r"\|([^|]*)\|", shown):
            assert len(bar[1]) >= 10
    assert re.search(r"50%\|.+\| 11001/22000", shown)
    assert [name for name in FIGURES if f"{name}=" in shown] == list(FIGURES)[:figures]


def test_without_a_terminal_progress_is_plain_lines(
    place: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="wadi"):
        train(tiny(*place, tmp_path, log_every=2))
    lines = [record.message for record in caplog.records if re.match(r"step \d", record.message)]
    assert [line.partition(":")[0] for line in lines] == ["step 2 of 6", "step 4 of 6", "step 6 of 6"]
    shown = r"step 2 of 6: .*student_loss \S+, fake_loss \S+, img/s \S+, GB \S+, [\d.e-]+ s/step, \d+ s left"
    assert re.fullmatch(shown, lines[0]), lines[0]
    assert "\r" not in capfd.readouterr().err
    table = {row["step"] for row in LossTable(tmp_path / "losses.csv", 6).rows}
    assert table == {2, 4, 6} and step_seconds(tmp_path) > 0


def test_the_scripts_of_the_mini_model_tell_it_in_lines_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(controlnet, "SHARD", 512)
    with caplog.at_level(logging.INFO, logger="wadi"):
        controlnet.make_maps(0, tmp_path / "shard-000.safetensors")
    told = [record.message for record in caplog.records]
    assert told[0] == "shard-000.safetensors: drawing and finding edges"
    assert re.fullmatch(r"scene 512 of 512: [\d.e-]+ s/scene, 0 s left", told[-1])
    assert capfd.readouterr().err == ""


def test_a_finished_run_says_so_and_goes_on_if_more_is_wanted(
    place: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(steps: int) -> list[str]:
        caplog.clear()
        assert train(tiny(*place, tmp_path, steps=steps)).is_file()
        return [record.message for record in caplog.records if record.name == "wadi"]

    caplog.set_level(logging.INFO, logger="wadi")
    assert not [line for line in said(4) if line.startswith(("the run goes on", "finished"))]
    (tmp_path / "one-step.safetensors").unlink()  # as if it had been killed before its very end
    saved = (tmp_path / "step-00000004.pt").stat().st_mtime_ns
    assert said(4)[0] == "finished, 4 of 4 steps; a larger steps= goes on from there"
    assert said(2)[0] == "finished, 4 of 4 steps; steps=2 asks for no more; a larger steps= goes on from there"
    assert (tmp_path / "step-00000004.pt").stat().st_mtime_ns == saved
    assert said(6)[0] == "the run goes on from step 4 of 6 (step-00000004.pt)"
    assert (tmp_path / "step-00000006.pt").is_file()


def test_a_damaged_table_is_kept_and_a_new_one_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for damage in ("step,loss\n1,two\n", "<html>quota</html>\n1,2,3\n", "loss\n1\n"):
        (tmp_path / "losses.csv").write_text(damage)
        table = LossTable(tmp_path / "losses.csv", 5)
        table.add(6, {"loss": 0.5})
        assert table.rows == [{"step": 6, "loss": 0.5}]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "losses.csv", *(f"losses.csv.damaged-{number}" for number in (1, 2, 3))
    ]  # fmt: skip
    assert "is damaged" in caplog.text


def test_times_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (0.4, 75, 600, 3900, 1e6)] == ["0 s", "75 s", "10 min", "65 min", "277 h 47 min"]
