"""What is known of adapters and networks, in words: the same lines on the command line and in ComfyUI's nodes.

A line is a name and a text; facts are what programs get, as JSON knows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..files import one_line
from .adapter import LoRaD
from .analysis import Analysis, Spread, angle_statistics
from .convert import LoRA
from .extract import Extraction
from .weights import Weights

Line = tuple[str, str]

WORST_LAYERS = 5  # shown where all would be too many
_SCHEDULE = ("alpha_T_squared", "timestep", "input_scale")
_KNOWN = ("architecture", "prediction_type", "base_sha256", "title", "resolution", "license")


def adapter_facts(adapter: LoRaD) -> dict[str, Any]:
    """What is in an adapter."""
    metadata, one_step = adapter.metadata, adapter.one_step
    layers = {key: {"out": a.shape[0], "in": 2 * b.shape[1], "rank": b.shape[0]} for key, (a, b) in adapter.factors.items()}
    tensors = [tensor for pair in adapter.factors.values() for tensor in pair]
    return {
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "parameters": adapter.parameters_count,
        "rank": adapter.rank,
        "angles": asdict(angle_statistics(adapter.factors.values())),
        "one_step": {name: getattr(one_step, name) for name in _SCHEDULE} if one_step else None,
        "metadata": {name: getattr(metadata, name) for name in _KNOWN} | {"other": dict(metadata.extra)},
        "layers": layers,
    }


def base_facts(adapter: LoRaD, base: Weights, name: str) -> dict[str, Any]:
    """How an adapter fits a base.

    Args:
        name: of the base, as the user knows it.
    """
    match, trained_on = adapter.matched(base.layout.network), adapter.metadata.base_sha256
    problems, returns = list(match.problems), base.prediction_type
    if returns not in (None, adapter.metadata.prediction_type):
        problems.append(f"it is for a network that returns {adapter.metadata.prediction_type}, and this one returns {returns}")
    return {
        "name": name,
        "architecture": match.architecture,
        "layout": base.layout.name,
        "layers_matched": len(match.paths),
        "layers": match.layers,
        "trained_on": None if trained_on is None or problems else base.sha256() == trained_on,
        "problems": problems,
    }


def adapter_lines(facts: dict[str, Any]) -> list[Line]:
    """:func:`adapter_facts` as a person reads them."""
    metadata, one_step, angles = facts["metadata"], facts["one_step"], facts["angles"]
    kind = "an ordinary adapter: sampling stays as it is"
    if one_step:
        kind = f"alpha_T^2 {one_step['alpha_T_squared']:g}, timestep {one_step['timestep']}, {metadata['prediction_type']}"
    lines = [
        ("size", f"{facts['bytes'] / 1e6:.2f} MB, {' and '.join(facts['dtypes'])}"),
        ("made for", metadata["architecture"]),
        ("layers", ranks_in_words([layer["rank"] for layer in facts["layers"].values()])),
        ("parameters", f"{facts['parameters']:,}"),
        ("angles", f"mean {angles['mean']:.3g}, max {angles['max']:.3g} rad; {angles['beyond']:.2%} above pi/2"),
        ("one step", kind),
    ]
    lines += [(name, one_line(metadata[name])) for name in ("title", "license", "resolution") if metadata[name]]
    if metadata["base_sha256"]:
        lines.append(("trained on", f"the base with the checksum {metadata['base_sha256']}"))
    return lines + [("other", one_line(f"{name}: {value}")) for name, value in sorted(metadata["other"].items())]


def base_lines(facts: dict[str, Any]) -> list[Line]:
    """:func:`base_facts` as a person reads them."""
    matched = f"{facts['layers_matched']} of {facts['layers']} layers match"
    lines = [("base", f"{facts['name']} ({facts['architecture']}): {matched}")]
    if facts["trained_on"] is not None:
        lines.append(("", "the base it was trained on" if facts["trained_on"] else "not the base it was trained on"))
    return lines + [("", one_line(problem)) for problem in facts["problems"][:3]]


def extraction_lines(report: Extraction) -> list[Line]:
    """What an extraction found."""
    lines = [
        ("layers", ranks_in_words([layer.rank for layer in report.layers])),
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


def analysis_totals(analysis: Analysis) -> dict[str, Spread | None]:
    """Means and deviations of an analysis over its layers, by the names that programs get."""
    return {
        "norm_change": analysis.norm,
        "direction_change": analysis.direction,
        "energy_at_30_percent_of_the_rank": analysis.energy,
    }


def analysis_table(analysis: Analysis) -> list[Sequence[str]]:
    """The totals of an analysis in per cent: a head and a row for each."""
    rows: list[Sequence[str]] = [(f"{len(analysis.layers)} layers, %", "mean", "std")]
    for (name, total), scale in zip(analysis_totals(analysis).items(), (1, 1, 100), strict=True):
        if total is not None:
            rows.append((name, f"{total.mean * scale:.3g}", f"{total.std * scale:.3g}"))
    return rows


def lora_lines(lora: LoRA) -> Iterator[str]:
    """What a plain LoRA that stands for LoRaDs is, and what it costs in the weights."""
    parameters = sum(factor.numel() for pair in lora.factors.values() for factor in pair)
    yield f"rank {lora.rank}: {len(lora.factors)} layers, {parameters:,} parameters"
    yield f"weights: {lora.error:.2%} of the change is missing, most of all in"
    worst = sorted(lora.errors.items(), key=lambda item: -item[1].relative)
    for path, error in worst[:WORST_LAYERS]:
        yield f"  {error.relative:7.2%}  {path}"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """How many layers of which rank."""
    counted = sorted(Counter(ranks).items(), reverse=True)
    if len(counted) > 6:
        return f"{len(ranks)}: ranks {min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.0f} on average"
    return f"{len(ranks)}: " + ", ".join(f"{count} of rank {rank}" for rank, count in counted)


def lines_as_text(lines: Iterable[Line]) -> str:
    """Lines as text, the names in a column of their own."""
    return "\n".join(f"{name:<13}{text}".rstrip() for name, text in lines)


def table_as_text(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells as text: columns as wide as they need to be, the first one to the left."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
