"""Which layers of a U-Net may compute in bfloat16: the error of x0 with one group of layers in it at a time.

    python benchmarks/quality/precision.py                       wadi-mini
    python benchmarks/quality/precision.py --model sd15          Stable Diffusion 1.5's shape, random weights, 6 GB of memory

A group is all layers of one kind on one level, as ``wadi_core.precision`` sorts them. The error is the root mean square of
the difference from float32, in units of the latent; for wadi-mini also in grey levels of the picture, decoded in float32
both times. Random weights have no pictures. Writes ``precision-MODEL.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from benchmarks import report
from wadi_core import OneStep, OneStepPipeline, configs, precision
from wadi_core.precision import EXACT, NARROW, Place, Rule
from wadi_core.seeds import noise

CAPTIONS = (
    "a red apple",
    "a cat and a bicycle",
    "a frog on top of a pizza",
    "a dog on a blue background",
    "a small house",
    "two birds",
    "a yellow car next to a tree",
    "a smiling face",
)


class Subject:
    """A network, how it is called, and how the error of its x0 is told."""

    def __init__(self, unet: Any, x0: Callable[[], Tensor], decode: Callable[[Tensor], Tensor] | None) -> None:
        self.unet, self._x0, self._decode = unet, x0, decode
        self.latents = x0()
        self.pixels = decode(self.latents) if decode else None

    def error(self, rule: Rule | None) -> dict[str, float]:
        """Of x0 under a rule."""
        precision.attach(self.unet, rule)
        x0 = self._x0()
        precision.attach(self.unet, None)
        found = {"latent": rms(x0 - self.latents)}
        if self._decode and self.pixels is not None:
            found["grey levels"] = rms(self._decode(x0) - self.pixels) * 127.5
        return found

    def places(self) -> list[Place]:
        """Of all layers, each once."""
        levels = len(self.unet.config.block_out_channels)
        layers = self.unet.named_modules()
        found = {precision.place_of(path, levels) for path, one in layers if isinstance(one, nn.Linear | nn.Conv2d)}
        return sorted(found, key=lambda place: (place.level, place.kind))


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


@torch.no_grad()
def wadi_mini(count: int) -> Subject:
    pipe = OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")
    text, z = pipe.encode(CAPTIONS[:count]), noise(range(count), *pipe.native_size)

    def decode(latents: Tensor) -> Tensor:
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)

    def x0() -> Tensor:
        return pipe.one_step.x0(z, pipe.unet(z, 999, encoder_hidden_states=text).sample)

    return Subject(pipe.unet, x0, decode)


@torch.no_grad()
def sd15(count: int) -> Subject:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config(configs.read(configs.folder("sd15") / "unet" / "config.json"))
    unet.eval().requires_grad_(False)
    text, z = torch.randn(1, 77, 768), noise([0], 256, 256)
    return Subject(unet, lambda: OneStep().x0(z, unet(z, 999, encoder_hidden_states=text).sample), None)


SUBJECTS = {"mini": wadi_mini, "sd15": sd15}


@torch.no_grad()
def measure(subject: Subject) -> Iterator[tuple[str, dict[str, float]]]:
    """Name of a group or a rule, and the error with it."""

    def only(place: Place) -> Rule:
        return lambda one: NARROW if one == place else EXACT

    for place in subject.places():
        yield f"{place.kind}, level {place.level}", subject.error(only(place))
    yield "balanced", subject.error(precision.balanced)
    yield "fast", subject.error(precision.narrow)


def main(words: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", choices=tuple(SUBJECTS), default="mini", help="whose U-Net (default: mini)")
    parser.add_argument("--count", type=int, default=len(CAPTIONS), help="pictures of wadi-mini (default: 8)")
    parser.add_argument("--output", default="docs", metavar="DIR", help="where the report goes (default: docs)")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return report.run("precision", parser, words, _act, _check)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if not 1 <= options.count <= len(CAPTIONS):
        parser.error(f"--count goes from 1 to {len(CAPTIONS)}")


def _act(options: argparse.Namespace) -> str:
    rows = dict(measure(SUBJECTS[options.model](options.count)))
    found = {**report.origin("quality/precision", options.words), "model": options.model, "errors": rows}
    report.write_json(Path(options.output) / f"precision-{options.model}.json", found)
    return report.table("in bfloat16", rows)


if __name__ == "__main__":
    sys.exit(main())
