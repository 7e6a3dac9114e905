"""Write wadi-mini, or a base like it, as the files that A1111, Forge and Forge Neo load.

python -m wadi_core.mini.export --checkpoints WEBUI/models/Stable-diffusion --loras WEBUI/models/Lora [--base FOLDER]

That is one checkpoint in the LDM layout, the LoRaD that makes it a one-step network, and, for A1111, a ``.yaml`` with its
shape and a folder with the text encoder's settings and tokenizer beside it. These two are found by this pack's extension.
Forge and Forge Neo know wadi-mini by its widths, with the extension, and no other base of widths of its own. Only torch
and safetensors are needed, so that a host program's own Python can do it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import configs, mini
from ..files import atomic_write, existing_file, one_line
from ..lorad.checkpoint import read_header, read_tensors, write_safetensors
from ..output import take_any_text
from . import ldm

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
TEXT_ENCODER = "-text-encoder"  # after the checkpoint's name
NAME = "wadi-mini"
_TEXT_PREFIX = "text_model."


@dataclass(frozen=True)
class Exported:
    """The files that were written: ``lorad`` is None where none was asked for."""

    checkpoint: Path
    settings: Path
    text_encoder: Path
    lorad: Path | None

    def __iter__(self) -> Iterator[Path]:
        return (path for path in (self.checkpoint, self.settings, self.text_encoder, self.lorad) if path is not None)


def export(
    checkpoints: str | os.PathLike[str],
    loras: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] = "mini",
    name: str = NAME,
) -> Exported:
    """Write a base as one checkpoint, and the LoRaD of wadi-mini beside other adapters; what is there is replaced.

    Args:
        checkpoints: the program's folder of checkpoints, made if need be.
        loras: its folder of adapters; None leaves the LoRaD out.
        base: ``mini``, or a folder in diffusers layout with one ``.safetensors`` file for each part.
        name: of the checkpoint, without its ending.

    Raises:
        OSError: something is missing or cannot be written.
        ValueError: a base that the layout has no words for. Both with a message of one line.
    """
    folder = mini.folder() if str(base) == "mini" else Path(base)
    settings = {part: configs.read(folder / part / "config.json") for part in ldm.PREFIXES}
    schedule = configs.read(folder / "scheduler" / "scheduler_config.json")
    target = Path(checkpoints)
    checkpoint, text_encoder = target / f"{name}.safetensors", target / f"{name}{TEXT_ENCODER}"
    text = ldm.settings_file(settings, schedule, text_encoder.name)
    tensors = ldm.checkpoint({part: _weights(folder, part) for part in ldm.PREFIXES}, settings)
    lorad = existing_file(mini.lorad_path()) if loras is not None else None

    text_encoder.mkdir(parents=True, exist_ok=True)
    _copy(folder / "text_encoder" / "config.json", text_encoder / "config.json")
    for file in TOKENIZER_FILES:
        own = folder / "tokenizer" / file
        _copy(own if own.is_file() else configs.TOKENIZER / file, text_encoder / file)
    # The settings come first: a checkpoint without them would be taken for one of Stable Diffusion 1.5's size.
    with atomic_write(checkpoint.with_suffix(".yaml")) as file:
        file.write(text.encode())
    title = {"format": "pt", "modelspec.title": name, "modelspec.resolution": _resolution(settings["unet"]["sample_size"])}
    write_safetensors(checkpoint, {key: tensor.contiguous() for key, tensor in tensors.items()}, title)
    copied = None
    if lorad is not None and loras is not None:
        copied = Path(loras) / lorad.name
        copied.parent.mkdir(parents=True, exist_ok=True)
        _copy(lorad, copied)
    return Exported(checkpoint, checkpoint.with_suffix(".yaml"), text_encoder, copied)


def _weights(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors of a part, the text encoder's with the ``text_model.`` that checkpoints have before its names."""
    tensors = read_tensors(read_header(folder / mini.WEIGHTS[part]))
    if part != "text_encoder":
        return tensors
    bare = {name.removeprefix(_TEXT_PREFIX): tensor for name, tensor in tensors.items()}
    return {_TEXT_PREFIX + name: tensor for name, tensor in bare.items() if not name.endswith("position_ids")}


def _resolution(sample_size: int) -> str:
    return f"{sample_size * 8}x{sample_size * 8}"


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as file:
        file.write(source.read_bytes())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    take_any_text()
    parser = argparse.ArgumentParser(prog="python -m wadi_core.mini.export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoints", required=True, metavar="DIR", help="the program's folder of checkpoints")
    parser.add_argument("--loras", metavar="DIR", help="its folder of adapters (default: the LoRaD is left out)")
    parser.add_argument("--base", default="mini", metavar="FOLDER", help="a base in diffusers layout (default: mini)")
    parser.add_argument("--name", default=NAME, help=f"of the checkpoint (default: {NAME})")
    options = parser.parse_args(arguments)
    try:
        written = export(options.checkpoints, options.loras, options.base, options.name)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"wadi: {one_line(error)}\n")
        return 1
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
