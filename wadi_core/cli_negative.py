"""The options of ``generate`` for what a picture is not to show. :mod:`.cli` puts them beside its own."""

from __future__ import annotations

import argparse
from typing import Any

from . import negative
from .cli_tools import DECIMAL

_TEXT = "what the pictures are not to show, in the same single network call; may be repeated"
_SCALE = "how strongly; 0 is not at all (default: {})"
_METHOD = f"the method with its numbers (default: {negative.DEFAULT}); see the page on negative prompts"


def add_options(generate: argparse.ArgumentParser) -> None:
    """Add the options of ``generate``."""
    defaults = ", ".join(f"{how.scale:g} for {name}" for name, how in negative.PRESETS.items() if name in negative.METHODS)
    add = generate.add_argument
    add("--negative", action="append", default=[], metavar="TEXT", help=_TEXT)
    add("--negative-scale", type=DECIMAL, metavar="S", help=_SCALE.format(defaults))
    add("--negative-method", choices=tuple(negative.PRESETS), help=_METHOD)


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options as arguments of a pipeline's ``plan``.

    Raises:
        ValueError: a scale out of its range, or what is no text; one line.
    """
    if not options.negative and (options.negative_scale is not None or options.negative_method):
        options.usage_error("--negative-scale and --negative-method go with --negative")
    how = negative.preset(options.negative_method or negative.DEFAULT, options.negative_scale)
    texts = [options.negative] if options.negative else None
    negative.of_each(texts, how, 1)
    return {"negative_prompt": texts, "negative_method": how}
