"""What a step of the trainer costs: beside the rotation written naively, and beside a LoRA of the same rank by peft.

    python benchmarks/speed/training.py                               SD1.5's size: 2.5 GB on the disk, about 20 GB of memory
    python benchmarks/speed/training.py --size small --repeats 2      a look at whether it works

Four ways to train the same two adapters, on the same batch at the same resolution, with the same losses, optimizers
and random numbers:

    trainer   one network in three roles, rotated as the trainer does it
    naive     three networks and hooks, keeping for backward what the published code keeps
    hooks     three networks and hooks, keeping what torch's autograd finds necessary
    lora      one network in three roles, LoRA of the same ranks by peft

Weights are random: nothing here depends on what they are. Every measurement runs in a process of its own, so that its
peak memory is its own too (that of the steps, not of loading); the rounds go through all of them in turn, so that a
busy minute hits all alike, and medians are compared. On a CPU that others use too, the time of the processor says more
than the clock, and with OMP_NUM_THREADS=1 it is what the clock would say if nobody else were there. What has been
measured is kept: started again after an interruption, or with more repeats, it goes on. Writes ``training.json`` and
``training.md``.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import hashlib
import json
import logging
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.speed import repeats
from benchmarks.speed.repeats import Target
from trainer.settings import fields as settings
from trainer.settings.distillation import TrainConfig
from wadi_core import __version__, base, configs
from wadi_core.files import atomic_write
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.output import take_any_text

logger = logging.getLogger("benchmark")

WAYS = ("trainer", "naive", "hooks", "lora")
# What makes SD1.5 small, for a look at whether all of this works.
SMALL = {
    "unet": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 32, "layers_per_block": 1},
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
}
SIZES: dict[str, dict[str, Any]] = {
    "sd15": {"changes": {}, "student_rank": 256, "fake_rank": 32, "resolution": 256, "batch": 1},
    "small": {"changes": SMALL, "student_rank": 8, "fake_rank": 4, "resolution": 64, "batch": 1},
}
MEASURED = ("seconds", "processor_seconds", "peak_bytes")
REPORTED = ("student_rank", "fake_rank", "batch", "resolution", "precision", "base_weights", "gradient_checkpointing")
REPORTED += ("rotation_precision", "compile_rotation")
TARGETS = (
    Target("peak memory against naive", ("trainer", "peak_bytes"), ("naive", "peak_bytes"), 0.45),
    Target("step time against naive", ("trainer", "seconds"), ("naive", "seconds"), 0.7),
    Target("processor time against naive", ("trainer", "processor_seconds"), ("naive", "processor_seconds")),
    Target("step time against peft's LoRA of the same rank", ("trainer", "seconds"), ("lora", "seconds"), 1.3),
    Target(
        "processor time against peft's LoRA of the same rank", ("trainer", "processor_seconds"), ("lora", "processor_seconds")
    ),
    Target("peak memory against hooks", ("trainer", "peak_bytes"), ("hooks", "peak_bytes")),
    Target("step time against hooks", ("trainer", "seconds"), ("hooks", "seconds")),
    Target("peak memory against peft's LoRA of the same rank", ("trainer", "peak_bytes"), ("lora", "peak_bytes")),
)


def prepare(folder: Path, size: str) -> Path:
    """Write a base with random weights in float16, unless it is there from an earlier run."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if (folder / "done").exists():
        return folder
    shutil.copytree(configs.folder("sd15"), folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    for part in base.PARTS:
        path = folder / part / "config.json"
        values = {**configs.read(path), **SIZES[size]["changes"].get(part, {})}
        path.write_text(json.dumps(values))
        if part == "text_encoder":
            network = CLIPTextModel(CLIPTextConfig.from_dict(values))
        else:
            network = (UNet2DConditionModel if part == "unet" else AutoencoderKL).from_config(values)
        state = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
        write_safetensors(folder / part / f"{base.STEMS[part]}.safetensors", state, {"format": "pt"})
    (folder / "prompts.txt").write_text("a red apple\na boat on the sea\n")
    (folder / "done").touch()
    return folder


def make_config(way: str, options: argparse.Namespace, folder: Path) -> TrainConfig:
    """Settings of a run; the same for all ways, but for what LoRA is called."""
    size = SIZES[options.size]
    kind = "lora" if way == "lora" else "lorad"
    values = {
        "base": str(folder),
        "prompts": str(folder / "prompts.txt"),
        "output": str(folder / "none"),
        "device": options.device,
        "adapter": kind,
        "fake_adapter": kind,
        "student_rank": size["student_rank"],
        "fake_rank": size["fake_rank"],
        "batch": options.batch or size["batch"],
        "resolution": options.resolution or size["resolution"],
        "precision": options.precision,
        "base_weights": options.base_weights,
        "gradient_checkpointing": options.gradient_checkpointing,
        "rotation_precision": options.rotation_precision,
        "compile_rotation": options.compile_rotation,
        "steps": 1000,
        "warmup": 0,
        "tensorboard": False,
    }
    return settings.build(TrainConfig, values)


def measure(way: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one way in this process: a step that is not counted, and then some that are.

    Raises:
        ValueError: the naive way does not keep for backward what it says it keeps.
    """
    from benchmarks.speed import naive
    from trainer.distill.roles import FAKE, STUDENT

    run = naive.kinds()[way](make_config(way, options, folder))
    found: dict[str, Any] = {
        "trained": {role: sum(p.numel() for p in run.roles.parameters(role)) for role in (STUDENT, FAKE)},
        "kept": kept(run, way),
    }
    run.train_step()
    logger.info("%-8s warm", way)
    start_of_peak()
    found["steps"], found["processor_steps"] = [], []
    for _ in range(options.steps):
        began, worked = time.perf_counter(), time.process_time()
        run.train_step()
        wait(run.device)
        found["steps"].append(time.perf_counter() - began)
        found["processor_steps"].append(time.process_time() - worked)
    found["seconds"] = statistics.median(found["steps"])
    found["processor_seconds"] = statistics.median(found["processor_steps"])
    found["peak_bytes"] = peak_of(run.device)
    return found


def kept(run: Any, way: str) -> dict[str, int]:
    """What a layer of the student keeps for backward, checked where it is promised."""
    from benchmarks.speed import naive
    from trainer.distill.roles import STUDENT

    if way == "lora":
        return {}
    run.roles.activate(STUDENT)
    path = max(student_paths(run), key=lambda name: run.model.network.get_submodule(name).in_features)
    found = naive.kept_for_backward(run.roles.adapters[STUDENT], path)
    run.roles.forget(STUDENT)
    if way == "naive" and (found["halves"], found["wholes"]) != (naive.SIX, 1):
        raise ValueError(f"the naive layer keeps {found} for backward, not {naive.SIX} halves and the rotated weight")
    return found


def student_paths(run: Any) -> list[str]:
    from trainer.distill.roles import STUDENT

    return [name.removesuffix(".a") for name in run.roles.adapters[STUDENT].parameters if name.endswith(".a")]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_of_peak() -> None:
    """From here on the peak is counted, where the system can do that: loading is not the trainer's step."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:  # what was freed after loading goes back to the system first
            trim(0)
        clear.write_text("5")


def peak_of(device: torch.device) -> float:
    """The most memory since :func:`start_of_peak`, in bytes: of the GPU, or of this process."""
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else repeats.peak_memory()


def measured(way: str, turn: int, words: list[str], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One measurement, made now if it has not been made before with the same settings.

    Raises:
        OSError: as for :func:`~.repeats.run_apart`.
    """
    recipe = [
        dataclasses.asdict(make_config(way, options, folder)),
        options.steps,
        torch.get_num_threads(),
        repeats.this_machine(),
    ]
    mark = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    kept = options.work / "measured" / f"{way}-{turn + 1}-{mark}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    found = repeats.run_apart(way, [sys.executable, __file__, *words, "--measure", way])
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept) as file:
        file.write(json.dumps(found).encode())
    return found


def as_markdown(report: dict[str, Any]) -> str:
    run = report["settings"]
    lines = [
        f"{report['size']}, ranks {run['student_rank']} and {run['fake_rank']}, batch {run['batch']} at {run['resolution']} "
        f"pixels, {run['precision']}, weights in {run['base_weights']}, medians of {report['repeats']} processes of "
        f"{report['steps']} steps; {report['device']}, {report['threads']} threads on "
        f"{repeats.place(report['machine'])}.",
        "",
        "| | seconds a step | of the processor, all cores | peak memory, GB | kept for backward by the widest layer, MB |",
        "|---|---|---|---|---|",
    ]
    for way, median in report["medians"].items():
        kept_bytes = report["rounds"][way][0]["kept"].get("bytes")
        shown = "" if kept_bytes is None else f"{kept_bytes / 1e6:.1f}"
        cells = (f"{value:.2f}" for value in (median["seconds"], median["processor_seconds"], median["peak_bytes"] / 1e9))
        lines.append(f"| {way} | {' | '.join(cells)} | {shown} |")
    return "\n".join([*lines, "", *repeats.ratio_table(report["ratios"])]) + "\n"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=tuple(SIZES), default="sd15")
    add("--batch", type=int, help="samples a step (default: 1)")
    add("--resolution", type=int, help="pixels (default: 256, small: 64)")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    add("--base-weights", choices=("fp32", "bf16", "fp16"), default="bf16", help="how frozen weights are stored")
    add("--gradient-checkpointing", action="store_true")
    add("--rotation-precision", choices=("fp32", "bf16"), default="bf16", help="as in the presets (default: bf16)")
    add("--compile-rotation", action=argparse.BooleanOptionalAction, default=True, help="as in the presets (default)")
    add("--device", default="cpu")
    add("--steps", type=int, default=3, help="that are timed in a process, after one that is not (default: 3)")
    add("--repeats", type=int, default=3, help="processes for each way (default: 3)")
    add("--only", nargs="+", choices=WAYS, default=list(WAYS), help="measure only these")
    add("--work", type=Path, default=Path("runs/training-benchmark"), help="where the base and the results are written")
    add("--measure", choices=WAYS, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    take_any_text()
    words = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    repeats.use_all_cores()
    folder = options.work / options.size
    if options.measure:
        repeats.tell(measure(options.measure, options, folder))
        return 0
    ways = repeats.as_installed(options.only, "lora")
    prepare(folder, options.size)
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for turn in range(options.repeats):
        for way in ways:
            rounds[way].append(measured(way, turn, words, options, folder))
            last = rounds[way][-1]
            logger.info("round %d: %-8s %.2f s a step, %.2f GB", turn + 1, way, last["seconds"], last["peak_bytes"] / 1e9)
    config = make_config("trainer", options, folder)
    report = {
        "version": __version__,
        "size": options.size,
        "settings": {name: getattr(config, name) for name in REPORTED},
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
        "steps": options.steps,
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
        "machine": repeats.this_machine(),
        **repeats.summary(rounds, TARGETS, MEASURED),
        "rounds": rounds,
    }
    repeats.write(options.work, "training", report, as_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
