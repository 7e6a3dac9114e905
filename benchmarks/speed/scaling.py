"""How much faster several processes train: the same batch shared out, and a batch for each of them.

    python benchmarks/speed/scaling.py                                          wadi-mini, 1, 2 and 4 processes on this machine
    python benchmarks/speed/scaling.py --settings base=PATH prompts=FILE ...    another base, with any settings of the trainer

Each measurement is a run of the trainer as ``accelerate launch`` starts it, with gloo on a CPU and NCCL on GPUs. Processes
on one CPU share its cores: there is nothing to win beyond the cores that one process leaves idle, and what is seen is
what it costs to keep them together. Writes ``scaling.json`` and ``scaling.md``.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from trainer.engine.logs import step_seconds
from wadi_core.files import atomic_write, one_line
from wadi_core.output import take_any_text

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "trainer" / "train.py"


def free_port() -> int:
    """A port that no one listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(count: int) -> list[str]:
    """What comes before a script to start it in so many processes; nothing for one."""
    if count == 1:
        return []
    words = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1"]
    return [*words, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]


def measure(count: int, batch: int, options: argparse.Namespace) -> float:
    """Seconds a step with ``count`` processes and ``batch`` samples of all together.

    Raises:
        OSError: the run failed.
    """
    folder = options.work / f"{count}-of-{batch}-{options.steps}"
    if not (folder / f"step-{options.steps:08d}.pt").is_file():
        words = ["--config", str(options.config), *options.settings, f"output={folder}", f"batch={batch}"]
        words += [f"steps={options.steps}", f"save_every={options.steps}", f"sheet_every={options.steps}", "log_every=1"]
        threads = max(1, (os.cpu_count() or 1) // count)
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        run = [sys.executable, *launcher(count), str(TRAIN), *words, "resume=latest", "tensorboard=false"]
        if subprocess.run(run, env=environment, check=False).returncode:
            raise OSError(f"{folder}: the run with {count} processes failed")
    seconds = step_seconds(folder)
    if seconds is None:
        raise OSError(f"{folder}: the run is too short to be timed")
    return seconds


def as_markdown(found: dict[str, Any]) -> str:
    lines = [
        f"`{found['command']}`: {found['machine']['cores']} cores, torch {found['versions']['torch']}.",
        "",
        "| processes | samples of a step | seconds a step | samples a second | against one process |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        speed = row["batch"] / row["seconds"]
        alone = found["rows"][0]["batch"] / found["rows"][0]["seconds"]
        lines.append(f"| {row['processes']} | {row['batch']} | {row['seconds']:.2f} | {speed:.2f} | {speed / alone:.2f} |")
    return "\n".join(lines) + "\n"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, default=ROOT / "trainer" / "configs" / "mini.yaml", help="settings of the trainer")
    add("--settings", nargs="*", default=[], metavar="key=value", help="settings that win over the file's")
    add("--processes", type=int, nargs="+", default=[1, 2, 4], help="how many (default: 1 2 4)")
    add("--batch", type=int, default=16, help="samples of a step, and of each process (default: 16)")
    add("--steps", type=int, default=20, help="of each run (default: 20)")
    add("--work", type=Path, default=Path("runs/scaling"), help="where the runs are kept (default: runs/scaling)")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    take_any_text()
    options = make_parser().parse_args(words)
    shared = [(count, options.batch) for count in options.processes]
    grown = [(count, options.batch * count) for count in options.processes if count > 1]
    try:
        rows = [{"processes": n, "batch": size, "seconds": measure(n, size, options)} for n, size in shared + grown]
    except OSError as error:
        sys.stderr.write(f"scaling: error: {one_line(error)}\n")
        return 1
    found = report.origin("scaling", sys.argv[1:] if words is None else words) | {"rows": rows}
    report.write_json(options.work / "scaling.json", found)
    text = as_markdown(found)
    with atomic_write(options.work / "scaling.md") as file:
        file.write(text.encode())
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
