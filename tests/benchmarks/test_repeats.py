"""A measurement in a process of its own: what it says, and what is said where it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.speed import repeats


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_what_a_process_found_is_its_last_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    repeats.tell({"seconds": 1.5})
    told = capsys.readouterr().out
    assert repeats.run_apart("a", python(f"print('a library talks', end=''); print({told!r}, end='')")) == {"seconds": 1.5}
    where = python("import json, os; print(json.dumps({'folder': os.getcwd()}))")
    assert repeats.run_apart("a", where, tmp_path) == {"folder": str(tmp_path.resolve())}


@pytest.mark.parametrize(
    ("status", "why"), [("3", "status 3"), ("137", "killed, likely for want of memory")], ids=["status", "killed"]
)
def test_one_that_fails_is_named(status: str, why: str) -> None:
    with pytest.raises(OSError, match=f"^the measurement fuse failed: {why}$"):
        repeats.run_apart("fuse", python(f"raise SystemExit({status})"))


def test_without_peft_its_measurement_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats.importlib.util, "find_spec", lambda name: None)
    assert repeats.as_installed(["fuse", "peft-merge", "copy"], "peft-merge") == ["fuse", "copy"]
    assert repeats.as_installed(["fuse"], "peft-merge") == ["fuse"]


def test_a_report_is_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    repeats.write(tmp_path, "found", {"a": 1}, "| a |\n")
    assert json.loads((tmp_path / "found.json").read_text()) == {"a": 1}
    assert (tmp_path / "found.md").read_text() == capsys.readouterr().out == "| a |\n"
