"""install.py: what hosts call, the two commands' way to an environment, and one clear line for whatever goes wrong.

No environment is built and nothing is downloaded here: pip and venv are stood in for.
"""

from __future__ import annotations

import ast
import errno
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from wadi_core.cli import _parser

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "install.py"
OFFLINE = "WARNING: Retrying: NewConnectionError: Name or service not known\nERROR: No matching distribution found for torch"
NOT_FOUND = "ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu"
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"


@pytest.fixture
def install() -> ModuleType:
    """A fresh copy of install.py as a module."""
    spec = importlib.util.spec_from_file_location("install_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, options: tuple[str, ...] = (), cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def one_line(text: str) -> str:
    assert text.endswith("\n") and text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


# ---- without arguments: ComfyUI-Manager and A1111


def test_nothing_missing_is_silent(tmp_path: Path) -> None:
    result = run(cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_a_bare_python_gets_one_line_and_success() -> None:
    result = run(options=("-S", "-E"))  # without site-packages: torch, safetensors and numpy are all missing
    assert result.returncode == 0 and result.stderr == ""
    line = one_line(result.stdout)
    assert "lacks torch, safetensors, numpy" in line
    assert "requirements.txt" in line and "install.py demo" in line


@pytest.mark.parametrize("absent", ["safetensors", "numpy", "torch"])
def test_only_what_is_missing_is_named(
    install: ModuleType, absent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None if name == absent else object())
    assert install.main([]) == 0
    assert f"lacks {absent}." in one_line(capsys.readouterr().out)


def test_the_host_check_runs_no_program_and_imports_nothing(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert install.main([]) == 0
    code = f"import runpy, sys; sys.argv = ['install.py']\ntry: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    code += "except SystemExit as e: assert not e.code\nassert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    monkeypatch.undo()
    subprocess.run([sys.executable, "-c", code], check=True)


def test_requirements_are_what_the_host_check_looks_for(install: ModuleType) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    names = [line.split(">=")[0] for line in lines]
    assert sorted(names) == sorted(install.HOST_MODULES)
    assert not [line for line in lines if "<" in line or "==" in line]  # hosts bring their own versions
    assert f"torch>={install.TORCH_MINIMUM[0]}.{install.TORCH_MINIMUM[1]}" in lines


# ---- usage


@pytest.mark.parametrize("arguments", [["frob"], ["--demo"], ["demo", "a", "b"], ["demo", "--seed"], ["demo", " "], ["tests"]])
def test_wrong_arguments_are_one_line_and_status_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert "install.py" in one_line(result.stderr)


def test_help() -> None:
    result = run("--help")
    assert result.returncode == 0 and "demo" in result.stdout and "test" in result.stdout


def test_old_pythons_can_read_the_file() -> None:
    """So that they can be told; quoted annotations are not looked at, evaluated ones would fail there."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))
    notes = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg) and node.annotation]
    notes += [node.returns for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.returns]
    assert notes and not [note for note in notes if isinstance(note, ast.Subscript | ast.BinOp)]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "__future__"]


@pytest.mark.parametrize("command", ["demo", "test"])
def test_old_pythons_are_told(
    install: ModuleType, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(install, "sys", SimpleNamespace(version_info=(3, 9, 1), executable="python3.9", stderr=sys.stderr))
        status = install.main([command])
    assert status == 1
    assert "Python 3.10 or newer is needed; this is 3.9" in one_line(capsys.readouterr().err)


# ---- making the environment


@pytest.fixture
def bare(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """install.py in a repository of its own, run by a Python outside every environment."""
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(install, "check_room", lambda: None)
    return install


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


# ---- the two commands


def test_test_passes_arguments_on_and_the_status_through(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(install, "prepared", lambda extra: Path(sys.executable))
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: calls.append(command) or 5)
    assert install.main(["test", "-q", "tests/project/test_install.py", "-k", "nothing at all"]) == 5
    assert calls == [[sys.executable, "-m", "pytest", "-q", "tests/project/test_install.py", "-k", "nothing at all"]]


def test_get_passes_everything_on_and_keeps_the_folder(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(install, "prepared", lambda extra: Path(f"/env/{extra}/python"))
    monkeypatch.setattr(install.subprocess, "call", lambda command, **options: calls.append((command, options)) or 1)
    assert install.main(["get", "sd15", "--comfyui", "../ComfyUI"]) == 1
    words = [str(Path("/env/generate/python")), "-m", "wadi_core", "get", "sd15", "--comfyui", "../ComfyUI"]
    assert calls == [(words, {})]  # in the user's own folder: a relative path means what it says
    _parser().parse_args(words[3:])


def test_demo_generates_one_picture_in_outputs_and_tells_what_is_next(
    bare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(bare, "prepared", lambda extra: Path(sys.executable))
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: calls.append(command) or 0)
    assert bare.main(["demo", "a frog on top of a pizza"]) == 0
    (command,) = calls
    assert command[1:4] == ["-m", "wadi_core", "generate"] and "a frog on top of a pizza" in command
    assert str(bare.ROOT / "outputs" / "a-frog-on-top-of-a-pizza.png") in command
    assert (bare.ROOT / "outputs").is_dir()
    hint = next(line for line in capsys.readouterr().out.splitlines() if "-m wadi_core generate" in line)
    for words in (command[3:], shlex.split(hint)[3:]):  # both are what the command line understands
        assert _parser().parse_args(words).prompt == ["a frog on top of a pizza"]


def test_a_failed_demo_passes_the_status_on_and_promises_nothing(
    bare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bare, "prepared", lambda extra: Path(sys.executable))
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: 1)
    assert bare.main(["demo"]) == 1
    assert "Next" not in capsys.readouterr().out


def test_file_names(install: ModuleType) -> None:
    assert install.file_name("A red apple!") == "a-red-apple"
    assert install.file_name("../../etc/passwd") == "etc-passwd"
    assert install.file_name("りんご").startswith("picture-")
    assert install.file_name("りんご") != install.file_name("みかん")
    assert len(install.file_name("a cat " * 50)) <= 60


def test_ctrl_c_is_one_line(install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(extra: str) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "prepared", interrupted)
    assert install.main(["test"]) == 130
    assert one_line(capsys.readouterr().err) == "install.py: stopped\n"
