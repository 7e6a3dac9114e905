"""What the command lines of the trainer have in common: settings, messages, and an error in one line."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

from wadi_core import hub

from . import fields as settings

DIVERGED = 3  # exit status
C = TypeVar("C")


def main(about: str, schema: type[C], run: Callable[[C], object], estimate: Callable[[C], object] | None = None) -> int:
    """Read the settings and run; returns the exit status.

    Args:
        about: the script's description, of which the first line is shown.
        schema: of its settings.
        run: takes them.
        estimate: what a run will need, for ``--dry-run``.
    """
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # advice to developers, in the middle of a bar
        os.environ.setdefault(name, "error")
    parser = settings.parser(about.splitlines()[0])
    parser.add_argument("--print-config", action="store_true", help="print all settings and what they mean, then leave")
    if estimate is not None:
        parser.add_argument("--dry-run", action="store_true", help="print parameters, memory and steps, then leave")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("wadi").setLevel(logging.INFO)
    try:
        config = settings.load(schema, arguments.config, arguments.overrides)
        hub.only_named([getattr(config, "base", "mini")])  # nothing else is ever fetched
        if arguments.print_config:
            sys.stdout.write(settings.as_yaml(config, explain=True))
        elif estimate is not None and arguments.dry_run:
            sys.stdout.write(f"{estimate(config)}\n")
        else:
            run(config)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; started again it goes on from its newest checkpoint, if there is one\n")
        return 130
    except (ValueError, OSError) as error:
        if arguments.debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return DIVERGED if type(error).__name__ == "Diverged" else 1
    return 0
