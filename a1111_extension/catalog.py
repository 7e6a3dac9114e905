"""LoRaD files: where the program looks for them, and what is in them.

Files in the program's own folder for LoRA are in its table already. Those in ``models/LoRaD``, and in the folder of the
settings page, are added to that table, which the program empties whenever it lists its folder anew.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path

from modules import paths, shared

from wadi_core.files import files_below
from wadi_core.lorad import LoRaD
from wadi_core.lorad.checkpoint import PICKLE_ENDINGS, read_header
from wadi_core.lorad.format import AUTHORS_ENDINGS, LORAD_ENDINGS

from . import host

NONE = "None"  # of a choice
ENDING = ".safetensors"


def folders() -> list[Path]:
    """Folders of LoRaD files beside the program's own one for LoRA; the first is where new files go."""
    chosen = str(getattr(shared.opts, "wadi_folder", "") or "").strip()
    return [Path(paths.models_path) / "LoRaD", *([Path(chosen)] if chosen else [])]


def refresh() -> None:
    """Put the files of :func:`folders` into the program's table, under their names and aliases, where they are not yet."""
    extension = host.lora_extension()
    if extension is None:
        return
    on_disk = sys.modules["network"].NetworkOnDisk
    known = {entry.filename for entry in extension.available_networks.values()}
    for folder in folders():
        for path in files_below(folder, ENDING):
            if str(path) in known or path.stem in extension.available_networks:
                continue
            entry = on_disk(path.stem, str(path))
            extension.available_networks[path.stem] = entry
            if entry.alias in extension.available_network_aliases:
                host.forbid_alias(entry.alias)
            extension.available_network_aliases[path.stem] = entry
            extension.available_network_aliases[entry.alias] = entry


def names() -> list[str]:
    """Names of the LoRaD files in the program's table; no file is opened for it."""
    refresh()
    extension = host.lora_extension()
    entries = {} if extension is None else extension.available_networks
    return sorted((name for name, entry in entries.items() if "wadi.format" in entry.metadata), key=str.casefold)


def choices() -> list[str]:
    """What a list to choose from offers: nothing, and every LoRaD."""
    return [NONE, *names()]


def known_names() -> list[str]:
    """Names and aliases of all adapter files in the program's table, of every kind."""
    extension = host.lora_extension()
    return [] if extension is None else [*extension.available_networks, *extension.available_network_aliases]


def file_of(name: str) -> Path | None:
    """The file of a name or alias, as the program finds it; None if it finds none."""
    extension = host.lora_extension()
    if extension is None:
        return None
    table = extension.available_network_aliases
    if name.lower() in extension.forbidden_network_aliases:
        table = extension.available_networks
    if name not in table:
        extension.update_available_networks_by_names([name])
        refresh()
    return Path(table[name].filename) if name in table else None


def look(path: str | os.PathLike[str]) -> LoRaD | None:
    """What a LoRaD file holds, its factors without their numbers; None for an adapter of another kind.

    The file is read whole and checked the first time, and again when it has changed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of a newer format; both with a message of one line.
    """
    state = os.stat(path)
    return _look(str(path), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _look(path: str, changed: int, size: int) -> LoRaD | None:
    if path.lower().endswith(PICKLE_ENDINGS):  # a LoRaD is none, and the program has its own way with them
        return None
    shapes = read_header(path).shapes
    if any(name.endswith(tuple(AUTHORS_ENDINGS)) for name in shapes):
        raise ValueError(
            f"{path}: these are factors as the authors write them: 'python -m wadi_core convert' makes a LoRaD of them"
        )
    if not any(name.endswith(tuple(LORAD_ENDINGS)) for name in shapes):
        return None
    lorad = LoRaD.load(path)
    meta = {key: (a.to("meta"), b.to("meta")) for key, (a, b) in lorad.factors.items()}
    return LoRaD(meta, lorad.metadata)
