"""``python install.py --webui FOLDER``: this repository as an extension of an A1111 or Forge that is there already.

Standard library only, and nothing of a host: it runs under any Python, before the program has ever started.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "wadi"  # of the extension's folder
PYTHONS = ("venv/bin/python", "venv/Scripts/python.exe", "../system/python/python.exe")  # the last: packed with the program
FORGE_CANNOT = (
    "Forge accepts networks of Stable Diffusion's own widths only, so it cannot load wadi-mini: use a checkpoint of Stable "
    "Diffusion 1.5 with a one-step LoRaD made for it, or A1111"
)


def add_webui(arguments: list[str], say: Callable[[str], None]) -> int:
    """The command; returns the exit status.

    Args:
        arguments: of the command line.
        say: called with each line for the user.

    Raises:
        OSError: something is not where it should be, or cannot be made; one line.
    """
    options = _parser().parse_args(arguments)
    folder = Path(os.path.expanduser(options.webui))  # without a home folder ~ stays what it is
    if not (folder / "webui.py").is_file():
        raise FileNotFoundError(f"{folder} is no folder of A1111 or Forge: there is no webui.py in it")
    say(link(folder))
    if options.mini:
        if (folder / "modules_forge").is_dir():
            raise OSError(FORGE_CANNOT)
        return export_mini(folder, options.python or python_of(folder), say)
    say("Start it (or restart it, when it runs): the accordion WaDi and the sampler WaDi one-step are there then.")
    if not (folder / "modules_forge").is_dir():
        say(f"For a first picture without a download: python install.py --webui {options.webui} --mini")
    return 0


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


def python_of(folder: Path) -> str:
    """The Python that a program runs under.

    Raises:
        OSError: it is not where programs of this kind have it; one line.
    """
    for name in PYTHONS:
        if (folder / name).is_file():
            return str(folder / name)
    places = ", ".join(PYTHONS[:2])
    raise FileNotFoundError(f"the program's own Python is not in {folder} ({places}): name it with --python")


def export_mini(folder: Path, python: str, say: Callable[[str], None]) -> int:
    """Have the program's own Python write wadi-mini into its folders of models; returns that one's exit status."""
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
    parser.add_argument("--webui", required=True, metavar="FOLDER", help="where A1111 or Forge is")
    parser.add_argument("--mini", action="store_true", help="also write wadi-mini into its folders of models (A1111)")
    parser.add_argument("--python", metavar="PYTHON", help="the program's own Python, where it is not in its venv")
    return parser
