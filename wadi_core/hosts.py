"""Host programs on the disk: where ComfyUI, A1111 and Forge look for LoRaDs and checkpoints, and what is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import one_line, refusal

EXTRA_PATHS = "extra_model_paths.yaml"  # of ComfyUI, in its folder


@dataclass(frozen=True)
class Places:
    """Where a program looks.

    Attributes:
        name: of the program.
        lorads: where a LoRaD is to be put.
        checkpoints: folders of checkpoints; a new one is put into the first.
        decoders: where a tiny decoder is to be put.
    """

    name: str
    lorads: Path
    checkpoints: tuple[Path, ...]
    decoders: Path


def comfyui(path: str | os.PathLike[str]) -> Places:
    """The places of a ComfyUI, those of its ``extra_model_paths.yaml`` too, or of a folder for ``--base-directory``.

    Raises:
        OSError: there is no such program. ValueError: its list of paths cannot be read; one line.
    """
    folder = _program(path, "ComfyUI", "main.py", "ComfyUI", "checkpoints")
    found = {kind: [folder / "models" / kind] for kind in ("lorad", "checkpoints", "vae_approx")}
    for kind, place, first in _extra_paths(folder / EXTRA_PATHS):
        if kind in found:
            found[kind].insert(0 if first else len(found[kind]), place)
    return Places("ComfyUI", found["lorad"][0], tuple(found["checkpoints"]), found["vae_approx"][0])


def webui(path: str | os.PathLike[str]) -> Places:
    """The places of an A1111 or Forge, or of a folder for its ``--data-dir``.

    Raises:
        OSError: there is no such program; one line.
    """
    folder = _program(path, "A1111, Forge or Forge Neo", "webui.py", "webui", "Stable-diffusion") / "models"
    return Places("the web UI", folder / "LoRaD", (folder / "Stable-diffusion",), folder / "VAE-taesd")


def _program(path: str | os.PathLike[str], name: str, sign: str, inside: str, checkpoints: str) -> Path:
    """The folder of a program's models' folder, also of one that is packed with its own Python in the folder above."""
    folder = Path(path).expanduser()
    for place in (folder, folder / inside):
        if (place / "models").is_dir() and ((place / sign).is_file() or (place / "models" / checkpoints).is_dir()):
            return place
    raise FileNotFoundError(one_line(f"{folder} is no folder of {name}: there is no {sign} or no folder models in it"))


def _extra_paths(path: Path) -> Iterator[tuple[str, Path, bool]]:
    """Kind, folder, and whether it comes before the program's own: what ComfyUI reads of its list."""
    if not path.is_file():
        return
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise refusal(path, f"this is no YAML: {str(error).partition(chr(10))[0]}") from error
    for section in (read or {}).values() if isinstance(read or {}, dict) else ():
        yield from _of_section(path.parent, section)


def _of_section(folder: Path, section: Any) -> Iterator[tuple[str, Path, bool]]:
    if not isinstance(section, dict):
        return
    base = folder / Path(os.path.expandvars(os.path.expanduser(str(section.get("base_path") or ""))))
    for kind, places in section.items():
        if kind not in ("base_path", "is_default") and isinstance(places, str):
            for place in filter(None, places.split("\n")):
                yield kind, base / place, bool(section.get("is_default"))


def checkpoint_of(places: Places, architecture: str, prediction_type: str) -> Path | None:
    """A multi-step checkpoint of an architecture that a program has; of pickles nothing is known.

    Args:
        prediction_type: which a file that says its own must have.
    """
    from .lorad.weights import Weights

    for folder in places.checkpoints:
        for path in sorted(folder.rglob("*.safetensors")) if folder.is_dir() else ():
            try:
                found = Weights.open(path)
            except (OSError, ValueError):  # anything else that lies in such folders
                continue
            entry = found.layout.prefix + "input_blocks.0.0.weight"
            whole = found.layout.name == "ldm" and entry in found.shapes and found.shape(entry)[1] == 4
            told = found.prediction_type in (None, prediction_type) and "wadi.alpha_T_squared" not in found.metadata
            if whole and told and found.architecture == architecture:
                return path
    return None
