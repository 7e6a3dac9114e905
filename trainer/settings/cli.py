"""What the command lines of the trainer have in common: settings, messages, and an error in one line."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

from wadi_core import hub
from wadi_core.files import one_line
from wadi_core.output import take_any_text
from wadi_core.packages import missing

from . import fields as settings

DIVERGED = 3  # exit status
C = TypeVar("C")


def show_messages() -> None:
    """This program's own notes on stderr, a line each."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("wadi").setLevel(logging.INFO)


def main(about: str | None, schema: type[C], run: Callable[[C], object], estimate: Callable[[C], object] | None = None) -> int:
    """Read the settings and run; returns the exit status.

    Args:
        about: the script's description, of which the first line is shown.
        schema: of its settings.
        run: takes them.
        estimate: what a run will need, for ``--dry-run``.
    """
    take_any_text()
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # advice to developers, in the middle of a bar
        os.environ.setdefault(name, "error")
    parser = settings.parser((about or "").partition("\n")[0])
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings with meaning, unit and range, then exit"
    )
    if estimate is not None:
        parser.add_argument("--dry-run", action="store_true", help="print parameters, memory and steps, then exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    show_messages()
    try:
        config = settings.load(schema, arguments.config, arguments.overrides)
        hub.only_named([getattr(config, "base", "mini")])  # nothing else is ever fetched
        if arguments.print_config:
            sys.stdout.write(settings.as_yaml(config, explain=True))
        elif estimate is not None and arguments.dry_run:
            sys.stdout.write(f"{estimate(config)}\n")
        else:
            run(config)
    except KeyboardInterrupt as error:
        sys.stderr.write("stopped; started again it goes on from its newest checkpoint, if there is one\n")
        return 128 + getattr(error, "number", signal.SIGINT)
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {one_line(missing(error, 'train') if isinstance(error, ImportError) else error)}\n")
        return DIVERGED if type(error).__name__ == "Diverged" else 1
    return 0
