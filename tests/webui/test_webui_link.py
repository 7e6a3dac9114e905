"""`python install.py --webui`: the repository among a program's extensions, and wadi-mini in its folders of models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from a1111_extension import link as linking

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def webui(tmp_path: Path) -> Path:
    """The folder of an A1111, as far as the installer looks at it."""
    folder = tmp_path / "stable-diffusion-webui"
    (folder / "extensions").mkdir(parents=True)
    (folder / "webui.py").touch()
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "install.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def program_python(folder: Path, status: int = 0) -> Path:
    """A stand-in for the program's own Python: it writes down what it was asked for."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\npwd > "{folder}/asked"\nprintf "%s\\n" "$@" >> "{folder}/asked"\nexit {status}\n')
    python.chmod(0o755)
    return python


def test_it_is_linked_once(webui: Path) -> None:
    result = run("--webui", str(webui))
    place = webui / "extensions" / "wadi"
    assert (result.returncode, result.stderr) == (0, "")
    assert place.resolve() == ROOT and (place / "scripts" / "wadi.py").is_file()
    assert "now leads to" in result.stdout and "--mini" in result.stdout
    result = run("--webui", str(webui))
    assert result.returncode == 0 and "is there already" in result.stdout


def test_a_link_to_where_it_once_was_is_replaced(webui: Path) -> None:
    place = webui / "extensions" / "wadi"
    place.symlink_to(webui / "gone", target_is_directory=True)
    assert run("--webui", str(webui)).returncode == 0
    assert place.resolve() == ROOT


def test_the_home_of_a_user_whom_nobody_knows_is_told() -> None:
    result = run("--webui", "~nobody-of-this-name/webui")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "~nobody-of-this-name/webui is no folder of A1111 or Forge" in result.stderr.replace("\\", "/")


def test_something_else_of_the_name_stays(webui: Path) -> None:
    place = webui / "extensions" / "wadi"
    place.mkdir()
    (place / "mine").touch()
    result = run("--webui", str(webui))
    assert result.returncode == 1 and (place / "mine").exists()
    assert result.stderr.count("\n") == 1 and "is not this repository" in result.stderr


def test_a_clone_inside_the_program_needs_no_link(webui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = webui / "extensions" / "wadi-pack"
    clone.mkdir()
    monkeypatch.setattr(linking, "ROOT", clone)
    assert "already" in linking.link(webui)
    assert [path.name for path in (webui / "extensions").iterdir()] == ["wadi-pack"]


def test_another_folder_is_refused(tmp_path: Path) -> None:
    result = run("--webui", str(tmp_path))
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "there is no webui.py in it" in result.stderr


def test_no_folder_is_wrong_usage() -> None:
    result = run("--webui")
    assert result.returncode == 2 and "Traceback" not in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize("status", [0, 1])
def test_wadi_mini_is_written_by_the_programs_own_python(webui: Path, status: int) -> None:
    program_python(webui, status)
    result = run("--webui", str(webui), "--mini")
    assert (result.returncode, result.stderr) == (status, "")
    asked = (webui / "asked").read_text().split("\n")[:-1]
    models = webui / "models"
    assert asked == [
        *(str(ROOT), "-m", "wadi_core.mini.export"),
        *("--checkpoints", str(models / "Stable-diffusion"), "--loras", str(models / "Lora")),
    ]
    assert ("128 x 128" in result.stdout) == (status == 0)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_a_python_elsewhere_can_be_named(webui: Path, tmp_path: Path) -> None:
    result = run("--webui", str(webui), "--mini")
    assert result.returncode == 1 and "name it with --python" in result.stderr and result.stderr.count("\n") == 1
    elsewhere = program_python(tmp_path)
    assert run("--webui", str(webui), "--mini", "--python", str(elsewhere)).returncode == 0
    assert (tmp_path / "asked").exists()


def test_forge_is_told_that_it_cannot_load_it(webui: Path) -> None:
    (webui / "modules_forge").mkdir()
    result = run("--webui", str(webui), "--mini")
    assert result.returncode == 1 and "Stable Diffusion's own widths only" in result.stderr
    assert (webui / "extensions" / "wadi").resolve() == ROOT
    assert "--mini" not in run("--webui", str(webui)).stdout
