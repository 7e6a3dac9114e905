"""The command ``publish``. :mod:`.cli` puts it beside its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_PUBLISH = (
    "Write the files of a repository on a model hub for one LoRaD: model card, pictures and thumbnail, the LoRaD, and a "
    "pipeline that diffusers loads. Nothing is uploaded."
)


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands of this module to those of the command line."""
    publish = commands.add_parser("publish", parents=[common], help="a LoRaD as a repository's files", description=_PUBLISH)
    publish.set_defaults(command=_publish)
    add = publish.add_argument
    add("folder", metavar="DIR", help="the folder to write; new or empty")
    add("--lorad", required=True, metavar="FILE", help="the adapter, a .safetensors file")
    add("--base", metavar="ID", help="its base on the hub, ORG/NAME (default: that of its architecture)")
    add("--picture", action="append", default=[], metavar="FILE", help="a picture for the card, the first is the thumbnail")
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to prompt for (default: the pictures' own prompts)")
    add("--license", metavar="NAME", help="as the hub spells it (default: what the adapter's file says)")


def _publish(options: argparse.Namespace) -> None:
    """Write the folder."""
    from .publishing import Repository

    repository = Repository(Path(options.lorad), options.base, options.picture, options.license, options.prompt)
    folder = repository.write(options.folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sys.stdout.write(f"{path}\n")
    sys.stdout.write(f"upload it with: hf upload ORG/NAME {folder}\n")
