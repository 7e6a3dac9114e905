"""install.py: how an environment is found, made and filled.

No environment is built and nothing is downloaded here: pip and venv are stood in for.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from installing import one_line

OFFLINE = "WARNING: Retrying: NewConnectionError: Name or service not known\nERROR: No matching distribution found for torch"
NOT_FOUND = "ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu"
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"


# ---- making the environment


def stub_python(folder: Path) -> Path:
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python.parent.mkdir(parents=True)
    python.touch()
    return python


def finished(returncode: int, output: str = "") -> SimpleNamespace:
    return SimpleNamespace(returncode=returncode, stdout=output)


def test_an_active_environment_is_used(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix + "-env")
    assert install.environment() == (Path(sys.executable), Path(sys.prefix))


def test_a_conda_environment_is_used_but_not_conda_itself(bare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    python = stub_python(bare.VENV)
    monkeypatch.setenv("CONDA_PREFIX", sys.prefix)
    monkeypatch.setenv("CONDA_DEFAULT_ENV", "pictures")
    assert bare.environment() == (Path(sys.executable), Path(sys.prefix))
    monkeypatch.setenv("CONDA_DEFAULT_ENV", "base")
    assert bare.environment() == (python, bare.VENV)


def test_without_one_dot_venv_is_made(
    bare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bare, "run_quietly", lambda command: (stub_python(bare.VENV), finished(0))[1])
    python, prefix = bare.environment()
    assert prefix == bare.VENV and python.exists() and prefix in python.parents
    assert ".venv" in one_line(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("The virtual environment was not created successfully because ensurepip is not\navailable.", "apt install python3"),
        ("/usr/bin/python3: No module named venv", "apt install python3"),
        ("Error: [Errno 28] No space left on device: '.venv/bin'", "the disk is full"),
        ("Error: Permission denied", "Error: Permission denied"),
    ],
)
def test_a_failed_venv_is_one_line_and_leaves_nothing(
    bare: ModuleType, output: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bare, "run_quietly", lambda command: ((bare.VENV / "bin").mkdir(parents=True), finished(1, output))[1])
    assert bare.main(["demo"]) == 1
    assert expected in one_line(capsys.readouterr().err)
    assert not bare.VENV.exists()


def test_a_dot_venv_without_python_is_named_not_deleted(bare: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    bare.VENV.mkdir()
    assert bare.main(["test"]) == 1
    assert "delete that folder" in one_line(capsys.readouterr().err)
    assert bare.VENV.is_dir()


def test_a_full_disk_is_told_before_anything_is_made(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 300_000_000))
    assert install.main(["demo"]) == 1
    assert "0.3 GB free, about 2 GB needed" in one_line(capsys.readouterr().err)
    assert not (tmp_path / ".venv").exists()


# ---- filling it


class Pip:
    """Stands in for pip and the environment's Python: remembers what was asked, answers as told."""

    def __init__(self, install: ModuleType, monkeypatch: pytest.MonkeyPatch, torch: str | None) -> None:
        self.asked: list[list[str]] = []
        self.torch = torch
        self.answers: dict[str, tuple[bool, str]] = {}  # first argument -> answer; success where nothing is said
        stub_python(install.VENV)
        monkeypatch.setattr(install, "pip", self.install)
        monkeypatch.setattr(install, "ensure_pip", lambda python, log: None)
        monkeypatch.setattr(install, "torch_version", lambda python: self.torch)
        monkeypatch.setattr(install, "has_own_index", lambda python: False)
        monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)

    def install(self, python: Path, arguments: list[str], log: Path) -> tuple[bool, str]:
        self.asked.append(arguments)
        answer = self.answers.get(arguments[0], (True, ""))
        if answer[0] and arguments[0].startswith("torch"):
            self.torch = "2.13.0"
        return answer


def test_the_second_time_pip_is_not_asked(bare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(bare, monkeypatch, torch=None)
    python = bare.prepared("generate")
    assert len(pip.asked) == 2 and pip.asked[0][0].startswith("torch==") and pip.asked[1][1] == ".[generate]"
    assert bare.prepared("generate") == python
    assert len(pip.asked) == 2
    bare.prepared("test")
    assert [arguments[1] for arguments in pip.asked[2:]] == [".[test]"]
    bare.prepared("generate")
    assert len(pip.asked) == 3


def test_the_test_extra_covers_the_demo_and_new_requirements_are_seen(
    bare: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(bare, monkeypatch, torch="2.1.0")
    bare.prepared("test")
    bare.prepared("generate")
    assert len(pip.asked) == 1
    with (bare.ROOT / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    bare.prepared("generate")
    assert len(pip.asked) == 2
    (bare.VENV / "wadi-installed.json").write_text('{"digest"', encoding="utf-8")
    bare.prepared("generate")
    assert len(pip.asked) == 3


def test_a_disk_that_fills_up_is_one_line(
    bare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Pip(bare, monkeypatch, torch="2.13.0")
    monkeypatch.setattr(bare, "pip", lambda python, arguments, log: fill(log, ""))
    assert bare.main(["demo"]) == 1
    assert "the disk is full" in one_line(capsys.readouterr().err)


def test_a_torch_that_is_there_stays(bare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(bare, monkeypatch, torch="2.4.1+cu121")
    bare.prepared("generate")
    assert pip.asked == [["--editable", ".[generate]", "torch==2.4.1+cu121"]]


def test_a_torch_too_old_is_told_and_stays(
    bare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = Pip(bare, monkeypatch, torch="2.0.1")
    assert bare.main(["demo"]) == 1
    assert "torch 2.0.1 is too old" in one_line(capsys.readouterr().err)
    assert pip.asked == []


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (OFFLINE, "no connection"),
        (FULL, "the disk is full"),
        ("ERROR: it broke\nhint", "ERROR: it broke"),
        (
            "error: subprocess-exited-with-error\n  ModuleNotFoundError: spam\nnote: not pip's fault",
            "ModuleNotFoundError: spam",
        ),
    ],
)
def test_a_failed_install_is_one_line_and_is_tried_again(
    bare: ModuleType, output: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = Pip(bare, monkeypatch, torch="2.13.0")
    pip.answers["--editable"] = (False, output)
    assert bare.main(["test"]) == 1
    assert expected in one_line(capsys.readouterr().err)
    pip.answers.clear()
    bare.prepared("test")
    assert len(pip.asked) == 2


def test_torch_is_looked_for_until_found(
    bare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = Pip(bare, monkeypatch, torch=None)
    attempts = bare.torch_attempts(gpu=False, own_index=False)
    pip.answers = {attempt[0]: (False, NOT_FOUND) for attempt in attempts[:-1]}
    bare.prepared("generate")
    assert pip.asked[:-1] == attempts
    assert capsys.readouterr().out.count("several GB") == (1 if sys.platform.startswith("linux") else 0)
    pip.torch, pip.asked = None, []
    pip.answers = {attempts[0][0]: (False, FULL)}  # asking for another version would not help
    (bare.VENV / "wadi-installed.json").unlink()
    assert bare.main(["demo"]) == 1
    assert len(pip.asked) == 1
    assert "the disk is full" in one_line(capsys.readouterr().err)


def test_the_small_build_is_preferred_where_it_serves(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tested, any_that_will_do = ["torch==2.13.0"], ["torch>=2.1"]
    monkeypatch.setattr(sys, "platform", "linux")
    assert install.torch_attempts(gpu=True, own_index=False) == [tested, any_that_will_do]
    own = install.torch_attempts(gpu=False, own_index=True)
    assert own == [["torch==2.13.0+cpu"], tested, any_that_will_do]
    assert not [word for attempt in own for word in attempt if "index" in word]  # no address but the user's own
    assert len(install.torch_attempts(gpu=False, own_index=False)) == 4
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        assert install.torch_attempts(gpu=False, own_index=False) == [tested, any_that_will_do]


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ("", False),
        ("global.extra-index-url='https://example.org/simple'\nglobal.find-links='wheels'\n", False),
        ("global.index-url='https://example.org/simple'\n", True),
        (":env:.index-url='https://example.org/simple'\n", True),
        (":env:.no-index='1'\n", True),
    ],
)
def test_a_chosen_index_is_recognised(install: ModuleType, settings: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "run_quietly", lambda command: finished(0, settings))
    assert install.has_own_index(Path("python")) is own


def test_torch_version_is_read_without_importing_torch(install: ModuleType) -> None:
    from importlib.metadata import version

    assert install.torch_version(Path(sys.executable)) == version("torch")


def test_pip_output_becomes_short_lines(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "Collecting torch==2.13.0+cpu",
        "  Downloading https://example.org/whl/torch-2.13.0-cp311.whl (190.1 MB)",
        "  Downloading small-1.0-py3-none-any.whl (9.1 kB)",
        "Installing collected packages: mpmath, sympy, torch",
        "Successfully installed mpmath-1 sympy-1 torch-2",
    ]
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\nexit 3\n", encoding="utf-8")
    fake.chmod(0o755)
    if os.name == "nt":
        pytest.xfail("the stand-in is a shell script")
    ok, output = install.pip(fake, ["torch"], tmp_path / "log")
    assert not ok and output.splitlines() == lines
    assert capsys.readouterr().out == "  downloading torch-2.13.0-cp311.whl (190.1 MB)\n  unpacking 3 packages\n"
    assert output in (tmp_path / "log").read_text(encoding="utf-8")
