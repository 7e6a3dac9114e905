"""The commands that work on files of weights: ``merge`` and ``convert``. :mod:`.cli` puts them beside its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import catalog, entries, hub
from .files import one_line

if TYPE_CHECKING:
    from .lorad import LoRaD
    from .lorad.convert import LoRA
    from .lorad.weights import Weights

N = TypeVar("N")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# What a network is asked for when a LoRA is compared with the LoRaD that it stands for: anything, but always the same.
PROMPTS = ("a red circle on a white table", "a portrait of an old man", "a city street at night", "")

_BASE = "a folder in diffusers layout, a .safetensors file in any layout, a hub id, or mini"
_MERGE = (
    "Rotate the weights of a base by one or several LoRaDs. The result has the layout, types and metadata of the base, "
    "so programs without LoRaD support can load it."
)
_CONVERT = (
    "Write an adapter in another form: this project's (lorad), the authors' (factors), or a plain LoRA (lora). "
    "A LoRA is made for one base and has an error that depends on its rank."
)


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands of this module to those of the command line."""
    merge = commands.add_parser("merge", parents=[common], help="rotate the weights of a base by adapters", description=_MERGE)
    merge.set_defaults(command=_merge)
    add = merge.add_argument
    add("--base", required=True, metavar="B", help=_BASE)
    add("--lorad", required=True, action="append", metavar="L[:S]", help="an adapter and its strength; may be repeated")
    add("-o", "--output", required=True, metavar="O", help="a .safetensors file; for a folder as base also a new folder")
    add("--stochastic", action="store_true", help="round at random, without bias (helps 8-bit weights)")

    convert = commands.add_parser("convert", parents=[common], help="write an adapter in another form", description=_CONVERT)
    convert.set_defaults(command=_convert, usage_error=convert.error)
    add = convert.add_argument
    add("file", metavar="IN", help="a LoRaD, or the authors' factors (.safetensors or .pth)")
    add("-o", "--output", required=True, metavar="OUT", help="the file to write")
    add("--to", required=True, choices=("lorad", "factors", "lora"), help="form to write")
    add("--base", metavar="B", help=f"for lora: the base that it will be used with: {_BASE}")
    add("--rank", type=WHOLE, metavar="R", help="for lora: the rank of every layer")
    add(
        "--strength",
        type=number(entries.strength),
        metavar="S",
        help="for lora: LoRaD strength that the LoRA has at its strength 1 (default: 1)",
    )
    add("--dtype", choices=tuple(DTYPES), help="type of the stored numbers (default: fp16, for factors fp32)")


def number(read: Callable[[str], N]) -> Callable[[str], N]:
    """What reads a number, as the type of an option: its complaint is what argparse says."""

    def reading(text: str) -> N:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return reading


WHOLE, DECIMAL = number(entries.whole), number(entries.decimal)


def adapters(entries: list[str] | None) -> list[tuple[str | Path, float]] | None:
    """``FILE[:STRENGTH]``, as often as given; None where nothing was said. A name of the hub stays a text."""
    if entries is None:
        return None
    from . import mini

    found = []
    for entry in entries:
        name, strength = split_strength(entry)
        if name != "none":
            found.append((mini.lorad_path() if name == "mini" else name if hub.parse(name) else Path(name), strength))
    if len(found) < len(entries) and len(entries) > 1:
        raise ValueError('"--lorad none" does not go with other adapters')
    return found


def named(options: argparse.Namespace) -> Iterator[str]:
    """All that a command's options name which may be on the model hub.

    Raises:
        ValueError: an adapter's strength is none; one line.
    """
    for option in ("base", "student", "file", "lorad", "control", "embedding", "vae"):
        value = getattr(options, option, None)
        for name in value if isinstance(value, list) else [value] if value else []:
            known = catalog.DECODERS.get(name) if option == "vae" else None
            yield known or (split_strength(name)[0] if option == "lorad" else name)


def split_strength(entry: str) -> tuple[str, float]:
    """``FILE[:STRENGTH]`` in its two parts.

    Raises:
        ValueError: what follows the file is no strength; one line.
    """
    name, colon, strength = entry.rpartition(":")
    if not (colon and name) or os.path.lexists(entry):
        return entry, 1.0
    try:
        return name, entries.strength(strength)
    except ValueError as error:
        # Otherwise a colon of the name, as in C:\adapter.safetensors.
        from .lorad.checkpoint import PICKLE_ENDINGS

        named = Path(name).suffix.lower() in (".safetensors", *PICKLE_ENDINGS)
        if name in ("mini", "none") or named or os.path.lexists(name):
            raise ValueError(f"{entry}: {error}") from None
        return entry, 1.0


@contextmanager
def progress_bar(unit: str, scale: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A function to be called with how much of how much is done; it moves a bar on stderr, shown from the first call on.

    Args:
        unit: what is counted.
        scale: write large counts with their powers of a thousand, as of bytes.
    """
    from tqdm import tqdm

    bars: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, unit=unit, unit_scale=scale, leave=False))
        bars[0].update(done - bars[0].n)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()


def _merge(options: argparse.Namespace) -> None:
    """Write a base with adapters merged into it."""
    from .lorad.merge import merge
    from .lorad.weights import Weights

    stack = adapters(options.lorad) or []
    if not stack:
        raise ValueError('there is nothing to merge: "--lorad none" is no adapter')
    source = hub.local(options.base, hub.BASE)
    files = [(hub.local(name), strength) for name, strength in stack]
    base = Weights.open(source)
    if base.prediction_type is None:
        base.prediction_type = _answer_of(source)
    with progress_bar("B", scale=True) as progress:
        report = merge(base, files, options.output, options.stochastic, progress)
    sys.stdout.write(f"{report.layout}: {report.layers} layers rotated\n{report.output}\n")


def _answer_of(source: hub.File) -> str | None:
    """What a base predicts that does not say so, as far as it is a whole model that can be asked."""
    import torch

    try:
        from . import base as bases

        asked = bases.load(source, torch.device("cpu"), torch.bfloat16)
    except (OSError, ValueError, ModuleNotFoundError):  # a network alone, PixArt, or no diffusers to ask it with
        return None
    return asked.prediction_type if asked.prediction_by else None


def _convert(options: argparse.Namespace) -> None:
    """Write an adapter in another form."""
    import torch

    dtype = getattr(torch, DTYPES[options.dtype or ("fp32" if options.to == "factors" else "fp16")])
    if options.to != "lora":
        for name in ("base", "rank", "strength"):
            if getattr(options, name) is not None:
                options.usage_error(f"--{name} goes with --to lora only")
        from .lorad.convert import convert_file

        convert_file(hub.local(options.file), options.output, options.to, dtype)
        sys.stdout.write(f"{options.output}\n")
        return
    if options.base is None or options.rank is None:
        return options.usage_error("a plain LoRA needs --base B and --rank R")
    from .lorad import LoRaD
    from .lorad.convert import to_lora
    from .lorad.reports import lora_lines
    from .lorad.weights import Weights, check_output

    source, file = hub.local(options.base, hub.BASE), hub.local(options.file)
    base = Weights.open(source)
    check_output(options.output, [file, *base.files])
    lorad, strength = LoRaD.load(file), 1.0 if options.strength is None else options.strength
    with progress_bar("layer") as progress:
        lora = to_lora(base, [(lorad, strength)], options.rank, dtype, progress)
    lora.save(options.output)
    for line in (*lora_lines(lora), _network_error(source, base, lorad, strength, lora)):
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"{options.output}\n")


def _network_error(source: hub.File, base: Weights, lorad: LoRaD, strength: float, lora: LoRA) -> str:
    """What the LoRA costs in the network's output, as far as the base is a whole model that can be asked."""
    if base.architecture == "pixart-alpha":
        return "output of the network: not measured for PixArt"
    try:
        of_output, of_change = _measure(source, lorad, strength, lora)
    except ModuleNotFoundError as error:
        return f"output of the network: not measured, the package {error.name} is not installed"
    except (OSError, ValueError) as error:  # a network without its text encoder, for example
        return one_line(f"output of the network: not measured ({error})")
    return f"output of the network: off by {of_output:.2%}, which is {of_change:.2%} of what the LoRaD changes"


def _measure(source: hub.File, lorad: LoRaD, strength: float, lora: LoRA) -> tuple[float, float]:
    import torch

    from . import base as bases
    from .lorad.convert import eps_error
    from .pipeline import OneStepPipeline, find_device, find_dtype, noise
    from .schedule import OneStep

    device = find_device(None)
    dtype = find_dtype(None, device)
    pipe = OneStepPipeline(bases.load(source, device, dtype), device, dtype)
    one_step = lorad.one_step or OneStep()
    with torch.no_grad():
        told = pipe.encode(PROMPTS)
    z = noise(range(len(PROMPTS)), *pipe.native_size).to(told.device, told.dtype)
    x = one_step.network_input(z)
    return eps_error(pipe.base.unet, [(lorad, strength)], lora, lambda: pipe.base.unet(x, one_step.timestep, told).sample)
