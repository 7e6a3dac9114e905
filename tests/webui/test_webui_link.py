"""`python install.py --webui`: the repository among a program's extensions, and wadi-mini in its folders of models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from a1111_extension import link as linking
from a1111_extension import programs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def webui(tmp_path: Path) -> Path:
    """The folder of an A1111, as far as the installer looks at it."""
    return program(tmp_path / "stable-diffusion-webui", "A1111")


def program(folder: Path, name: str) -> Path:
    """The files by which the installer knows a program."""
    known = [sign for sign in programs.KNOWN if sign.name == name]
    for sign in (*programs.NEEDED, *known, programs.Program("", "webui.py")):
        (folder / sign.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / sign.file).write_text(sign.word)
    (folder / "extensions").mkdir()
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
    assert "now leads to" in result.stdout
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
    assert "~nobody-of-this-name/webui is no folder of stable-diffusion-webui (A1111)" in result.stderr.replace("\\", "/")


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


@pytest.mark.parametrize(("name", "mini"), [("A1111", True), ("Forge", True), ("Forge Neo", True), ("reForge", False)])
def test_what_was_found_is_named_and_what_will_work(tmp_path: Path, name: str, mini: bool) -> None:
    result = run("--webui", str(program(tmp_path / "here", name)))
    assert (result.returncode, result.stderr) == (0, "")
    assert f"Found: {name}\n" in result.stdout
    assert "the sampler WaDi one-step" in result.stdout and "<lorad:NAME:1> for files" in result.stdout
    assert ("--mini" in result.stdout) == mini
    assert ("Clip skip" in result.stdout) == ("Stable Diffusion 2" in result.stdout) == (name == "Forge Neo")


@pytest.mark.parametrize(
    ("settings", "works", "sentence"),
    [
        ('{"disabled_extensions": ["Lora"]}', True, "no LoRaD files, until its own extension for LoRA is switched on"),
        ('{"disabled_extensions": ["wadi"]}', False, "nothing, until extensions, and this one, are switched on again"),
        ('{"disable_all_extensions": "extra"}', False, "nothing, until extensions, and this one, are switched on again"),
        ('{"disable_all_extensions": "none", "disabled_extensions": []}', True, "<lorad:NAME:1> for files"),
        ("[]", True, "<lorad:NAME:1> for files"),
    ],
)
def test_what_the_programs_settings_switch_off_is_told(webui: Path, settings: str, works: bool, sentence: str) -> None:
    (webui / "config.json").write_text(settings)
    result = run("--webui", str(webui))
    assert result.returncode == 0 and sentence in result.stdout
    assert ("the sampler WaDi one-step" in result.stdout) == works


@pytest.mark.parametrize(
    ("file", "name"), [("modules/sd_samplers_diffusers.py", "this program is SD.Next"), ("README.md", "the program in")]
)
def test_a_program_that_is_not_supported_is_named_and_left_alone(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    for path in ("webui.py", file):
        (tmp_path / path).touch()
    result = run("--webui", str(tmp_path))
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert name in result.stderr and "supported are stable-diffusion-webui (A1111) 1.9 or newer, Forge" in result.stderr
    assert not (tmp_path / "extensions").exists()


def asked(folder: Path, models: Path) -> bool:
    """Whether the stand-in of a Python was asked to write wadi-mini into these folders."""
    return (folder / "asked").read_text().split("\n")[:-1] == [
        *(str(ROOT), "-m", "wadi_core.mini.export"),
        *("--checkpoints", str(models / "Stable-diffusion"), "--loras", str(models / "Lora")),
    ]


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize("name", ["A1111", "Forge", "Forge Neo"])
def test_wadi_mini_is_written_by_the_programs_own_python(tmp_path: Path, name: str) -> None:
    webui = program(tmp_path / "here", name)
    program_python(webui)
    result = run("--webui", str(webui), "--mini")
    assert (result.returncode, result.stderr) == (0, "")
    assert asked(webui, webui / "models") and "128 x 128" in result.stdout


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_a_python_elsewhere_can_be_named(webui: Path, tmp_path: Path) -> None:
    elsewhere = program_python(tmp_path, 3)
    result = run("--webui", str(webui), "--mini", "--python", str(elsewhere))
    assert result.returncode == 3 and asked(tmp_path, webui / "models") and "128 x 128" not in result.stdout


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize("own", [None, 1], ids=["has none yet", "has one without torch"])
def test_wadi_mini_needs_no_python_of_the_programs_own(
    webui: Path, tmp_path: Path, own: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one writes it if it can, else one that the repository makes itself."""
    if own is not None:
        program_python(webui, own)
    said: list[str] = []
    this, other = (program_python(tmp_path / name, status) for name, status in (("this", 0), ("other", 0)))
    monkeypatch.setattr(sys, "executable", str(this))
    assert linking.add_webui(["--webui", str(webui), "--mini"], said.append, lambda: other) == 0
    assert asked(tmp_path / "this", webui / "models") and not (tmp_path / "other" / "asked").exists()
    program_python(tmp_path / "this", 1)
    assert linking.add_webui(["--webui", str(webui), "--mini"], said.append, lambda: other) == 0
    assert asked(tmp_path / "other", webui / "models")


def test_reforge_is_told_that_it_cannot_load_it(tmp_path: Path) -> None:
    webui = program(tmp_path / "here", "reForge")
    result = run("--webui", str(webui), "--mini")
    assert result.returncode == 1 and "reForge cannot load wadi-mini" in result.stderr
    assert (webui / "extensions" / "wadi").resolve() == ROOT
