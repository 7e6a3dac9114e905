"""How fast adapters are worked on: fused, merged file to file, extracted; beside peft and a plain copy in the same run.

    python benchmarks/speed/adapters.py                               SD1.5's size: 10 GB on the disk, 8 GB of memory
    python benchmarks/speed/adapters.py --size small --repeats 2      a look at whether it works

Weights are random: nothing here depends on what they are. Every measurement runs in a process of its own, so that its
peak memory is its own too; the rounds go through all of them in turn, so that a busy minute hits all alike, and the
medians are compared. Writes ``adapters.json`` and ``adapters.md``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from benchmarks.speed import repeats
from benchmarks.speed.repeats import Target
from wadi_core import LoRaD, __version__, configs
from wadi_core.lorad.adapter import fuse
from wadi_core.lorad.extract import extract
from wadi_core.lorad.merge import merge
from wadi_core.lorad.weights import Weights, write_stream
from wadi_core.output import take_any_text

logger = logging.getLogger("benchmark")

SIZES: dict[str, dict[str, Any]] = {
    "sd15": {},
    "small": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 32, "layers_per_block": 1},
}
RANKS = {"sd15": 256, "small": 8}
RMS = 0.1  # of the angles, in radians
FUSE, COPY = "fuse against peft's merge of a LoRA of the same rank, time", "merge file to file against a copy, time"
TARGETS = (
    Target(FUSE, ("fuse", "seconds"), ("peft-merge", "seconds"), 0.65),
    Target(COPY, ("merge", "seconds"), ("copy", "seconds"), 2.0),
    Target("merge, peak memory against the size of the output", ("merge", "peak_bytes"), ("output", "peak_bytes"), 1.3),
    Target("extraction, time against 180 s", ("extract", "seconds"), ("limits", "seconds"), 1.0),
    Target("extraction, peak memory against 8 GB", ("extract", "peak_bytes"), ("limits", "peak_bytes"), 1.0),
)
LIMITS = {"seconds": 180.0, "peak_bytes": 8e9}


class Files:
    """The files of a run: base and student in float16, the LoRaD between them, and what measurements write."""

    def __init__(self, folder: Path) -> None:
        self.base, self.student = folder / "base.safetensors", folder / "student.safetensors"
        self.lorad, self.output = folder / "lorad.safetensors", folder / "output.safetensors"


def prepare(files: Files, size: str) -> None:
    """Write the networks and the adapter, unless they are there from an earlier run."""
    if files.student.exists():
        return
    network = network_of(size)
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> Callable[[], Tensor]:
        return lambda: (torch.randn(shape, generator=generator) * 0.03).half()

    state = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    write_stream(files.base, ((name, torch.float16, shape, drawn(shape)) for name, shape in state.items()))
    random_lorad(network, RANKS[size]).save(files.lorad)
    merge(files.base, [(files.lorad, 1.0)], files.student)


def network_of(size: str, device: str = "meta") -> nn.Module:
    from diffusers import UNet2DConditionModel

    settings = {**configs.read(configs.folder("sd15") / "unet" / "config.json"), **SIZES[size]}
    with torch.device(device):
        return UNet2DConditionModel.from_config(settings).eval().requires_grad_(False)


def random_lorad(network: nn.Module, rank: int) -> LoRaD:
    generator = torch.Generator().manual_seed(1)
    lorad = LoRaD.create(network, rank, generator=generator)
    for key, (a, b) in lorad.factors.items():
        a = torch.randn(a.shape, generator=generator)
        lorad.factors[key] = (a * (RMS / (a[:64] @ b).square().mean().sqrt()), b)
    return lorad


# What is measured: each yields once when it is ready to start, and again when it is done.


def measure_fuse(files: Files, size: str) -> Iterator[None]:
    """A LoRaD into a float32 network in memory."""
    network, lorad = network_of(size, "cpu"), LoRaD.load(files.lorad)
    yield
    fuse(network, [(lorad, 1.0)], keep_backup=False)
    yield


def measure_peft_merge(files: Files, size: str) -> Iterator[None]:
    """A LoRA of the same rank on the same layers into the same network, by peft."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    from wadi_core.lorad.layers import student_layers

    network = network_of(size, "cpu")
    rank = RANKS[size]
    paths = student_layers(network)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=paths, init_lora_weights=False), network, low_cpu_mem_usage=False
    )
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    if len(layers) != len(paths):
        raise ValueError(f"peft put its LoRA on {len(layers)} layers instead of {len(paths)}")
    yield
    for layer in layers:
        layer.merge()
    yield


def measure_copy(files: Files, size: str) -> Iterator[None]:
    """The base's tensors loaded and saved again through the safetensors library."""
    from safetensors.torch import load_file, save_file

    yield
    save_file(load_file(files.base), files.output)
    with open(files.output, "rb") as file:  # a merge is on the disk when it is done; so is this
        os.fsync(file.fileno())
    yield


def measure_merge(files: Files, size: str) -> Iterator[None]:
    """The LoRaD merged into the base, file to file."""
    yield
    merge(files.base, [(files.lorad, 1.0)], files.output)
    yield


def measure_extract(files: Files, size: str) -> Iterator[None]:
    """The LoRaD found again between base and student, float16 both."""
    yield
    lorad, report = extract(Weights.open(files.base), Weights.open(files.student))
    lorad.save(files.output)
    yield
    logger.info("extraction: error %.2e of the change, ranks up to %d", report.error, lorad.rank)


MEASURES = {
    "fuse": measure_fuse,
    "peft-merge": measure_peft_merge,
    "copy": measure_copy,
    "merge": measure_merge,
    "extract": measure_extract,
}


def measure(name: str, files: Files, size: str) -> dict[str, float]:
    """Run one measurement in this process."""
    steps = MEASURES[name](files, size)
    next(steps)
    start = time.perf_counter()
    next(steps)
    seconds = time.perf_counter() - start
    for _ in steps:
        pass
    return {"seconds": seconds, "peak_bytes": repeats.peak_memory()}


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        f"{report['size']}, rank {report['rank']}, medians of {report['repeats']}; {repeats.place(report['machine'])}.",
        "",
        "| | seconds | peak memory, GB |",
        "|---|---|---|",
        *(f"| {name} | {m['seconds']:.2f} | {m['peak_bytes'] / 1e9:.2f} |" for name, m in report["medians"].items()),
        "",
        *repeats.ratio_table(report["ratios"]),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    take_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="sd15")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=tuple(MEASURES), default=list(MEASURES), help="measure only these")
    parser.add_argument("--work", type=Path, default=Path("runs/adapters"), help="where networks and results are written")
    parser.add_argument("--measure", choices=tuple(MEASURES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    files = Files(options.work / options.size)
    repeats.use_all_cores()
    if options.measure:
        repeats.tell(measure(options.measure, files, options.size))
        return 0
    names = repeats.as_installed(options.only, "peft-merge")
    command = [sys.executable, __file__, "--size", options.size, "--work", str(options.work), "--measure"]
    files.base.parent.mkdir(parents=True, exist_ok=True)
    prepare(files, options.size)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(options.repeats):
        for name in names:
            rounds[name].append(repeats.run_apart(name, [*command, name]))
            logger.info("round %d: %-12s %.2f s", turn + 1, name, rounds[name][-1]["seconds"])
    report = {
        "version": __version__,
        "size": options.size,
        "rank": RANKS[options.size],
        "repeats": options.repeats,
        "machine": repeats.this_machine(),
        **repeats.summary(
            rounds, TARGETS, limits={"limits": LIMITS, "output": {"peak_bytes": float(files.base.stat().st_size)}}
        ),
        "rounds": rounds,
    }
    files.output.unlink(missing_ok=True)
    repeats.write(options.work, "adapters", report, as_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
