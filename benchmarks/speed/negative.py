"""What a negative prompt costs: one call of a U-Net of Stable Diffusion 1.5's size, random weights, without and with it.

    python benchmarks/speed/negative.py                       256x256 pixels, float32, on the CPU
    python benchmarks/speed/negative.py --size 512 --device cuda --dtype float16

The cases take turns in one process, call by call, so that what else the machine does falls on all of them alike; time is
this process's own on a CPU. Memory is the peak of a process that has only this case. Writes ``speed-negative.json`` and
``speed-negative.md``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import report
from benchmarks.speed import repeats
from wadi_core import configs, guidance
from wadi_core.negative import PRESETS, Guidance

BARE = "without"
CASES: dict[str, Guidance | None] = {BARE: None, "nag": PRESETS["nag"], "nasa": PRESETS["nasa"]}
TOKENS, WIDTH = 77, 768
TARGETS = [
    *(repeats.Target(f"time, {name}", (name, "seconds"), (BARE, "seconds"), 1.15) for name in ("nag", "nasa")),
    *(repeats.Target(f"memory, {name}", (name, "bytes"), (BARE, "bytes"), 1.05) for name in ("nag", "nasa")),
]


class Calls:
    """A U-Net and what it is called with."""

    def __init__(self, options: argparse.Namespace) -> None:
        from diffusers import UNet2DConditionModel

        settings = configs.read(configs.folder("sd15") / "unet" / "config.json")
        torch.manual_seed(0)
        device, dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.unet = UNet2DConditionModel.from_config(settings).to(device, dtype).eval().requires_grad_(False)
        self.z = torch.randn(options.batch, 4, options.size // 8, options.size // 8, device=device, dtype=dtype)
        self.text = torch.randn(options.batch, TOKENS, WIDTH, device=device, dtype=dtype)
        self.unwanted = torch.randn(1, TOKENS, WIDTH, device=device, dtype=dtype)

    @torch.no_grad()
    def seconds(self, how: Guidance | None) -> float:
        """Of one call: the clock's on a GPU, this process's own on a CPU."""
        gpu = self.z.device.type != "cpu"
        clock = time.perf_counter if gpu else time.process_time
        start = clock()
        with guidance.attach(self.unet, self.unwanted, how or Guidance(scale=0.0)):
            self.unet(self.z, 999, encoder_hidden_states=self.text)
        if gpu:
            getattr(torch, self.z.device.type).synchronize()
        return clock() - start

    def peak(self, how: Guidance | None) -> float:
        """Bytes, of two calls."""
        for _ in range(2):
            self.seconds(how)
        return float(torch.cuda.max_memory_allocated()) if self.z.device.type == "cuda" else repeats.peak_memory()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures.

    Raises:
        OSError: a process for one case failed; one line.
    """
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    words = [f"--{name}={getattr(options, name)}" for name in ("size", "batch", "device", "dtype")]
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    memory = {name: repeats.run_apart(name, [*command, "--only", name])["bytes"] for name in CASES}
    calls = Calls(options)
    for number in range(options.rounds + 1):
        for name, how in CASES.items():
            seconds = calls.seconds(how)
            if number:  # the first round warms up
                rounds[name].append({"seconds": seconds, "bytes": memory[name]})
    return {
        **report.origin("speed/negative", options.words),
        "settings": {name: getattr(options, name) for name in ("size", "batch", "device", "dtype", "rounds")},
        "rounds": rounds,
        **repeats.summary(rounds, TARGETS),
    }


def as_markdown(found: dict[str, Any]) -> str:
    settings = found["settings"]
    lines = [
        f"`{found['command']}`: {found['machine']['cores']} cores, torch {found['versions']['torch']}; {settings['device']}, "
        f"{settings['dtype']}, {settings['size']}x{settings['size']} pixels, batch {settings['batch']}.",
        "",
        "| | seconds of a call | memory, GiB |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {row['seconds']:.3f} | {row['bytes'] / 2**30:.3f} |" for name, row in found["medians"].items()]
    return "\n".join([*lines, "", *repeats.ratio_table(found["ratios"]), ""])


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--size", type=int, default=256, help="pixels on a side (default: 256)")
    add("--batch", type=int, default=1, help="pictures of a call (default: 1)")
    add("--rounds", type=int, default=7, help="calls of each case (default: 7)")
    add("--device", default="cpu", help="cpu (default), cuda and so on")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="default: float32")
    add("--output", type=Path, default=Path("runs/speed"), metavar="DIR", help="where the report goes (default: runs/speed)")
    add("--only", choices=tuple(CASES), help=argparse.SUPPRESS)
    add("--debug", action="store_true", help="show where an error comes from")
    return report.run("negative", parser, words, _act, lambda parser, options: None)


def _act(options: argparse.Namespace) -> str:
    if options.only:
        repeats.tell({"bytes": Calls(options).peak(CASES[options.only])})
        return ""
    found = measure(options)
    repeats.write(options.output, "speed-negative", found, as_markdown(found))
    return ""


if __name__ == "__main__":
    sys.exit(main())
