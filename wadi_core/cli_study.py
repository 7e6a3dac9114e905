"""The commands that look into weights: ``inspect``, ``extract`` and ``analyze``. :mod:`.cli` puts them beside its own."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import hub
from .cli_tools import DECIMAL, DTYPES, WHOLE, progress_bar
from .files import known_name, one_line

if TYPE_CHECKING:
    from .lorad.weights import Weights

_NETWORK = "a folder in diffusers layout, a .safetensors file in any layout, a hub id, or mini"
_INSPECT = "Print what is in an adapter file: layers, ranks, parameters, metadata and the size of its angles."
_EXTRACT = (
    "Find the LoRaD between a base and a one-step student, and report how much of their difference is a rotation. "
    "An unconstrained student is no rotation of its base, so a LoRaD reproduces it only in part."
)
_ANALYZE = (
    "Report how far training changed the norms and the directions of a network's weights: per cent, mean and "
    "standard deviation over the linear layers."
)


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands of this module to those of the command line."""
    inspect = commands.add_parser("inspect", parents=[common], help="print what is in an adapter file", description=_INSPECT)
    inspect.set_defaults(command=_inspect)
    add = inspect.add_argument
    add("file", metavar="FILE", help="an adapter")
    add("--base", metavar="B", help=f"also report how many layers of this base it matches: {_NETWORK}")
    add("--json", action="store_true", help="machine-readable output")

    extract = commands.add_parser("extract", parents=[common], help="make a LoRaD from two networks", description=_EXTRACT)
    extract.set_defaults(command=_extract, usage_error=extract.error)
    add = extract.add_argument
    add("--base", required=True, metavar="B", help=f"the network before distillation: {_NETWORK}")
    add("--student", required=True, metavar="S", help="the one-step network, in any layout and precision")
    add("-o", "--output", required=True, metavar="O", help="the LoRaD, a .safetensors file")
    add("--rank", type=WHOLE, metavar="R", help="rank of every layer (default: the smallest that loses nothing, at most 256)")
    add("--energy", type=DECIMAL, metavar="E", help="keep this share of each layer's squared angles, 0 to 1, instead of a rank")
    add("--dtype", choices=tuple(DTYPES), help="type of the factors (default: fp32 if both networks are, else fp16)")
    _add_views(add)

    analyze = commands.add_parser("analyze", parents=[common], help="compare norms and directions", description=_ANALYZE)
    analyze.set_defaults(command=_analyze)
    add = analyze.add_argument
    add("--base", required=True, metavar="B", help=f"the teacher: {_NETWORK}")
    add("--student", required=True, metavar="S", help="the network trained from it")
    add("--plot", metavar="FILE", help="also write a plot, a .png")
    add("--teacher-norms", metavar="FILE", help="also write the student with its directions and the teacher's norms")
    add("--teacher-directions", metavar="FILE", help="also write the student with its norms and the teacher's directions")
    _add_views(add)


def _add_views(add: Any) -> None:
    add("--layers", action="store_true", help="also print a line for each layer")
    add("--json", action="store_true", help="machine-readable output of everything, for every layer")


# inspect


def _inspect(options: argparse.Namespace) -> None:
    """Say what is in an adapter file."""
    from .lorad import LoRaD
    from .lorad.reports import adapter_facts, adapter_lines, base_facts, base_lines

    path = Path(hub.local(options.file))
    adapter = LoRaD.load(path)
    report = {"file": options.file, **adapter_facts(adapter), "bytes": path.stat().st_size}
    if options.base:
        from .lorad.weights import Weights

        base = Weights.open(hub.local(options.base, hub.NETWORK))
        base.check_numbers()
        report["base"] = base_facts(adapter, base, options.base)
    if options.json:
        _write(report)
        return
    _write([("file", options.file), *adapter_lines(report), *(base_lines(report["base"]) if options.base else ())])


# extract


def _extract(options: argparse.Namespace) -> None:
    """Write the LoRaD that lies between two networks."""
    if options.rank is not None and options.energy is not None:
        options.usage_error("either --rank or --energy, not both")
    import torch

    from .lorad.extract import extract
    from .lorad.reports import extraction_lines
    from .lorad.weights import check_output

    base, student = _open_both(options)
    check_output(options.output, [options.base, options.student, *base.files, *student.files])
    with progress_bar("layer") as progress:
        lorad, report = extract(base, student, options.rank, options.energy, progress)
    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else fitting_dtype(base, student)
    lorad.save(options.output, dtype)
    if options.json:
        _write({"output": options.output, **asdict(report), "is_rotation": report.is_rotation, "wrapped": report.wrapped})
        return
    if options.layers:
        rows = [(r.path, r.rank, f"{r.change:.2%}", f"{r.explained:.2%}", f"{r.error:.2e}") for r in report.layers]
        _write_table([("layer", "rank", "change", "rotation", "error"), *rows])
    _write(extraction_lines(report))
    _write([("output", f"{options.output}, {os.path.getsize(options.output) / 1e6:.2f} MB")])


def fitting_dtype(base: Weights, student: Weights) -> Any:
    """Factors are as exact as the networks are: float16 only where these are coarse themselves."""
    import torch

    coarse = {weights.dtype(place.name) for weights in (base, student) for place in weights.layers().values()}
    return torch.float32 if coarse <= {torch.float32, torch.float64} else torch.float16


# analyze


def _analyze(options: argparse.Namespace) -> None:
    """Say how far norms and directions of two networks are apart."""
    from .lorad.analysis import analyze, swapped
    from .lorad.chart import plot
    from .lorad.reports import analysis_table, analysis_totals
    from .lorad.weights import check_output, write_stream

    base, student = _open_both(options)
    inputs = [options.base, options.student, *base.files, *student.files]
    swaps = {"directions": options.teacher_norms, "norms": options.teacher_directions}
    for output in filter(None, swaps.values()):
        if Path(output).suffix.lower() != ".safetensors":
            raise ValueError(one_line(f"{output}: the network is written as one file, its name must end in .safetensors"))
        check_output(output, inputs)
    if options.plot:
        import PIL.ImageFont  # noqa: F401 - a package that is missing is told before the work, not after it

        if Path(options.plot).suffix.lower() != ".png":
            raise ValueError(one_line(f"{options.plot}: the picture is a PNG, its name must end in .png"))
        check_output(options.plot, inputs)
    with progress_bar("layer") as progress:
        analysis = analyze(base, student, progress)
    for kept, output in swaps.items():
        if output:
            with progress_bar("B", scale=True) as progress:
                write_stream(output, swapped(base, student, kept), student.metadata, inputs, progress)
    if options.plot:
        plot(analysis, options.plot, f"{known_name(options.base)} and {known_name(options.student)}")
    if options.json:
        totals = {name: total and asdict(total) for name, total in analysis_totals(analysis).items()}
        _write({**totals, **asdict(analysis)})
        return
    if options.layers:
        rows = [(r.path, f"{r.norm:.3g}", f"{r.direction:.3g}", _percent(r.energy)) for r in analysis.layers]
        _write_table([("layer", "norm %", "direction %", "energy %"), *rows])
    _write_table(analysis_table(analysis))
    for written in filter(None, (options.plot, *swaps.values())):
        sys.stdout.write(f"{written}\n")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


# What they share


def _open_both(options: argparse.Namespace) -> tuple[Weights, Weights]:
    from .lorad.weights import Weights

    base, student = (Weights.open(hub.local(name, hub.NETWORK)) for name in (options.base, options.student))
    if {os.path.realpath(file) for file in base.files} & {os.path.realpath(file) for file in student.files}:
        raise ValueError(one_line(f"{options.student}: base and student are the same file"))
    return base, student


def _write(report: dict[str, Any] | list[tuple[str, str]]) -> None:
    """A report as JSON, or as lines of a name and a text."""
    if isinstance(report, dict):
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    from .lorad.reports import lines_as_text

    sys.stdout.write(lines_as_text(report) + "\n")


def _write_table(rows: Sequence[Sequence[object]]) -> None:
    from .lorad.reports import table_as_text

    sys.stdout.write(table_as_text(rows) + "\n")
