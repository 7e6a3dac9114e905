"""Write the student of a checkpoint as a LoRaD, without the base and without the run.

    python trainer/export.py runs/sd15 5000                      as runs/sd15/NAME-step-00005000.safetensors
    python trainer/export.py runs/sd15 latest -o mine.safetensors
    python trainer/export.py runs/sd15 5000 --live               the student itself, not its moving average

Exit status: 0, or 1 with one line that says what is wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the package's folder is this file's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "trainer"
    from wadi_core.packages import TRAINER, require

    require("train", *TRAINER)

from wadi_core.entries import whole
from wadi_core.files import one_line, refusal
from wadi_core.lorad import LoRaD, Metadata
from wadi_core.lorad.layers import adapter_key
from wadi_core.output import take_any_text

from .engine.checkpoints import Checkpoints, DamagedCheckpoint, damage_told, read_checkpoint

LATEST = "latest"


def find(folder: Path, step: str) -> Path:
    """The checkpoint of a step.

    Raises:
        ValueError: there is none; one line that says which there are.
    """
    paths = Checkpoints(folder).paths()
    if not paths:
        raise ValueError(f"{folder}: there is no checkpoint in this folder")
    if step == LATEST:
        return paths[-1]
    wanted = whole(step)
    for path in paths:
        if Checkpoints.step_of(path) == wanted:
            return path
    there = ", ".join(str(Checkpoints.step_of(path)) for path in paths)
    raise ValueError(f"{folder}: there is no checkpoint of step {wanted}; there are those of {there}")


def student_of(path: Path, state: Mapping[str, Any], live: bool) -> LoRaD:
    """The student that a checkpoint holds.

    Raises:
        ValueError: it is of another kind or version, or damaged; one line.
    """
    settings = state.get("settings")
    if not isinstance(settings, Mapping) or "student" not in state:
        raise refusal(path, "this checkpoint is not of a distillation")
    if settings.get("adapter") != "lorad":
        raise refusal(path, f"its student is no LoRaD but {settings.get('adapter')}: only the run itself can write that")
    if "one_step" not in state:
        raise refusal(path, "this checkpoint is of an earlier version: go on with its run for a step, which writes a new one")
    try:
        with damage_told():
            width, height = state["size"]
            metadata = Metadata(
                architecture=state["architecture"],
                base_sha256=state["base_sha256"],
                title=settings["name"],
                resolution=f"{width}x{height}",
                license=settings["license"] or None,
                extra={"ss_steps": str(state["step"]), "ss_seed": str(settings["seed"])},
                **state["one_step"],
            )
            factors = state["student"] if live or not state["average"] else state["average"]
            paths = [name.removesuffix(".a") for name in factors if name.endswith(".a")]
            return LoRaD(
                {
                    adapter_key(layer, metadata.architecture): tuple(factors[f"{layer}.{part}"].float() for part in "ab")
                    for layer in paths
                },
                metadata,
            )
    except DamagedCheckpoint as error:
        raise refusal(path, str(error)) from None


def main() -> int:
    """Write the file; returns the exit status."""
    take_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the run's output folder")
    parser.add_argument("step", metavar="STEP", help="of the checkpoint, or latest")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: NAME-step-STEP.safetensors in the folder")
    parser.add_argument("--live", action="store_true", help="the student itself, not its moving average")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        path = find(arguments.folder, arguments.step)
        state = read_checkpoint(path)
        lorad = student_of(path, state, arguments.live)
        written = arguments.output or arguments.folder / f"{state['settings']['name']}-{path.stem}.safetensors"
        lorad.save(written)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 1
    sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
