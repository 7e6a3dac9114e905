"""The page on the ablation: tables and a plot of what was measured, beside the paper's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wadi_core.files import atomic_write

# Wang et al., WaDi, 2026: Stable Diffusion 1.5, FID on COCO 2017 (adapters) and on COCO 2014 (ranks).
PAPER_ADAPTERS = (("LoRaD, rank 256", 20.86, "83.8M"), ("LoRA", 25.27, "120.9M"), ("DoRA", 26.56, ""),
                  ("DoRA, norms frozen", 24.52, ""), ("all weights", 23.30, "860M"))  # fmt: skip
PAPER_RANKS = ((64, 13.64), (128, 13.16), (256, 10.79), (512, 12.75))
FIGURES = (
    ("fd_above_floor", "FD above floor", 1),
    ("kid", "KID", 4),
    ("retrieval_single", "retrieval, one object", 3),
    ("retrieval_pair", "retrieval, both of two", 3),
    ("diversity", "diversity", 2),
)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table: mean and standard deviation over the seeds."""
    lines = ["| student | parameters | seeds | " + " | ".join(title for _, title, _ in FIGURES) + " | shortest run, minutes |"]
    lines.append("|---" * (len(FIGURES) + 4) + "|")
    for row in rows:
        cells = [f"{row['mean'][name]:.{digits}f} ± {row['spread'][name]:.{digits}f}" for name, _, digits in FIGURES]
        minutes = f"{row['shortest_seconds'] / 60:.0f}"
        lines.append(f"| {row['label']} | {row['parameters']:,} | {row['seeds']} | " + " | ".join(cells) + f" | {minutes} |")
    return "\n".join(lines)


def screening(report: dict[str, Any]) -> str:
    """Distances at every rate that was tried as a Markdown table, the best ones in bold."""
    rates = sorted({rate for row in report["screening"].values() for rate in row}, key=float)
    lines = ["| FD at a rate of | " + " | ".join(rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for kind, row in report["screening"].items():
        cells = ["" if rate not in row else "diverged" if row[rate] is None else f"{row[rate]:.1f}" for rate in rates]
        best = rates.index(f"{report['rates'][kind]:g}")
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """What the figures say of LoRaD against each other adapter, in one line each."""
    first, *others = rows
    lines = []
    for row in others:
        ratio = first["mean"]["fd_above_floor"] / row["mean"]["fd_above_floor"]
        apart = abs(first["mean"]["fd_above_floor"] - row["mean"]["fd_above_floor"])
        noise = (first["spread"]["fd_above_floor"] ** 2 + row["spread"]["fd_above_floor"] ** 2) ** 0.5
        certain = "" if apart > 2 * noise else " (within twice the spread of the seeds: not significant)"
        lines.append(f"- {first['label']} / {row['label']}: {ratio:.2f}{certain}")
    return "\n\n".join(lines)


def plot(path: Path, adapters: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> None:
    """Both comparisons as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), dpi=120)
    places = range(len(adapters))
    left.barh(places, [row["mean"]["fd_above_floor"] for row in adapters],
              xerr=[row["spread"]["fd_above_floor"] for row in adapters], color="tab:blue", capsize=3)  # fmt: skip
    left.set_yticks(places, [row["label"] for row in adapters])
    left.invert_yaxis()
    left.set(xlabel="FD above floor (lower is better)", title="kind of adapter")
    if ranks:
        right.errorbar([row["rank"] for row in ranks], [row["mean"]["fd_above_floor"] for row in ranks],
                       yerr=[row["spread"]["fd_above_floor"] for row in ranks], marker="o", capsize=3)  # fmt: skip
        right.set_xscale("log", base=2)
        right.set_xticks([row["rank"] for row in ranks], [str(row["rank"]) for row in ranks])
    right.set(xlabel="rank of the LoRaD", ylabel="FD above floor", title="rank")
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


def write(report: dict[str, Any], folder: Path) -> None:
    """``ablation.md``, ``ablation.png`` and ``ablation.json`` in a folder.

    Raises:
        OSError: they cannot be written.
    """
    adapters = [row for row in report["rows"] if row["group"] == "adapter"]
    # The LoRaD that is compared with other adapters is one of the ranks as well.
    ranks = sorted((row for row in report["rows"] if row["kind"] == "lorad"), key=lambda row: row["rank"])
    folder.mkdir(parents=True, exist_ok=True)
    shown = report["settings"]
    words = " ".join(["", f"--count {shown['count']}", *report["words"]])
    screened = f"--screen-steps {shown['screen_steps']} --screen-count {shown['screen_count']}"
    parts = [
        "# Ablation: kind of adapter and rank",
        f"Each run trains wadi-mini for {shown['steps']} steps of {shown['batch']} captions. The learning rate falls over the "
        "second half. Everything but the student is as in `trainer/configs/mini.yaml`, and the fake score is the same in "
        f"every arm. Distances use {shown['count']:,} pictures, as in the [evaluation](evaluation.md#wadi-mini), above the "
        "floor of real against real pictures. Values after ± are standard deviations over seeds of the training.",
        "## Adapters",
        table(adapters) if adapters else "Not measured yet.",
        verdict(adapters) if len(adapters) > 1 else "",
        "## Rank",
        table(ranks) if ranks else "Not measured yet.",
        "![both comparisons](ablation.png)",
        "## Learning rates",
        f"The rate of each kind was chosen by runs of {shown['screen_steps']} steps with one seed, by the distance of "
        f"{shown['screen_count']:,} pictures (including the floor):",
        screening(report),
        "## The paper's figures",
        "These are published FIDs for Stable Diffusion 1.5 (Wang et al., 2026). Model, data and measure differ, so only the "
        "order and the ratios can be compared. They are LoRaD / LoRA 0.83 and LoRaD / all weights 0.90.",
        "\n".join(
            ["| student | FID, COCO 2017 | parameters |", "|---|---|---|"]
            + [f"| {name} | {fid} | {size} |" for name, fid, size in PAPER_ADAPTERS]
        ),
        "\n".join(["| rank | FID, COCO 2014 |", "|---|---|"] + [f"| {rank} | {fid} |" for rank, fid in PAPER_RANKS]),
        "## Reproduce",
        f"```\npython benchmarks/ablation/ablation.py screen {screened}{words}\n"
        f"python benchmarks/ablation/ablation.py run --steps {shown['steps']}{words}\n"
        f"python benchmarks/ablation/ablation.py page --steps {shown['steps']} {screened}{words}\n```",
    ]
    with atomic_write(folder / "ablation.md") as file:
        file.write(("\n\n".join(part for part in parts if part) + "\n").encode())
    with atomic_write(folder / "ablation.json") as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    plot(folder / "ablation.png", adapters, ranks)
