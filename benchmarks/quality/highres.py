"""Which way to draw pictures larger than native keeps them in one piece: wadi-mini at twice its size and more.

    python benchmarks/quality/highres.py                                        the one-step model in this checkout
    python benchmarks/quality/highres.py --model runs/teacher --lorad runs/vsd/student.safetensors

Every way makes its pictures with one network call. ``direct`` draws at the large size as it is, ``upscaled`` enlarges
a native picture, the others are those of ``wadi_core.highres``. Two questions are asked of each set, on two seeds: are
the pictures, scaled down to native size, still those scenes (Frechet distance), and do crops of native size hold the
detail that real large scenes have (kernel distance). Writes ``mini-highres.json`` and ``mini-highres.png``. A run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from benchmarks.quality import distances
from benchmarks.quality.sets import Generated, Real, Source, grain_seeds, images_of, measured
from benchmarks.quality.streams import Stream
from trainer.evaluation.efficientnet import load_lite
from trainer.evaluation.features import GRAIN, LiteFeatures
from trainer.mini import scenes
from wadi_core import OneStepPipeline, highres, mini
from wadi_core import base as bases
from wadi_core.output import take_any_text
from wadi_core.pictures import to_pictures, to_tensor
from wadi_core.sheets import contact_sheet

SCALE = 2  # of the large pictures against the native ones that they are compared with
FEATURES = 1280
SHEET_ROWS = 6
SIZES = ("256x256", "256x384")
METHODS = ("direct", "upscaled", *highres.METHODS)
# The seeds of the real scenes, of others for the floor, and of the two generated sets, for the first size; each other
# size has its own, far from these.
SEEDS = (230_000_000, 330_000_000, 430_000_000, 530_000_000)
SHEET_SEED, SIZE_STEP, CROP_SEED = 630_000_000, 1_000_000, 1 << 41
METHOD = {
    "direct": "the large size, the network as it is",
    "upscaled": "half of the size, enlarged twofold (bicubic)",
    "redilate, shrink": "wadi_core.highres, with the factors that generate --hires takes",
    "fd_small": "Frechet distance of pictures scaled down twofold (area) to real scenes of that size",
    "fd_small_above_floor": "fd_small less that of two real sets of the same size",
    "kid_crop": "kernel distance of one random crop of native size a picture to such crops of real scenes of the large size",
    "real scenes": "256x384: the scene of 128x128 at a random height on a longer background; large ones are drawn at that "
    "size, not enlarged",
    "features, grain, fd, kid": "as in mini-quality.json",
    "over_direct": "the mean of both seeds, over that of direct; fd above the floor",
}


@dataclass(frozen=True)
class Tall(Stream):
    """Scenes on a background that is longer than the scenes.

    Attributes:
        height: of the background, in the scene's own pixels.
    """

    height: int = scenes.SIZE

    def scene(self, index: int) -> scenes.Scene:
        plan = super().scene(index)
        down = random.Random(self.first + index).uniform(0, self.height - scenes.SIZE)
        return replace(plan, placed=tuple(replace(item, y=item.y + down) for item in plan.placed))


@dataclass(frozen=True)
class RealLarge(Real):
    """Drawn scenes at ``SCALE`` times their size."""

    def recipe(self) -> dict[str, Any]:
        return {"source": "real", "scale": SCALE}

    def images(self, stream: Tall, rows: range) -> Tensor:
        """(n, 3, h, w) in [-1, 1]."""
        plans = (stream.scene(index) for index in rows)
        return to_tensor([scenes.draw(plan, height=stream.height, scale=SCALE) for plan in plans])


@dataclass(frozen=True)
class Large(Generated):
    """Pictures larger than native, made in one of the ways that are compared.

    Attributes:
        width, height: of the pictures.
        method: one of :data:`METHODS`.
        proportions: as :func:`highres.factors` takes them.
        first_level: as :func:`highres.attach` takes it.
    """

    width: int = 0
    height: int = 0
    method: str = "direct"
    proportions: str = highres.PROPORTIONS[0]
    first_level: int = 1

    @property
    def size(self) -> tuple[int, int]:
        return (self.width // SCALE, self.height // SCALE) if self.method == "upscaled" else (self.width, self.height)

    def recipe(self) -> dict[str, Any]:
        own = {"width": self.width, "height": self.height, "method": self.method}
        if self.method in highres.METHODS:
            own |= {"factors": self._factors(), "first_level": self.first_level}
        return super().recipe() | own

    def _factors(self) -> tuple[float, float]:
        return highres.factors(self.width, self.height, self.pipe.native_size, self.proportions)

    def network(self, stream: Stream, rows: range) -> Callable[..., Any]:
        unet = self.pipe.base.unet
        if self.method not in highres.METHODS:
            return unet

        def call(*arguments: Any, **named: Any) -> Any:
            with highres.attach(unet, self._factors(), self.method, self.first_level):
                return unet(*arguments, **named)

        return call

    def pictures(self, latents: Tensor) -> Tensor:
        images = super().pictures(latents)
        if self.method == "upscaled":
            images = F.interpolate(images, scale_factor=SCALE, mode="bicubic").clamp(-1, 1)
        return images


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and the contact sheet written on the way.

    Raises:
        OSError, ValueError: a file is missing or does not fit; one line.
    """
    work, count = Path(options.work), options.count
    eye = LiteFeatures(load_lite().to(options.device), options.grain)
    gauge = distances.Ruler.learn(work, eye, options.study)

    def looked_at(source: Source, stream: Tall) -> tuple[np.ndarray, np.ndarray]:
        """Features of the pictures scaled down, and of a crop of each."""

        def look(images: Tensor, rows: range) -> Tensor:
            seeds = grain_seeds(stream, rows)
            small = F.avg_pool2d(images, SCALE)
            return torch.cat([eye(small, seeds), eye(crops(images, seeds), seeds)], dim=1)

        found = measured(work, source, stream, count, f"features-small-crop-grain-{eye.grain:g}", look)
        return found[:, :FEATURES], found[:, FEATURES:]

    def figures(found: tuple[np.ndarray, np.ndarray], real: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        small, crop = (gauge.distances(one, other) for one, other in zip(found, real, strict=True))
        named = {name.replace("kid", "kid_crop"): value for name, value in crop.items() if name != "fd"}
        return {"fd_small": small["fd"], "kid_small": small["kid"], **named}

    sizes = {}
    pipe = _pipeline(options)
    for place, size in enumerate(options.sizes):
        width, height = (int(side) for side in size.split("x"))
        real, other, *seeds = (
            Tall(f"{name}-{size}", seed + (place + 1) * SIZE_STEP, height=height // SCALE)
            for name, seed in zip(("real", "other", "seed-1", "seed-2"), SEEDS, strict=True)
        )
        reference = looked_at(RealLarge(), real)
        floor = figures(looked_at(RealLarge(), other), reference)
        sets = {}
        for source in _sources(options, pipe, width, height):
            runs = [figures(looked_at(source, stream), reference) for stream in seeds]
            for run in runs:
                run["fd_small_above_floor"] = run["fd_small"] - floor["fd_small"]
            sets[source.method] = {
                "seeds": runs,
                "mean": {name: float(np.mean([run[name] for run in runs])) for name in runs[0]},
            }
        sizes[size] = {"real against real": floor, "sets": sets, "over_direct": over_direct(sets)}
        _write_sheet(options, pipe, width, height)
    return {
        **report.origin("highres", options.words),
        "method": METHOD,
        "settings": {
            "pictures_per_set": count,
            "study_pictures": 2 * options.study,
            "proportions": options.proportions,
            "first_level": options.first_level,
            "decoding_in": "float32" if options.float32 else "bfloat16",
            "grain": options.grain,
        },
        "seeds": {"first": SEEDS, "a_size": SIZE_STEP, "sheet": SHEET_SEED},
        "sizes": sizes,
    }


def crops(images: Tensor, seeds: Sequence[int]) -> Tensor:
    """(n, 3, 128, 128): of each picture (n, 3, h, w) the crop that its seed says."""
    side, (height, width) = scenes.SIZE, images.shape[2:]
    found = []
    for image, seed in zip(images, seeds, strict=True):
        rng = random.Random(CROP_SEED + seed)
        top, left = rng.randint(0, height - side), rng.randint(0, width - side)
        found.append(image[:, top : top + side, left : left + side])
    return torch.stack(found)


def over_direct(sets: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean figures of each way over those of direct generation."""
    if "direct" not in sets:
        return {}
    direct = sets["direct"]["mean"]
    names = ("fd_small", "fd_small_above_floor", "kid_crop")
    return {key: {name: own["mean"][name] / direct[name] for name in names} for key, own in sets.items() if key != "direct"}


def _pipeline(options: argparse.Namespace) -> OneStepPipeline:
    device = torch.device(options.device)
    pipe = OneStepPipeline(bases.load(options.model, device, torch.float32), device, torch.float32)
    pipe.set_lorad(options.lorad or mini.lorad_path())
    return pipe


def _sources(options: argparse.Namespace, pipe: OneStepPipeline, width: int, height: int) -> Iterator[Large]:
    for method in options.only:
        yield Large(
            pipe,
            f"student-{method}",
            bfloat16=not options.float32,
            batch=options.batch,
            width=width,
            height=height,
            method=method,
            proportions=options.proportions,
            first_level=options.first_level,
        )


def _write_sheet(options: argparse.Namespace, pipe: OneStepPipeline, width: int, height: int) -> None:
    """The same captions and, except for upscaled, the same noise in every way."""
    stream = Tall(f"sheet-{width}x{height}", SHEET_SEED, height=height // SCALE)
    columns = {
        source.method: to_pictures(images_of(options.work, source, stream, SHEET_ROWS))
        for source in _sources(options, pipe, width, height)
    }
    rows = [[column[row] for column in columns.values()] for row in range(SHEET_ROWS)]
    path = Path(options.output) / f"mini-highres-{width}x{height}.png"
    report.write_picture(path, contact_sheet(rows, stream.captions(range(SHEET_ROWS)), list(columns)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--count", type=int, default=1000, help="pictures of each set (default: 1000)")
    add("--study", type=int, default=6000, help="pictures of one object, and of two, to learn from (default: 6000 each)")
    add("--output", default="docs", metavar="DIR", help="where the report and the sheets go (default: docs)")
    add("--work", default="runs/quality", metavar="DIR", help="where sets are kept (default: runs/quality)")
    add("--model", default="mini", metavar="DIR", help="teacher in diffusers layout (default: the one in the package)")
    add("--lorad", metavar="FILE", help="the student's adapter (default: the one in the package)")
    add("--sizes", nargs="+", default=list(SIZES), metavar="WxH", help=f"of the pictures (default: {' '.join(SIZES)})")
    add("--only", nargs="+", choices=METHODS, default=list(METHODS), help="measure these ways alone")
    add("--proportions", choices=highres.PROPORTIONS, default=highres.PROPORTIONS[0], help="one factor, or one for each axis")
    add("--first-level", type=int, default=1, metavar="L", help="the outermost level that is treated (default: 1)")
    add("--float32", action="store_true", help="decode in float32, not in bfloat16")
    add("--grain", type=float, default=GRAIN, help=f"on every picture, in grey levels (default: {GRAIN:g}; see features.py)")
    add("--batch", type=int, default=16, help="pictures a network call (default: 16)")
    add("--device", default="cpu", help="cpu (default), cuda and so on")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def _check_size(parser: argparse.ArgumentParser, size: str) -> None:
    """Scenes are as wide as they are, and may stand on a longer background."""
    width, _, height = size.partition("x")
    step = SCALE * bases.FACTOR
    if not (
        width.isdigit() and height.isdigit() and int(width) == SCALE * scenes.SIZE <= int(height) and not int(height) % step
    ):
        parser.error(f"sizes are {SCALE * scenes.SIZE}xH, with H divisible by {step} and no less, not {size}")


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    take_any_text()
    parser = _parser()
    words = sys.argv[1:] if words is None else list(words)
    options = parser.parse_args(words)
    options.words = words
    if options.count < 2 or options.batch < 1 or options.grain < 0:
        parser.error("at least 2 pictures, batches of 1 and grain of 0 are needed")
    for size in options.sizes:
        _check_size(parser, size)
    if options.model != "mini" and not options.lorad:
        parser.error("--model needs --lorad")
    logging.getLogger("wadi").setLevel(logging.ERROR)

    def act() -> str:
        found = measure(options)
        report.write_json(Path(options.output) / "mini-highres.json", found)
        tables = [
            report.table(size, {"real": one["real against real"], **{key: own["mean"] for key, own in one["sets"].items()}})
            + report.table("over direct", one["over_direct"])
            for size, one in found["sizes"].items()
        ]
        return "\n".join(tables)

    return report.ended("highres", options.debug, act)


if __name__ == "__main__":
    sys.exit(main())
