"""Packages that are not there: how they are installed, told the same everywhere."""

from __future__ import annotations

from importlib.util import find_spec

from .files import one_line

# What no part of the trainer works without.
TRAINER = ("torch", "safetensors", "numpy", "yaml", "tqdm", "PIL", "diffusers", "transformers", "accelerate", "psutil")


def install(what: str) -> str:
    """The command that installs a package of the index, or an extra of this project, written ``.[name]``."""
    if what.startswith("."):
        return f'python -m pip install -e "{what}" in the folder of the repository'
    return f"python -m pip install {what}"


def missing(error: ImportError, extra: str) -> str:
    """What to say of a module that is not there or cannot be imported, and of the extra it comes with."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name.partition('.')[0]} is not installed: {install(f'.[{extra}]')}"
    return f"a package cannot be imported ({one_line(error)}): {install(f'.[{extra}]')}"


def require(extra: str, *modules: str) -> None:
    """Leave the program with one line, before it imports or begins anything, if one of its modules is not there.

    Raises:
        SystemExit: one is not; the line names it and the extra of this project that it comes with.
    """
    absent = [name for name in modules if find_spec(name) is None]
    if absent:
        several = "packages {} are" if len(absent) > 1 else "package {} is"
        raise SystemExit(f"error: the {several.format(' and '.join(absent))} not installed: {install(f'.[{extra}]')}")
