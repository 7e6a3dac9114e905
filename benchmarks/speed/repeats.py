"""What benchmarks have in common that measure in rounds: processes for one measurement each, medians, ratios, reports."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wadi_core.files import atomic_write

from ..report import machine

logger = logging.getLogger("benchmark")


class Target(NamedTuple):
    """Two medians that are divided, each named by its measurement and its unit, and what shall come out at most."""

    what: str
    over: tuple[str, str]
    under: tuple[str, str]
    most: float | None = None


def this_machine() -> dict[str, Any]:
    """Cores, memory, and the versions that times depend on."""
    return {**machine(), "torch": torch.__version__, "python": platform.python_version()}


def use_all_cores() -> None:
    """Let torch compute with every core that this process may use, or with OMP_NUM_THREADS of them."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or machine()["cores"]))


def run_apart(name: str, command: Sequence[str], folder: Path | None = None) -> dict[str, Any]:
    """One measurement in a process of its own, which says with :func:`tell` what it found.

    Args:
        name: of the measurement.
        command: that makes it.
        folder: in which it runs.

    Raises:
        OSError: it ended otherwise than it should, perhaps for want of memory; one line.
    """
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    if ended.returncode:
        why = "killed, likely for want of memory" if ended.returncode in (-9, 137) else f"status {ended.returncode}"
        raise OSError(f"the measurement {name} failed: {why}")
    return json.loads(ended.stdout.splitlines()[-1])


def tell(found: Mapping[str, Any]) -> None:
    """Say to the process that started this one what was measured: the last line, whatever others have printed."""
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def as_installed(names: Sequence[str], of_peft: str) -> list[str]:
    """The measurements that can be made here: all, or all but the one that needs peft."""
    if of_peft in names and not importlib.util.find_spec("peft"):
        logger.info("peft is not installed: %s is left out", of_peft)
        return [name for name in names if name != of_peft]
    return list(names)


def peak_memory() -> float:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's this does not count the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return float(line.split()[1]) * 1024
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS counts bytes


def summary(
    rounds: Mapping[str, Sequence[Mapping[str, Any]]],
    targets: Iterable[Target],
    units: Sequence[str] | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Medians of all measurements, and their ratios as far as both sides were measured.

    Args:
        rounds: what each measurement found, round by round.
        targets: the ratios.
        units: of a measurement, those to take the median of; all if not given.
        limits: fixed values that targets may name like medians.
    """
    medians = {
        name: {unit: statistics.median(one[unit] for one in found) for unit in units or found[0]}
        for name, found in rounds.items()
        if found
    }
    known = {**medians, **(limits or {})}
    ratios = [
        {"what": one.what, "ratio": known[one.over[0]][one.over[1]] / known[one.under[0]][one.under[1]], "target": one.most}
        for one in targets
        if one.over[0] in known and one.under[0] in known
    ]
    return {"medians": medians, "ratios": ratios}


def place(found: Mapping[str, Any]) -> str:
    """The machine of a report in words."""
    memory = f", {found['memory_gib']:.0f} GiB of memory" if "memory_gib" in found else ""
    return f"{found['cores']} cores{memory}, torch {found['torch']}"


def ratio_table(ratios: Iterable[Mapping[str, Any]]) -> list[str]:
    """The ratios of :func:`summary` as lines of a Markdown table."""
    lines = ["| | ratio | target |", "|---|---|---|"]
    lines += [f"| {r['what']} | {r['ratio']:.2f} | {'' if r['target'] is None else r['target']} |" for r in ratios]
    return lines


def write(folder: Path, name: str, report: Mapping[str, Any], text: str) -> None:
    """Write ``name``.json and ``name``.md, each whole or not at all, and print the text."""
    for file_name, content in ((f"{name}.json", json.dumps(report, indent=2) + "\n"), (f"{name}.md", text)):
        with atomic_write(folder / file_name) as file:
            file.write(content.encode())
    sys.stdout.write(text)
