"""Packages that are not there: how they are installed, told the same everywhere."""

from __future__ import annotations

from .files import one_line


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
