"""How long a picture takes and where the time goes: this pack in each precision and backend beside diffusers, in one run.

    python benchmarks/speed/latency.py                           wadi-mini
    python benchmarks/speed/latency.py --size sd15 --rounds 3    SD1.5's size, random weights, 512x512: 8 GB of memory

Each measurement is a process of its own, so that its peak memory is its own too; the rounds go through all of them in
turn, so that a busy minute hits all alike. The first picture is not counted. What is compared is processor time, which other
work on the machine changes less than the clock; both are told. Writes ``latency-SIZE.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.speed import repeats
from wadi_core import OneStep, OneStepPipeline, configs, mini
from wadi_core import base as bases
from wadi_core.output import take_any_text
from wadi_core.tiny import make_decoder

STAGES = ("text", "network", "decode", "rest")
PROMPT = "a red apple"
TINY = {"mini": (32, (2, 2, 2, 1)), "sd15": (64, (3, 3, 3, 1))}  # width and blocks; the latter are TAESD's, here random
CPU = torch.device("cpu")


def base_of(size: str) -> bases.Base:
    """wadi-mini's networks, or Stable Diffusion 1.5's with random weights."""
    if size == "mini":
        return bases.load("mini", CPU, torch.float32)
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = configs.folder("sd15")
    torch.manual_seed(0)
    networks: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(configs.read(folder / "unet" / "config.json")),
        "vae": AutoencoderKL.from_config(configs.read(folder / "vae" / "config.json")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(configs.read(folder / "text_encoder" / "config.json"))),
    }
    tokenizer, pad = bases._load_tokenizer(folder / "tokenizer")
    networks = {part: network.eval().requires_grad_(False) for part, network in networks.items()}
    return bases.Base("random", "sd15", tokenizer=tokenizer, pad=pad, prediction_type="epsilon", one_step=OneStep(), **networks)


Draw = Callable[[int], tuple[Any, dict[str, float]]]


def ours(size: str, precision: str = "balanced", backend: str = "eager", tiny: bool = False) -> Draw:
    """This pack; other prompts each time, so that nothing is remembered."""
    pipe = OneStepPipeline(base_of(size), CPU, torch.float32)
    if size == "mini":
        pipe.set_lorad(mini.lorad_path())
    if tiny:
        pipe.tiny = "random", make_decoder(*TINY[size]).eval().requires_grad_(False)
    pipe.set_precision(precision)
    pipe.set_backend(backend)

    def draw(number: int) -> tuple[Any, dict[str, float]]:
        made = pipe(f"{PROMPT} {number}", seed=number)
        times = made.timings
        return made.images[0], {"text": times.text, "network": times.network, "decode": times.decode}

    return draw


def diffusers(size: str, dtype: torch.dtype) -> Draw:
    """What a user of diffusers would write."""
    from diffusers import StableDiffusionPipeline

    from wadi_core.scheduler import OneStepScheduler

    base: Any = base_of(size)
    if size == "mini":
        from wadi_core import LoRaD

        LoRaD.load(mini.lorad_path()).fuse_into(base.unet, keep_backup=False)
    pipe = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        scheduler=OneStepScheduler.of(OneStep()),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    ).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    spent = dict.fromkeys(("text", "network", "decode"), 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            found = function(*args, **options)
            spent[name] = time.perf_counter() - start
            return found

        return call

    parts = (("text", pipe.text_encoder, "forward"), ("network", pipe.unet, "forward"), ("decode", pipe.vae, "decode"))
    for name, owner, method in parts:
        setattr(owner, method, timed(name, getattr(owner, method)))

    def draw(number: int) -> tuple[Any, dict[str, float]]:
        generator = torch.Generator().manual_seed(number)
        made = pipe(f"{PROMPT} {number}", num_inference_steps=1, guidance_scale=1.0, generator=generator)
        return made.images[0], dict(spent)  # type: ignore[union-attr]

    return draw


MEASUREMENTS: dict[str, Callable[[str], Draw]] = {
    "diffusers, fp32": lambda size: diffusers(size, torch.float32),
    "diffusers, bf16": lambda size: diffusers(size, torch.bfloat16),
    "wadi, exact": lambda size: ours(size, "exact"),
    "wadi, balanced": lambda size: ours(size),
    "wadi, fast": lambda size: ours(size, "fast"),
    "wadi, balanced, tiny decoder": lambda size: ours(size, tiny=True),
    "wadi, balanced, OpenVINO": lambda size: ours(size, backend="openvino"),
    "wadi, fast, OpenVINO, tiny decoder": lambda size: ours(size, "fast", "openvino", tiny=True),
}
DEFAULT = "diffusers, fp32"


def measure(name: str, size: str, count: int) -> dict[str, Any]:
    """Draw pictures from prompt to the bytes of a PNG file: medians of the clock, of the processor, and of each stage."""
    repeats.use_all_cores()
    logging.getLogger("wadi").setLevel(logging.ERROR)
    draw = MEASUREMENTS[name](size)
    rounds: dict[str, list[float]] = {key: [] for key in ("seconds", "processor", *STAGES)}
    for number in range(count + 1):
        start, busy = time.perf_counter(), time.process_time()
        picture, stages = draw(number)
        picture.save(io.BytesIO(), "png")
        spent = {"seconds": time.perf_counter() - start, "processor": time.process_time() - busy, **stages}
        spent["rest"] = spent["seconds"] - sum(stages.values())
        if number:  # the first is the warm-up
            for key, value in spent.items():
                rounds[key].append(value)
    return {key: statistics.median(values) for key, values in rounds.items()} | {"peak_gb": repeats.peak_memory() / 1e9}


def table(medians: dict[str, dict[str, float]]) -> str:
    """The figures as a Markdown table; the ratio is of processor time, to diffusers in float32."""
    whole = medians.get(DEFAULT, {}).get("processor")
    lines = ["| | ratio | processor, s | clock, s | " + " | ".join(STAGES) + " | peak memory, GB |", "|---" * 9 + "|"]
    for name, row in medians.items():
        ratio = f"{row['processor'] / whole:.2f}" if whole else ""
        cells = [ratio, *(f"{row[key]:.3f}" for key in ("processor", "seconds", *STAGES)), f"{row['peak_gb']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_bars(medians: dict[str, dict[str, float]], path: Path) -> None:
    """Where the time goes: processor seconds of a picture, split as the clock splits its stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(medians) + 1.2), layout="constrained")
    left = dict.fromkeys(medians, 0.0)
    for stage, colour in zip(STAGES, ("#8da0cb", "#fc8d62", "#66c2a5", "#b3b3b3"), strict=True):
        widths = {name: row["processor"] * row[stage] / row["seconds"] for name, row in medians.items()}
        axes.barh(list(medians), list(widths.values()), left=list(left.values()), color=colour, label=stage)
        left = {name: left[name] + widths[name] for name in medians}
    axes.invert_yaxis()
    axes.set_xlabel("processor seconds of a picture")
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def installed() -> list[str]:
    """The measurements that can be made here."""
    openvino = importlib.util.find_spec("openvino") is not None
    return [name for name in MEASUREMENTS if openvino or "OpenVINO" not in name]


def main(words: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    take_any_text()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--size", choices=("mini", "sd15"), default="mini", help="of the networks (default: mini)")
    add("--rounds", type=int, default=3, help="through all measurements (default: 3)")
    add("--count", type=int, default=0, help="pictures a process (default: 20 of mini, 1 of sd15)")
    add("--only", nargs="+", choices=tuple(MEASUREMENTS), help="measure these alone")
    add("--output", default="docs", metavar="DIR", help="where the report goes (default: docs)")
    add("--one", choices=tuple(MEASUREMENTS), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    count = options.count or (20 if options.size == "mini" else 1)
    if options.one:
        repeats.tell(measure(options.one, options.size, count))
        return 0
    names = options.only or installed()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, os.path.abspath(__file__), "--size", options.size, "--count", str(count), "--one", name]
            rounds[name].append(repeats.run_apart(name, command))
    medians = repeats.summary(rounds, ())["medians"]
    machine = repeats.this_machine()
    text = table(medians) + f"\n{repeats.place(machine)}, medians of {options.rounds} rounds.\n"
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    repeats.write(output, f"latency-{options.size}", {"machine": machine, "rounds": rounds, "medians": medians}, text)
    draw_bars(medians, output / f"latency-{options.size}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
