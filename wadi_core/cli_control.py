"""The command ``preprocess``, and what steers ``generate`` besides the prompt. :mod:`.cli` puts them beside its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import images, settings
from .cli_tools import DECIMAL, WHOLE

if TYPE_CHECKING:
    from .pipeline import OneStepPipeline

LARGE = 1.5  # times the native area: from here on a picture begins to repeat itself

_PREPROCESS = (
    "Make a control map from a picture: edges, the pose of people, depth and so on. Use it in generate as "
    "--control-image, with a ControlNet for the same kind of map."
)
_CONTROL = (
    'a ControlNet for the base: a diffusers folder, a file, a hub id, or "mini" (canny) for the base mini; may be repeated'
)
_IMAGE = "control image of the picture's size; one for each --control, in the same order"
_SCALE = "strength of the ControlNet (default: 1); one for all, or one for each --control"
_MODELS = "folder with the weights of detectors (default: from WADI_PREPROCESSORS); canny and some others need none"


def add_options(generate: argparse.ArgumentParser) -> None:
    """Add the options of ``generate``."""
    add = generate.add_argument
    add("--control", action="append", default=[], metavar="FILE", help=_CONTROL)
    add("--control-image", action="append", default=[], metavar="IMG", help=_IMAGE)
    add("--control-scale", action="append", default=[], type=DECIMAL, metavar="S", help=_SCALE)
    add("--hires", action="store_true", help="make a coherent picture above the native size")
    add("--hires-method", choices=settings.HIRES, help=f"{settings.help_of('hires')} (default: {settings.HIRES[0]})")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands of this module to those of the command line."""
    from .preprocess import KINDS

    kinds = "; ".join(f"{name}: {kind.help}" for name, kind in KINDS.items())
    parser = commands.add_parser("preprocess", parents=[common], help="make a control map", description=_PREPROCESS)
    parser.set_defaults(command=_preprocess)
    add = parser.add_argument
    add("image", metavar="IMG", help="a picture")
    add("-o", "--output", required=True, metavar="MAP", help="the map, a .png")
    add("--kind", required=True, metavar="KIND", choices=tuple(KINDS), help=kinds)
    add("--low", type=WHOLE, default=100, metavar="N", help="canny: gradient that continues an edge (default: 100)")
    add("--high", type=WHOLE, default=200, metavar="N", help="canny: gradient that starts an edge (default: 200)")
    add("--seed", type=WHOLE, default=0, metavar="N", help="random seed of shuffle (default: 0)")
    add("--width", type=WHOLE, metavar="W", help="width of the map; the picture is cropped to fit (default: its own)")
    add("--height", type=WHOLE, metavar="H", help="height of the map, likewise")
    add("--models", metavar="DIR", help=_MODELS)
    add("--device", default="cpu", metavar="D", help="for detectors that are networks (default: cpu)")


def check(options: argparse.Namespace) -> None:
    """What can be said of the options of ``generate`` before anything is loaded.

    Raises:
        ValueError: a scale out of its range; one line.
    """
    count = len(options.control)
    if len(options.control_image) != count:
        options.usage_error(f"{count} --control and {len(options.control_image)} --control-image: each needs the other")
    if len(options.control_scale) not in (0, 1, count):
        options.usage_error(f"{count} --control and {len(options.control_scale)} --control-scale")
    if options.control_scale and not count:
        options.usage_error("--control-scale goes with --control")
    for path, scale in zip(options.control, options.control_scale, strict=False):
        settings.Control(path, scale)


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options as arguments of a pipeline's ``plan``; control images are read.

    Raises:
        OSError, ValueError: one cannot be; one line.
    """
    scales = options.control_scale or [1.0]
    return {
        "control_image": [images.read(path) for path in options.control_image] or None,
        "control_scale": scales[0] if len(scales) == 1 else scales,
        "hires": options.hires_method or options.hires,
    }


def advice(pipe: OneStepPipeline, wanted: settings.PictureSettings) -> str | None:
    """What is worth saying of the size of pictures, if anything."""
    native_width, native_height = pipe.native_size
    width, height, hires = wanted.width, wanted.height, wanted.hires
    share = width * height / (native_width * native_height)
    if share > LARGE and not hires:
        return f"{width}x{height} is larger than the {native_width}x{native_height} of this network: try --hires"
    if share <= 1 and hires:
        return f"--hires changes nothing: {width}x{height} is no larger than the {native_width}x{native_height} of this network"
    return None


def _preprocess(options: argparse.Namespace) -> None:
    """Write a control map."""
    from . import pictures, preprocess

    for name in ("width", "height"):
        settings.check(name, getattr(options, name))
    pictures.check_writable(options.output)
    image = images.read(options.image)
    if options.width or options.height:
        image = preprocess.fit(image, options.width or image.width, options.height or image.height)
    found = preprocess.run(
        image, options.kind, options.models, options.low, options.high, seed=options.seed, device=options.device
    )
    pictures.save(found, options.output)
    sys.stdout.write(f"{Path(options.output)}\n")
