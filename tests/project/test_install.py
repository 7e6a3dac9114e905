"""install.py: what hosts call, the two commands' way to an environment, and one clear line for whatever goes wrong.

No environment is built and nothing is downloaded here: pip and venv are stood in for.
"""

from __future__ import annotations

import ast
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from installing import ROOT, SCRIPT, one_line

from wadi_core.cli import _parser


def run(*arguments: str, options: tuple[str, ...] = (), cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


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


# ---- the two commands


def test_test_passes_arguments_on_and_the_status_through(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(install, "prepared", lambda extra: Path(sys.executable))
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: calls.append(command) or 5)
    assert install.main(["test", "-q", "tests/project/test_install.py", "-k", "nothing at all"]) == 5
    assert calls == [[sys.executable, "-m", "pytest", "-q", "tests/project/test_install.py", "-k", "nothing at all"]]


def test_the_whole_suite_runs_in_a_few_processes(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(install, "prepared", lambda extra: Path(sys.executable))
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: calls.append(command) or 0)
    for cores, processes in ((1, "1"), (2, "2"), (64, str(install.TEST_PROCESSES))):
        monkeypatch.setattr(install, "cores", lambda cores=cores: cores)
        assert install.main(["test"]) == 0
        assert calls.pop() == [sys.executable, "-m", "pytest", "-n", processes, "--dist", "loadfile"]


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
