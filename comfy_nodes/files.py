"""Adapter files in ComfyUI's model folders: which there are, where they lie, and where new ones go.

Names come from widgets and from whoever posts a workflow, so they are looked up in the folders and never taken as paths.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths

from ..wadi_core import mini
from ..wadi_core.files import one_line
from ..wadi_core.lorad import LoRaD
from ..wadi_core.lorad.checkpoint import read_header
from ..wadi_core.lorad.format import LORAD_ENDINGS

FOLDER = "lorad"
LORA_FOLDER = "loras"
ENDINGS = {".safetensors", ".pth"}
HEADER_LIMIT = 4_000_000  # bytes of a header that are searched; an adapter's is a tenth of that

# Files that were looked into or read, as long as they stay the same: path, time and size of the last change.
_Stamp = tuple[str, int, int]
_is_lorad: dict[_Stamp, bool] = {}
_loaded: weakref.WeakValueDictionary[_Stamp, LoRaD] = weakref.WeakValueDictionary()


def register() -> None:
    """Tell ComfyUI of ``models/lorad``, and make it; a second time it does nothing."""
    place = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, place)
    if (mini.FOLDER / mini.ADAPTERS).is_dir():  # after the user's own
        folder_paths.add_model_folder_path(FOLDER, str(mini.FOLDER / mini.ADAPTERS))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(ENDINGS))
    with contextlib.suppress(OSError):  # models on a disk that cannot be written are still read
        os.makedirs(place, exist_ok=True)


def names() -> list[str]:
    """Names of the adapter files: all of ``models/lorad``, and the LoRaDs among ``models/loras``."""
    found = set(folder_paths.get_filename_list(FOLDER))
    for name in folder_paths.get_filename_list(LORA_FOLDER):
        path = folder_paths.get_full_path(LORA_FOLDER, name)
        if path is not None and name.endswith(".safetensors") and _holds_lorad(path):
            found.add(name)
    return sorted(found)


def path_of(name: str) -> Path:
    """The file of this name.

    Raises:
        OSError: there is none in the folders; one line.
    """
    for folder in (FOLDER, LORA_FOLDER):
        path = folder_paths.get_full_path(folder, str(name))
        if path is not None:
            return Path(path)
    raise FileNotFoundError(one_line(f"{name}: there is no such file in models/{FOLDER} or models/{LORA_FOLDER}"))


def stamp(name: str) -> _Stamp:
    """Path, time and size of a file: what has to be the same for its content to be.

    Raises:
        OSError: there is no such file; one line.
    """
    path = path_of(name)
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


def load(name: str) -> LoRaD:
    """The adapter of this name; one that is still in use is not read again.

    Raises:
        OSError, ValueError: there is no such file, or it is no LoRaD; one line.
    """
    key = stamp(name)
    lorad = _loaded.get(key)
    if lorad is None:
        with names_for_places():
            lorad = _loaded[key] = LoRaD.load(key[0])
    return lorad


@contextlib.contextmanager
def names_for_places() -> Iterator[None]:
    """Let what is refused inside be told by names in the model folders: where these lie is the server's own business.

    Raises:
        OSError, ValueError: what was raised inside, in the words that a user of the server is to see.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        said = named(str(error))
        if said == str(error):
            raise
        raise type(error)(said) from error


def named(text: str) -> str:
    """A text in which files are called as the nodes list them, rather than by their places on the server's disks."""
    kinds = folder_paths.folder_names_and_paths
    places = {os.path.abspath(place): f"models/{kind}" for kind, (paths, _) in kinds.items() for place in paths}
    places |= {os.path.abspath(folder_paths.models_dir): "models", str(mini.FOLDER): mini.FOLDER.name}
    for place in sorted(places, key=len, reverse=True):  # what is inside another goes before it
        text = text.replace(place, places[place])
    return text


def metadata(name: str) -> dict[str, str]:
    """What is written in an adapter's file about it; nothing for a file that is no .safetensors.

    Raises:
        OSError, ValueError: there is no such file, or it is damaged; one line.
    """
    path = path_of(name)
    if path.suffix.lower() != ".safetensors":
        return {}
    with names_for_places():
        return dict(read_header(path).metadata)


def new_path(folder: str, name: str) -> Path:
    """Where a new file goes: inside the first of a kind's model folders, under a name that is still free.

    Args:
        folder: a kind of ComfyUI's model folders.
        name: as the user wrote it, with or without ``.safetensors``; may name folders inside.

    Raises:
        ValueError: a name that leads out of the folder, or none; one line.
        OSError: the folder cannot be made.
    """
    parts = PurePosixPath(name.strip().replace("\\", "/")).parts
    outside = PureWindowsPath(name).drive or any(part in ("..", "/") for part in parts)
    if not parts or outside:
        raise ValueError(one_line(f"{name!r} is no name for a file in models/{folder}: write one without '..' or a drive"))
    root = Path(folder_paths.get_folder_paths(folder)[0])
    path = root.joinpath(*parts)
    if path.suffix.lower() != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    if not path.parent.resolve().is_relative_to(root.resolve()):  # a link that leads out
        raise ValueError(one_line(f"{name!r} leads out of models/{folder}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    stem, number = path.stem, 1
    while path.exists():
        number += 1
        path = path.with_name(f"{stem}-{number}.safetensors")
    return path


def name_of(folder: str, path: Path) -> str:
    """The name by which the loaders list a file that :func:`new_path` placed."""
    return os.path.relpath(path, folder_paths.get_folder_paths(folder)[0])


def _holds_lorad(path: str) -> bool:
    """Whether a tensor of a .safetensors file is named as a LoRaD's are; looks at the header alone, and once."""
    try:
        status = os.stat(path)
        key = (path, status.st_mtime_ns, status.st_size)
        if key not in _is_lorad:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(min(length, HEADER_LIMIT))
            _is_lorad[key] = any(f'{ending}"'.encode() in header for ending in LORAD_ENDINGS)
        return _is_lorad[key]
    except OSError:  # gone or not readable: not to be offered
        return False
