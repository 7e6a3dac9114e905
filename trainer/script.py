"""What the command lines of the lessons have in common: settings, messages, and an error in one line."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from . import config as settings

C = TypeVar("C")


def main(about: str, schema: type[C], run: Callable[[C], Path]) -> int:
    """Read the settings and run; returns the exit status.

    Args:
        about: the script's description, of which the first line is shown.
        schema: of its settings.
        run: takes them, and returns the file that it wrote.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when diffusers is imported: nothing is ever fetched
    parser = settings.parser(about.splitlines()[0])
    parser.add_argument("--print-config", action="store_true", help="print all settings and what they mean, then leave")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("wadi").setLevel(logging.INFO)
    try:
        config = settings.load(schema, arguments.config, arguments.overrides)
        sys.stdout.write(settings.as_yaml(config, explain=True) if arguments.print_config else f"{run(config)}\n")
    except KeyboardInterrupt:
        sys.stderr.write("stopped; started again it goes on from its newest checkpoint, if there is one\n")
        return 130
    except (ValueError, OSError) as error:
        if arguments.debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0
