"""What distillation changed in wadi-mini, and what its LoRaD costs as a plain LoRA of one rank or another.

    python benchmarks/quality/mini_adapter.py                                   the model in this checkout
    python benchmarks/quality/mini_adapter.py --model runs/teacher --lorad runs/mini/wadi-mini-one-step.safetensors

Writes ``mini-adapter.json``, ``mini-change.png`` (norms and directions of the weights, layer by layer) and
``mini-lora.png`` (the same captions and noise drawn with the LoRaD and with LoRAs of falling rank, loaded by diffusers).
The errors are those that ``convert`` prints: of the weights' change, of what the network returns at t = 999, and the same
over what the LoRaD changes there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image
from torch import Tensor

from benchmarks import report
from benchmarks.quality.openings import bare_pipeline
from trainer.mini.teacher import SHEET_CAPTIONS
from wadi_core import LoRaD, OneStepPipeline, mini
from wadi_core.lorad.analysis import analyze
from wadi_core.lorad.chart import plot
from wadi_core.lorad.convert import LoRA, eps_error, to_lora
from wadi_core.lorad.merge import merged_tensors
from wadi_core.lorad.weights import Weights
from wadi_core.pictures import to_pictures
from wadi_core.pipeline import noise
from wadi_core.sheets import contact_sheet

RANKS = (4, 8, 16, 32, 64, 96)
CALLS = 64  # pictures over which the network's error is measured
SHOWN = (64, 16, 4)  # ranks on the sheet


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures; the two pictures are written on the way.

    Raises:
        OSError, ValueError: a file is missing or does not fit; one line.
    """
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    base, lorad = Weights.open(options.model), LoRaD.load(options.lorad or mini.lorad_path())
    pipe = bare_pipeline(options.model, options.device)
    tensors = {name: base.tensor(name) for name in base.names}
    change = analyze(base, Weights.of(tensors | dict(merged_tensors(base, [(lorad, 1.0)]))))
    plot(change, output / "mini-change.png", "What distillation changed in wadi-mini")
    loras = {rank: to_lora(base, [(lorad, 1.0)], rank) for rank in options.ranks}
    rows = {str(rank): errors(pipe, lorad, lora) for rank, lora in loras.items()}
    report.write_picture(output / "mini-lora.png", _sheet(pipe, lorad, {rank: loras[rank] for rank in SHOWN if rank in loras}))
    energy = change.energy
    return {
        **report.origin("mini_adapter", options.words),
        "norm change, %": asdict(change.norm),
        "direction change, %": asdict(change.direction),
        "energy at 30 % of the rank": None if energy is None else asdict(energy),
        "lorad": {"rank": lorad.rank, "parameters": lorad.parameters_count},
        "lora": rows,
    }


def errors(pipe: OneStepPipeline, lorad: LoRaD, lora: LoRA) -> dict[str, float]:
    """What a LoRA gets wrong where the LoRaD is right."""
    captions = [SHEET_CAPTIONS[index % len(SHEET_CAPTIONS)] for index in range(CALLS)]
    with torch.no_grad():
        told = pipe.encode(captions)
        z = noise(range(CALLS), *pipe.native_size).to(told.device)

        def predict() -> Tensor:
            return pipe.base.unet(lorad.one_step.network_input(z), lorad.one_step.timestep, told).sample

        of_output, of_change = eps_error(pipe.base.unet, [(lorad, 1.0)], lora, predict)
    count = sum(up.numel() + down.numel() for up, down in lora.factors.values())
    return {"parameters": count, "weights": lora.error, "output": of_output, "output over change": of_change}


def _sheet(pipe: OneStepPipeline, lorad: LoRaD, loras: dict[int, LoRA]) -> Image.Image:
    """Captions with the LoRaD, and with LoRAs as diffusers loads them."""
    pipe.set_lorad(lorad)
    columns = {"LoRaD": pipe(list(SHEET_CAPTIONS), seed=0).images}
    pipe.set_lorad(None)
    for rank, lora in loras.items():
        columns[f"LoRA, rank {rank}"] = _of_diffusers(pipe, lora)
    pictures = [[column[row] for column in columns.values()] for row in range(len(SHEET_CAPTIONS))]
    return contact_sheet(pictures, list(SHEET_CAPTIONS), list(columns))


@torch.no_grad()
def _of_diffusers(pipe: OneStepPipeline, lora: LoRA) -> list[Image.Image]:
    """One-step pictures by diffusers' own loader of LoRA files."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    parts = pipe.base
    loader = StableDiffusionPipeline(
        parts.vae,
        parts.text_encoder,
        parts.tokenizer,
        parts.unet,
        DDIMScheduler(steps_offset=1, clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )
    told, z = pipe.encode(list(SHEET_CAPTIONS)), noise(range(len(SHEET_CAPTIONS)), *pipe.native_size)
    with tempfile.TemporaryDirectory() as place:
        lora.save(Path(place) / "lora.safetensors")
        loader.load_lora_weights(place, weight_name="lora.safetensors")
    try:
        x = pipe.one_step.network_input(z.to(told.device))
        eps = parts.unet(x, pipe.one_step.timestep, told).sample
    finally:
        loader.unload_lora_weights()
    return to_pictures(parts.vae.decode(pipe.one_step.x0(x.to(eps), eps) / parts.vae.config.scaling_factor).sample)


def _parser() -> argparse.ArgumentParser:
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="mini", metavar="DIR", help="teacher in diffusers layout (default: the one in the package)")
    add("--lorad", metavar="FILE", help="the student's adapter (default: the one in the package)")
    add("--ranks", nargs="+", type=int, default=list(RANKS), metavar="R", help="of the LoRAs")
    add("--output", default="docs", metavar="DIR", help="where the report and the pictures go (default: docs)")
    add("--device", default="cpu", help="cpu (default), cuda and so on")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.model != "mini" and not options.lorad:
        parser.error("--model needs --lorad")


def _act(options: argparse.Namespace) -> str:
    found = measure(options)
    report.write_json(Path(options.output) / "mini-adapter.json", found)
    said = [f"{name}: {found[name]['mean']:.3g} (deviation {found[name]['std']:.2g})" for name in found if name.endswith("%")]
    return report.table("LoRA of rank", found["lora"]) + "\n".join(said) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return report.run("mini_adapter", _parser(), words, _act, _check)


if __name__ == "__main__":
    sys.exit(main())
