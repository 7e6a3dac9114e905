"""Standard output in encodings that lack letters: no program ends with an error over what it says."""

from __future__ import annotations

import ast
import inspect
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_kit import DUMMY, paint, run
from picture_makers import RED, flat

from benchmarks import report
from trainer.settings import cli as trainer_cli
from trainer.settings.finetuning import PersonalizeConfig
from wadi_core import cli

ROOT = Path(__file__).resolve().parents[2]
ENCODINGS = ("cp932", "ascii", "latin-1")
START = 'if __name__ == "__main__":'


each = pytest.mark.parametrize("encoding", ENCODINGS)


def poor(monkeypatch: pytest.MonkeyPatch, encoding: str) -> io.BytesIO:
    """What is written from here on to a standard output that refuses what its encoding lacks."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    return written


@each
def test_an_evaluation_says_its_figures(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = poor(monkeypatch, encoding)
    folder = paint(tmp_path / "made", 4)
    assert run("--pictures", folder, "--real", folder, "--extractor", DUMMY, "-o", tmp_path / "out") == 0
    said = written.getvalue()
    assert b"chet distance" in said and b"4 pictures against 4" in said


def test_an_evaluation_in_a_process_of_its_own(tmp_path: Path) -> None:
    folder = paint(tmp_path / "made", 4)
    words = ["--pictures", folder, "--real", folder, "--extractor", DUMMY, "-o", tmp_path / "out"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp932", "PYTHONPATH": str(ROOT / "tests" / "helpers")}
    command = [sys.executable, ROOT / "trainer" / "evaluate.py", *words]
    ended = subprocess.run([*map(str, command)], env=environment, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert rb"Fr\xe9chet distance" in ended.stdout


@each
def test_a_trainer_prints_its_settings(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = poor(monkeypatch, encoding)
    monkeypatch.setattr(sys, "argv", ["personalize", "--print-config", "output=Äpfel 林檎 \U0001f34e"])
    assert trainer_cli.main("About.", PersonalizeConfig, print) == 0
    assert b"pfel" in written.getvalue()


@each
def test_the_command_line_names_its_files(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = poor(monkeypatch, encoding)
    flat("RGB", RED).save(tmp_path / "é.png")
    target = tmp_path / "Ü\U0001f34e.png"
    assert cli.main(["preprocess", str(tmp_path / "é.png"), "-o", str(target), "--kind", "invert"]) == 0
    assert target.is_file() and rb"\U0001f34e.png" in written.getvalue()


@each
def test_the_installer_says_what_it_does(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = poor(monkeypatch, encoding)
    monkeypatch.syspath_prepend(str(ROOT))
    import install

    monkeypatch.setattr(install, "__doc__", "Äpfel \U0001f34e")
    assert install.main(["--help"]) == 0
    assert rb"pfel \U0001f34e" in written.getvalue()


PROGRAMS = sorted(
    path
    for room in ("benchmarks", "trainer", "wadi_core")
    for path in (ROOT / room).rglob("*.py")
    if START in path.read_text(encoding="utf-8") or path.name == "__main__.py"
)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_program_prepares_its_output_first(path: Path) -> None:
    """Its own ``main`` does so before anything else, or it hands everything to one that does."""
    text = path.read_text(encoding="utf-8")
    if "cli.main(__doc__, " in text or "from .cli import main" in text:
        return
    (main,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    documented = ast.get_docstring(main) is not None
    first, last = ast.unparse(main.body[int(documented)]), ast.unparse(main.body[-1])
    assert first == "take_any_text()" or last.startswith("return report.run(")


def test_what_the_benchmarks_hand_everything_to_does_so_too() -> None:
    (run,) = [
        node for node in ast.parse(inspect.getsource(report)).body if isinstance(node, ast.FunctionDef) and node.name == "run"
    ]
    assert ast.unparse(run.body[1]) == "take_any_text()"
