"""Whether a negative prompt takes out of one-step pictures what it names, and only that.

    python benchmarks/quality/negative.py --sweep            tries many settings on few captions: negative-sweep.json
    python benchmarks/quality/negative.py                    the presets on 500 captions: mini-negative.json and .png

Captions are "A and B", negative prompts "B", and noise is the same in all sets. A run that was stopped goes on where it
was. The sweep has captions of its own, so that no setting is chosen on what it is measured with.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.quality import distances
from benchmarks.quality.sets import Generated, Real, feature_set, images_of
from benchmarks.quality.streams import Stream
from trainer.evaluation.efficientnet import load_lite
from trainer.evaluation.features import LiteFeatures
from trainer.evaluation.retrieval import Prototypes
from trainer.mini import scenes
from wadi_core import OneStepPipeline, guidance
from wadi_core.negative import PRESETS, Guidance, Negative
from wadi_core.pictures import to_pictures
from wadi_core.sheets import contact_sheet

SHEET_ROWS = 10
REFERENCE = 2  # times the pictures of a set
BARE, ALONE = "without", "caption A alone"
TWO_PASSES = (0.5, 1.0)  # scales of the control
TARGETS = {"b_ratio": 1 / 3, "a_ratio": 0.95, "fd_ratio": 1.1}
METHOD = {
    "captions": '"A and B" of two objects; the negative prompt is "B"; both with their articles',
    "a, b": "pictures in which A, or B, is among the two objects that the judge finds likeliest",
    "a_ratio, b_ratio, fd_ratio": "over the set without a negative prompt",
    "judge": "nearest prototypes of real scenes with one object and with two, all objects, EfficientNet-Lite0 features",
    "fd": "Frechet distance in 64 dimensions to real scenes of one object and of two, half and half",
    ALONE: "what a perfect negative prompt would leave: the network is never told of B",
    "two passes": "prediction + scale (prediction - prediction for B): twice the time",
}


@dataclass(frozen=True)
class Pairs(Stream):
    """Captions "A and B".

    Attributes:
        alone: captions are "A" only.
    """

    alone: bool = False

    def phrases(self, rows: range) -> list[tuple[str, str]]:
        """A and B of some pictures."""
        return [tuple(item.thing.phrase for item in self.scene(index).placed) for index in rows]  # type: ignore[misc]

    def captions(self, rows: range) -> list[str]:
        return [first if self.alone else f"{first} and {second}" for first, second in self.phrases(rows)]

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"captions": "a and b"}


REAL = Stream("negative-real", 240_000_000)
TEST = Pairs("negative", 440_000_000, pair=True)
SWEEP = Pairs("negative-sweep", 450_000_000, pair=True)
SHEET = Pairs("sheet-negative", 640_000_000, pair=True)


def alone(stream: Pairs) -> Pairs:
    """The same scenes, of which captions name only the first object."""
    return Pairs(f"{stream.name}-alone", stream.first, pair=True, alone=True)


@dataclass(frozen=True)
class Away(Generated):
    """Pictures that are steered away from B inside attention.

    Attributes:
        how: the method and its numbers.
        beside: more texts in the negative prompt.
    """

    how: Guidance = PRESETS["nag"]
    beside: tuple[str, ...] = ()

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | vars(self.how) | ({"beside": self.beside} if self.beside else {})

    def network(self, stream: Pairs, rows: range) -> Callable[..., Any]:
        unet, encode = self.pipe.base.unet, self.pipe.encode_whole
        unwanted = [(Negative(**vars(self.how), texts=(second, *self.beside)),) for _, second in stream.phrases(rows)]

        def call(*args: Any, **kwargs: Any) -> Any:
            with guidance.attach_each(unet, unwanted, encode):
                return unet(*args, **kwargs)

        return call


@dataclass(frozen=True)
class TwoPasses(Generated):
    """The control: guidance of what the network returns, which takes a second pass.

    Attributes:
        scale: how far the prediction is moved away from that for B.
    """

    scale: float = 1.0

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"two passes": self.scale}

    def network(self, stream: Pairs, rows: range) -> Callable[..., Any]:
        text = self.pipe.encode([second for _, second in stream.phrases(rows)])

        def call(z: Tensor, t: int, encoder_hidden_states: Tensor) -> SimpleNamespace:
            wanted, unwanted = (
                self.pipe.base.unet(z, t, encoder_hidden_states=c).sample for c in (encoder_hidden_states, text)
            )
            return SimpleNamespace(sample=torch.lerp(unwanted, wanted, 1.0 + self.scale))

        return call


class Measure:
    """Looks at sets of pictures, and at real ones once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work, self.study = Path(options.work), options.study
        self.eye = LiteFeatures(load_lite().to(options.device), options.grain)
        self.ruler = distances.Ruler.learn(self.work, self.eye, self.study)
        streams = (distances.SINGLE, distances.PAIR)
        features = np.concatenate([feature_set(self.work, self.eye, Real(), stream, self.study) for stream in streams])
        shown = [one for stream in streams for one in stream.shown(range(self.study))]
        self.judge = Prototypes.fit(features, shown, len(scenes.things()))

    def figures(self, source: Generated, stream: Pairs, count: int) -> dict[str, float]:
        """Of the first pictures that a source makes of a stream."""
        found = feature_set(self.work, self.eye, source, stream, count)
        guessed, shown = self.judge.name(found, 2), np.asarray(stream.shown(range(count)))
        first, second = ((guessed == shown[:, place, None]).any(1).mean() for place in (0, 1))
        reference = feature_set(self.work, self.eye, Real(), REAL, REFERENCE * count)
        projected = self.ruler.projection
        return {"a": float(first), "b": float(second), "fd": distances.frechet(projected(found), projected(reference))}


def with_ratios(sets: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Figures, and what they are of those without a negative prompt."""
    bare = sets[BARE]
    return {key: row | {f"{name}_ratio": row[name] / bare[name] for name in bare} for key, row in sets.items()}


def name_of(how: Guidance) -> str:
    """What a setting is called in a table."""
    numbers = f" tau {how.tau:g} alpha {how.alpha:g}" if how.method == "nag" else ""
    return f"{how.method} {how.scale:g}{numbers} from level {how.first_level}"


def settings_to_try(options: argparse.Namespace) -> list[Guidance]:
    """Of the sweep."""
    tried = [("nag", *numbers) for numbers in itertools.product(options.scales, options.taus, options.alphas)]
    tried += [("nasa", scale) for scale in options.nasa_scales]
    return [Guidance(*numbers, first_level=level) for level in options.levels for numbers in tried]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and the contact sheet of the presets written on the way.

    Raises:
        OSError, ValueError: a file is missing or does not fit; one line.
    """
    look = Measure(options)
    pipe = OneStepPipeline.from_pretrained(options.model, lorad=options.lorad, device=options.device, dtype="float32")
    one: dict[str, Any] = {"pipe": pipe, "batch": options.batch, "bfloat16": not options.float32}
    bare = Generated(**one, name=BARE)
    if options.sweep:
        away = {name_of(how): Away(**one, name=how.method, how=how) for how in settings_to_try(options)}
        stream = SWEEP
    else:
        away = {f"{key}: {name_of(how)}": Away(**one, name=how.method, how=how) for key, how in PRESETS.items()}
        stream = TEST
    passes = {f"two passes {scale:g}": TwoPasses(**one, name="two-passes", scale=scale) for scale in options.two_passes}
    sources: dict[str, Generated] = {BARE: bare, **away, **passes}
    sets = {key: look.figures(source, stream, options.count) for key, source in sources.items()}
    sets[ALONE] = look.figures(bare, alone(stream), options.count)
    if not options.sweep:
        _write_sheet(Path(options.output) / "mini-negative.png", options.work, sources, bare)
    return {
        **report.origin("quality/negative", options.words),
        "method": METHOD,
        "settings": {
            key: value for key, value in report.how(options).items() if not key.startswith(("teacher", "guid", "samp"))
        },
        "seeds": {one.name: one.first for one in (distances.SINGLE, distances.PAIR, REAL, stream, SHEET)},
        "presets": {key: vars(how) for key, how in PRESETS.items()},
        "sets": with_ratios(sets),
        "targets": TARGETS,
    }


def _write_sheet(path: Path, work: str, sources: dict[str, Generated], bare: Generated) -> None:
    def pictures(source: Generated, stream: Pairs) -> list[Any]:
        return to_pictures(images_of(work, source, stream, SHEET_ROWS))

    columns = {key.partition(":")[0]: pictures(source, SHEET) for key, source in sources.items()}
    columns[ALONE] = pictures(bare, alone(SHEET))
    captions = [f"{first} and {second}; not: {second}" for first, second in SHEET.phrases(range(SHEET_ROWS))]
    rows = [[column[row] for column in columns.values()] for row in range(SHEET_ROWS)]
    report.write_picture(path, contact_sheet(rows, captions, list(columns)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--count", type=int, default=500, help="pictures of each set (default: 500)")
    add("--sweep", action="store_true", help="try the settings below in place of the presets")
    numbers: dict[str, Any] = {"nargs": "*", "type": float, "metavar": "X"}
    add("--scales", **numbers, default=[1, 2, 4, 8], help="of nag")
    add("--taus", **numbers, default=[1.5, 2.5, 5], help="of nag")
    add("--alphas", **numbers, default=[0.25, 0.5, 1], help="of nag")
    add("--nasa-scales", **numbers, default=[0.25, 0.5, 1, 2], help="of nasa")
    add("--levels", nargs="*", type=int, metavar="N", default=[0, 1], help="outermost levels that are steered")
    add("--two-passes", **numbers, default=TWO_PASSES, help="scales of the control (default: 0.5 1)")
    report.add_options(parser)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return report.run("negative", _parser(), words, _act)


def _act(options: argparse.Namespace) -> str:
    found = measure(options)
    name = "negative-sweep" if options.sweep else "mini-negative"
    report.write_json(Path(options.output) / f"{name}.json", found)
    return report.table("negative prompt", found["sets"])


if __name__ == "__main__":
    sys.exit(main())
