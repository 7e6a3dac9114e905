"""At which point of the diffusion process the one-step sampler asks the network: what the weights on it say."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from wadi_core.lorad import Metadata, check_together
from wadi_core.lorad.checkpoint import read_header
from wadi_core.schedule import OneStep

from . import catalog, host

UNKNOWN = (
    "no one-step weights are loaded, so one step of a multi-step network gives a blur: choose a one-step LoRaD in the "
    "panel, or write <lorad:NAME:1>"
)


@dataclass(frozen=True)
class InForce:
    """The schedule to sample with, and what a user should know about it."""

    schedule: OneStep
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = "" if self.schedule.prediction_type == "epsilon" else f" {self.schedule.prediction_type}"
        scaled = "" if self.schedule.input_scale == "one" else f" input {self.schedule.input_scale}"
        known = " (no one-step weights)" if UNKNOWN in self.notes else ""
        return f"alpha_T^2 {self.schedule.alpha_T_squared:g} t {self.schedule.timestep}{kind}{scaled}{known}"


def in_force() -> InForce:
    """The schedule of the adapters on the loaded network, else of the checkpoint itself, else the usual one.

    Raises:
        ValueError: adapters that disagree; one line.
        OSError: a file has gone.
    """
    adapters = [catalog.look(file) for file, strength in host.applied() if strength]
    found = check_together(adapter for adapter in adapters if adapter is not None)
    own = of_checkpoint(host.checkpoint_file())
    returned = host.prediction_type()
    schedule = found or own
    if schedule is None:
        return InForce(OneStep(prediction_type=returned), (UNKNOWN,))
    notes = []
    if found and own:
        notes.append("a one-step LoRaD is made for a multi-step base, and this checkpoint is a one-step network already")
    if schedule.prediction_type != returned:
        said = f"{schedule.prediction_type}, not {returned} as this checkpoint by its settings"
        notes.append(f"the one-step weights are for a network that returns {said}; they are followed")
    return InForce(schedule, tuple(notes))


def of_checkpoint(file: Path | None) -> OneStep | None:
    """The schedule of a checkpoint that is a one-step network itself, as a merged one says in its metadata."""
    if file is None or file.suffix.lower() != catalog.ENDING:
        return None
    return _of_checkpoint(file, os.stat(file).st_mtime_ns)


@lru_cache(maxsize=16)
def _of_checkpoint(file: Path, changed: int) -> OneStep | None:
    return Metadata.from_strings(read_header(file).metadata).one_step
