"""Where the weights of a network lie in a folder in diffusers layout, in every spelling that programs give them.

    diffusion_pytorch_model.safetensors                         one file; a text encoder's is model.safetensors
    diffusion_pytorch_model.fp16.safetensors                    a variant of it
    diffusion_pytorch_model.safetensors.index.json              the list of several files (shards)
    diffusion_pytorch_model.safetensors.index.fp16.json         a variant in shards
    diffusion_pytorch_model.fp16.safetensors.index.json         the same, as newer versions write it
    diffusion_pytorch_model.bin                                 all of these as pickles; a text encoder's is pytorch_model.bin

Of several the plain one is taken, or else fp32, fp16, bf16, then any other in the order of the names. A .safetensors
file goes before a pickle. ``non_ema`` comes last of all: training went on with those weights, and pictures are not
made with them.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from .. import configs
from ..files import one_line, refusal

logger = logging.getLogger("wadi")

STEM = "diffusion_pytorch_model"
TEXT_STEM = "model"
_PICKLE_STEMS = {TEXT_STEM: "pytorch_model"}
_VARIANTS = ("", "fp32", "fp16", "bf16")
_NOT_FOR_PICTURES = "non_ema"
_SHARD = r"-\d{5}-of-\d{5}"


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a network's weights.

    Attributes:
        files: one, or the shards.
        index: the list of the shards, where there is one.
        variant: ``fp16`` and the like; empty for the plain one.
    """

    files: tuple[Path, ...]
    index: Path | None
    variant: str


@dataclass(frozen=True)
class _Form:
    """One spelling of a network's weights: the file to begin with, which is an index where there are shards."""

    path: Path
    variant: str
    pickle: bool

    @property
    def is_index(self) -> bool:
        return self.path.suffix == ".json"

    @property
    def order(self) -> tuple[bool, bool, int, str, bool]:
        place = _VARIANTS.index(self.variant) if self.variant in _VARIANTS else len(_VARIANTS)
        return self.variant == _NOT_FOR_PICTURES, self.pickle, place, self.variant, self.is_index


def has_weights(folder: Path, stem: str = STEM) -> bool:
    """Whether a folder holds a network's weights in any spelling."""
    return bool(_forms(folder, stem))


def weight_files(folder: Path, stem: str = STEM) -> WeightFiles:
    """The files to read a network's weights from; where there is a choice of variants, a line in the log names it.

    Args:
        folder: of the network itself, such as ``unet``.
        stem: how its files' names begin; ``model`` for a text encoder.

    Raises:
        OSError: there are none, or a shard is missing.
        ValueError: an index that makes no sense. Both with a message of one line.
    """
    forms = _forms(folder, stem)
    if not forms:
        raise FileNotFoundError(one_line(f"{folder}: {stem}.safetensors is missing{_what_is_there(folder, stem)}"))
    chosen, *others = forms
    if left := sorted({other.variant or "the plain one" for other in others if other.variant != chosen.variant}):
        logger.info("%s: %s is read; left out: %s", folder, chosen.path.name, ", ".join(left))
    if not chosen.is_index:
        return WeightFiles((chosen.path,), None, chosen.variant)
    return WeightFiles(_shards(chosen.path), chosen.path, chosen.variant)


def _forms(folder: Path, stem: str) -> list[_Form]:
    """All spellings that lie in a folder, the best first."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        for pickle in (False, True):
            name, ending = (_PICKLE_STEMS.get(stem, stem), "bin") if pickle else (stem, "safetensors")
            variant = _variant(path.name, re.escape(name), ending)
            if variant is not None and path.is_file():
                found.append(_Form(path, variant, pickle))
    return sorted(found, key=lambda form: form.order)


def _variant(name: str, stem: str, ending: str) -> str | None:
    """The variant that a file's name speaks of, empty for the plain one; None if it is none of this network's files."""
    own = r"(?:\.(?P<variant>[^.]+))?"
    patterns = (
        rf"{stem}{own}\.{ending}",
        rf"{stem}\.{ending}\.index{own}\.json",
        rf"{stem}{own}\.{ending}\.index\.json",
    )
    for pattern in patterns:
        if (found := re.fullmatch(pattern, name)) and not re.search(_SHARD, name):
            return found["variant"] or ""
    return None


def _shards(index: Path) -> tuple[Path, ...]:
    table = configs.read(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise refusal(index, "this index does not say which file holds which tensor")
    paths = tuple(index.parent / Path(name).name for name in sorted(set(table.values())))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        why = f"{missing[0]}: this file is missing{more}, and {index.name} names it{_unfinished(index.parent)}"
        raise FileNotFoundError(one_line(f"{why}: download it again"))
    return paths


def _what_is_there(folder: Path, stem: str) -> str:
    """What a folder holds in the place of weights, as the end of a sentence."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if unfinished := _unfinished(folder):
        return unfinished
    if shards := [name for name in names if re.search(_SHARD, name)]:
        return f" (there is {shards[0]}, without the index that belongs to it)"
    others = [name for name in names if name.endswith((".safetensors", ".bin", ".msgpack", ".onnx", ".ckpt", ".h5", ".gguf"))]
    return f" (there is {others[0]}, which is not read in its place)" if others else ""


def _unfinished(folder: Path) -> str:
    """Signs of a download that did not end: links to files that are not there, and files that are called so."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            return f" ({path.name} is a link to a file that is not there)"
        if path.name.endswith((".incomplete", ".part", ".crdownload", ".aria2", ".download")):
            return f" ({path.name} is a download that did not end)"
    return ""
