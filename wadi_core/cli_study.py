"""The commands that look into weights: ``inspect``, ``extract`` and ``analyze``. :mod:`.cli` puts them beside its own."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_tools import DTYPES, progress_bar
from .files import one_line

if TYPE_CHECKING:
    from .lorad import LoRaD
    from .lorad.analysis import Analysis
    from .lorad.extract import Extraction
    from .lorad.weights import Weights

WORST_LAYERS = 5  # shown where all would be too many

_NETWORK = "a folder in diffusers layout, a .safetensors file in any layout, or mini"
_INSPECT = "Say what is in an adapter file: layers, ranks, parameters, metadata, and how large its angles are."
_EXTRACT = (
    "Find the LoRaD that turns a base into a one-step student, and say how much of their difference it is: a student "
    "whose weights were trained freely is no rotation of its base, and a LoRaD follows it only in part."
)
_ANALYZE = (
    "Say how far training moved the norms of a network's weights, and how far their directions: per cent, mean and "
    "standard deviation over the linear layers."
)


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands of this module to those of the command line."""
    inspect = commands.add_parser("inspect", parents=[common], help="say what is in an adapter file", description=_INSPECT)
    inspect.set_defaults(command=_inspect)
    add = inspect.add_argument
    add("file", metavar="FILE", help="an adapter")
    add("--base", metavar="B", help=f"also say how many layers of this base it matches: {_NETWORK}")
    add("--json", action="store_true", help="for programs")

    extract = commands.add_parser("extract", parents=[common], help="a LoRaD out of two networks", description=_EXTRACT)
    extract.set_defaults(command=_extract, usage_error=extract.error)
    add = extract.add_argument
    add("--base", required=True, metavar="B", help=f"what the student was made from: {_NETWORK}")
    add("--student", required=True, metavar="S", help="the one-step network, in any layout and precision")
    add("-o", "--output", required=True, metavar="O", help="the LoRaD, a .safetensors file")
    add("--rank", type=int, metavar="R", help="of every layer (default: the smallest that loses nothing, at most 256)")
    add("--energy", type=float, metavar="E", help="keep this share of each layer's squared angles, 0 to 1, instead of a rank")
    add("--dtype", choices=tuple(DTYPES), help="of the factors (default: fp32 if both networks are, else fp16)")
    _add_views(add)

    analyze = commands.add_parser("analyze", parents=[common], help="norms and directions", description=_ANALYZE)
    analyze.set_defaults(command=_analyze)
    add = analyze.add_argument
    add("--base", required=True, metavar="B", help=f"the teacher: {_NETWORK}")
    add("--student", required=True, metavar="S", help="what was trained from it")
    add("--plot", metavar="FILE", help="also draw it, a .png")
    add("--teacher-norms", metavar="FILE", help="also write the student with its directions and the teacher's norms")
    add("--teacher-directions", metavar="FILE", help="also write the student with its norms and the teacher's directions")
    _add_views(add)


def _add_views(add: Any) -> None:
    add("--layers", action="store_true", help="a line for each layer too")
    add("--json", action="store_true", help="for programs: everything, every layer")


# inspect


def _inspect(options: argparse.Namespace) -> None:
    """Say what is in an adapter file."""
    from .lorad import LoRaD

    path = Path(options.file)
    adapter = LoRaD.load(path)
    report = _report(path, adapter)
    if options.base:
        from .lorad.weights import Weights

        base = Weights.open(options.base)
        match, trained_on = adapter.matched(base.layout.network), adapter.metadata.base_sha256
        report["base"] = {
            "name": options.base,
            "architecture": match.architecture,
            "layout": base.layout.name,
            "layers_matched": len(match.paths),
            "layers": match.layers,
            "trained_on": None if trained_on is None or match.problems else base.sha256() == trained_on,
            "problems": list(match.problems),
        }
    _write(report if options.json else _readable(report))


def _report(path: Path, adapter: LoRaD) -> dict[str, Any]:
    from .lorad.analysis import angle_statistics

    metadata, one_step = adapter.metadata, adapter.one_step
    layers = {key: {"out": a.shape[0], "in": 2 * b.shape[1], "rank": b.shape[0]} for key, (a, b) in adapter.factors.items()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for pair in adapter.factors.values() for tensor in pair}
    known = ("architecture", "prediction_type", "base_sha256", "title", "resolution", "license")
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "dtypes": sorted(dtypes),
        "parameters": adapter.parameters_count,
        "rank": adapter.rank,
        "angles": asdict(angle_statistics(adapter.factors.values())),
        "one_step": {"alpha_T_squared": one_step.alpha_T_squared, "timestep": one_step.timestep} if one_step else None,
        "metadata": {name: getattr(metadata, name) for name in known} | {"other": dict(metadata.extra)},
        "layers": layers,
    }


def _readable(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as a person reads it: name and text of each line."""
    metadata, one_step, angles = report["metadata"], report["one_step"], report["angles"]
    kind = "an ordinary adapter: sampling stays as it is"
    if one_step:
        kind = f"alpha_T^2 {one_step['alpha_T_squared']:g}, timestep {one_step['timestep']}, {metadata['prediction_type']}"
    lines = [
        ("file", report["file"]),
        ("size", f"{report['bytes'] / 1e6:.2f} MB, {' and '.join(report['dtypes'])}"),
        ("made for", metadata["architecture"]),
        ("layers", _ranks([layer["rank"] for layer in report["layers"].values()])),
        ("parameters", f"{report['parameters']:,}"),
        ("angles", f"mean {angles['mean']:.3g}, max {angles['max']:.3g} rad; {angles['beyond']:.2%} above pi/2"),
        ("one step", kind),
    ]
    lines += [(name, one_line(metadata[name])) for name in ("title", "license", "resolution") if metadata[name]]
    if metadata["base_sha256"]:
        lines.append(("trained on", f"the base with the checksum {metadata['base_sha256']}"))
    lines += [("other", one_line(f"{name}: {value}")) for name, value in sorted(metadata["other"].items())]
    if "base" in report:
        base = report["base"]
        matched = f"{base['layers_matched']} of {base['layers']} layers match"
        lines.append(("base", f"{base['name']} ({base['architecture']}): {matched}"))
        if base["trained_on"] is not None:
            lines.append(("", "the base it was trained on" if base["trained_on"] else "not the base it was trained on"))
        lines += [("", one_line(problem)) for problem in base["problems"][:3]]
    return lines


# extract


def _extract(options: argparse.Namespace) -> None:
    """Write the LoRaD that lies between two networks."""
    if options.rank is not None and options.energy is not None:
        options.usage_error("either --rank or --energy, not both")
    import torch

    from .lorad.extract import extract
    from .lorad.weights import check_output

    base, student = _open_both(options)
    check_output(options.output, [options.base, options.student, *base.files, *student.files])
    with progress_bar("layer") as progress:
        lorad, report = extract(base, student, options.rank, options.energy, progress)
    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else _fitting_dtype(base, student)
    lorad.save(options.output, dtype)
    if options.json:
        _write({"output": options.output, **asdict(report), "is_rotation": report.is_rotation, "wrapped": report.wrapped})
        return
    if options.layers:
        rows = [(r.path, r.rank, f"{r.change:.2%}", f"{r.explained:.2%}", f"{r.error:.2e}") for r in report.layers]
        _write_table(("layer", "rank", "change", "rotation", "error"), rows)
    _write(_about_extraction(report))
    _write([("output", f"{options.output}, {os.path.getsize(options.output) / 1e6:.2f} MB")])


def _fitting_dtype(base: Weights, student: Weights) -> Any:
    """Factors are as exact as the networks are: float16 only where these are coarse themselves."""
    import torch

    coarse = {weights.dtype(place.name) for weights in (base, student) for place in weights.layers().values()}
    return torch.float32 if coarse <= {torch.float32, torch.float64} else torch.float16


def _about_extraction(report: Extraction) -> list[tuple[str, str]]:
    lines = [
        ("layers", _ranks([layer.rank for layer in report.layers])),
        ("unchanged", f"{len(report.unchanged)} layers"),
        ("change", f"{report.change:.2%} of the weights"),
        ("rotation", f"{report.explained:.2%} of the squared change"),
        ("error", f"{report.error:.2e} of the change is missing at these ranks"),
    ]
    if report.wrapped:
        lines.append(("beyond pi", f"{report.wrapped} angles had gone round, and were put back"))
    if not report.is_rotation:
        lines.append(("note", "the student is no rotation of this base: the norms of its weights changed too, most of all in"))
        worst = sorted(report.not_rotated, key=lambda layer: layer.explained)[:WORST_LAYERS]
        lines += [("", f"{layer.path}: {layer.explained:.2%} is a rotation") for layer in worst]
    return lines


# analyze


def _analyze(options: argparse.Namespace) -> None:
    """Say how far norms and directions of two networks are apart."""
    from .lorad.analysis import analyze, plot, swapped
    from .lorad.weights import check_output, write_stream

    base, student = _open_both(options)
    inputs = [options.base, options.student, *base.files, *student.files]
    swaps = {"directions": options.teacher_norms, "norms": options.teacher_directions}
    for output in filter(None, swaps.values()):
        if Path(output).suffix.lower() != ".safetensors":
            raise ValueError(one_line(f"{output}: the network is written as one file, its name must end in .safetensors"))
        check_output(output, inputs)
    if options.plot:
        import matplotlib.figure  # noqa: F401 - a package that is missing is told before the work, not after it

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
        plot(analysis, options.plot, f"{Path(options.base).name} and {Path(options.student).name}")
    if options.json:
        totals = {name: total and asdict(total) for name, total in _totals(analysis).items()}
        _write({**totals, **asdict(analysis)})
        return
    if options.layers:
        rows = [(r.path, f"{r.norm:.3g}", f"{r.direction:.3g}", _percent(r.energy)) for r in analysis.layers]
        _write_table(("layer", "norm %", "direction %", "energy %"), rows)
    rows = [
        (name, f"{total.mean * scale:.3g}", f"{total.std * scale:.3g}")
        for (name, total), scale in zip(_totals(analysis).items(), (1, 1, 100), strict=True)
        if total is not None
    ]
    _write_table((f"{len(analysis.layers)} layers, %", "mean", "std"), rows)
    for written in filter(None, (options.plot, *swaps.values())):
        sys.stdout.write(f"{written}\n")


def _totals(analysis: Analysis) -> dict[str, Any]:
    return {
        "norm_change": analysis.norm,
        "direction_change": analysis.direction,
        "energy_at_30_percent_of_the_rank": analysis.energy,
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


# What they share


def _open_both(options: argparse.Namespace) -> tuple[Weights, Weights]:
    from .lorad.weights import Weights

    base, student = Weights.open(options.base), Weights.open(options.student)
    if {os.path.realpath(file) for file in base.files} & {os.path.realpath(file) for file in student.files}:
        raise ValueError(one_line(f"{options.student}: base and student are the same file"))
    return base, student


def _ranks(ranks: Sequence[int]) -> str:
    counted = sorted(Counter(ranks).items(), reverse=True)
    if len(counted) > 6:
        return f"{len(ranks)}: ranks {min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.0f} on average"
    return f"{len(ranks)}: " + ", ".join(f"{count} of rank {rank}" for rank, count in counted)


def _write(report: dict[str, Any] | list[tuple[str, str]]) -> None:
    """A report as JSON, or as lines of a name and a text."""
    if isinstance(report, dict):
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    for name, text in report:
        sys.stdout.write(f"{name:<13}{text}\n")


def _write_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as they need to be, the first one to the left."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
