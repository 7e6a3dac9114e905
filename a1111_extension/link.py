"""``python install.py --webui FOLDER``: this repository as an extension of a program that is there already.

Standard library only, and nothing of a host: it runs under any Python, before the program has ever started.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from . import programs

ROOT = Path(__file__).resolve().parents[1]
NAME = "wadi"  # of the extension's folder
# The program's own, as its start script makes it; the last is packed with the program.
PYTHONS = (
    *("venv/bin/python", "venv/Scripts/python.exe", ".venv/bin/python", ".venv/Scripts/python.exe"),
    "../system/python/python.exe",
)
NEEDED = ("torch", "safetensors", "numpy")  # to write wadi-mini


def add_webui(arguments: list[str], say: Callable[[str], None], prepared: Callable[[], Path]) -> int:
    """The command; returns the exit status.

    Args:
        arguments: of the command line.
        say: called with each line for the user.
        prepared: a Python that has ``NEEDED``, installed if need be; called only where there is no other.

    Raises:
        OSError: something is not where it should be, or cannot be made; one line.
    """
    options = _parser().parse_args(arguments)
    folder = Path(os.path.expanduser(options.webui))  # unlike Path.expanduser, it needs no home
    if not (folder / "webui.py").is_file():
        raise FileNotFoundError(f"{folder} is no folder of {programs.SUPPORTED}: there is no webui.py in it")
    program = programs.supported(folder)
    if program is None:
        raise OSError(programs.refusal(folder))
    say(f"Found: {program.name}")
    say(link(folder))
    if options.mini and not program.mini:
        raise OSError(f"{program.name} cannot load wadi-mini: use a checkpoint of Stable Diffusion 1.5 with a LoRaD for it")
    if options.mini:
        return export_mini(folder, options.python or python_of(folder) or str(prepared()), say)
    say("Start it, or restart it when it runs. What is there then:")
    for line in what_works(folder, program):
        say(f"  {line}")
    if program.mini:
        say(f"For a first picture without a download: python install.py --webui {options.webui} --mini")
    return 0


def what_works(folder: Path, program: programs.Program) -> Iterator[str]:
    """What a program will have, and what it will not have by its settings."""
    off = _switched_off(folder)
    if off & {"all", "extra", NAME}:
        yield "nothing, until extensions, and this one, are switched on again on its page Extensions"
        return
    yield "the sampler WaDi one-step, and the accordion WaDi"
    if off & {name.lower() for name in program.lora}:
        yield "no LoRaD files, until its own extension for LoRA is switched on again on its page Extensions"
    else:
        yield "<lorad:NAME:1> for files in models/LoRaD and models/Lora, and their cards on the page LoRaD"
    yield from program.notes


def _switched_off(folder: Path) -> set[str]:
    """The extensions that a program's settings switch off, in small letters; ``all`` or ``extra`` for many at once."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        many = str(settings.get("disable_all_extensions", "none"))
        return {str(name).lower() for name in settings.get("disabled_extensions", [])} | {many}
    except (OSError, ValueError, TypeError, AttributeError):  # it has not been started, or will say so itself
        return set()


def link(folder: Path) -> str:
    """Make this repository one of a program's extensions, by a link; says what was done. A second time nothing is.

    Raises:
        OSError: there is something else of this name, or no link can be made; one line.
    """
    extensions = folder / "extensions"
    if extensions.is_dir() and ROOT.parent == extensions.resolve():
        return f"{ROOT} is in the program's extensions already"
    place = extensions / NAME
    if place.exists() and place.resolve() == ROOT:
        return f"{place} is there already"
    if os.path.lexists(place):
        if place.exists() or not place.is_symlink():
            raise FileExistsError(f"{place} is there and is not this repository: move it away first")
        place.unlink()  # a link to where the repository once was
    extensions.mkdir(exist_ok=True)
    try:
        os.symlink(ROOT, place, target_is_directory=True)
    except OSError as error:
        if os.name != "nt":
            raise OSError(f"{place} cannot be made: {error.strerror or error}") from error
        _junction(place)
    return f"{place} now leads to {ROOT}"


def _junction(place: Path) -> None:
    """Where Windows lets only administrators make links, a junction does."""
    result = subprocess.run(["cmd", "/c", "mklink", "/J", str(place), str(ROOT)], capture_output=True, check=False)
    if result.returncode != 0:
        raise OSError(f"{place} cannot be made: clone the repository into {place.parent} instead")


def python_of(folder: Path) -> str | None:
    """A Python that can write wadi-mini, the program's own before this one; None where neither can."""
    own = [str(folder / name) for name in PYTHONS if (folder / name).is_file()]
    return next((python for python in [*own, sys.executable] if _can_write(python)), None)


def _can_write(python: str) -> bool:
    code = "import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))"
    try:
        return subprocess.run([python, "-c", code, *NEEDED], capture_output=True, check=False).returncode == 0
    except OSError:  # of a folder that was moved, or of another system
        return False


def export_mini(folder: Path, python: str, say: Callable[[str], None]) -> int:
    """Have a Python write wadi-mini into its folders of models; returns that one's exit status."""
    models = folder / "models"
    command = [python, "-m", "wadi_core.mini.export"]
    command += ["--checkpoints", str(models / "Stable-diffusion"), "--loras", str(models / "Lora")]
    status = subprocess.call(command, cwd=str(ROOT))
    if status == 0:
        say("Next: start it, choose the checkpoint wadi-mini, the sampler WaDi one-step, and 128 x 128 pixels, and type")
        say("  a red apple <lorad:wadi-mini-one-step:1>")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python install.py")
    parser.add_argument("--webui", required=True, metavar="FOLDER", help="where A1111, Forge or Forge Neo is")
    parser.add_argument("--mini", action="store_true", help="also write wadi-mini into its folders of models")
    parser.add_argument("--python", metavar="PYTHON", help="a Python with torch for that (default: one that is found)")
    return parser
