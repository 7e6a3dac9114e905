"""Whether a relation that was learned for the multi-step teacher is understood by the one-step student as well.

    python benchmarks/quality/inversion.py --examples runs/left-of                ten pictures to learn "left of" from
    python trainer/invert.py --config trainer/configs/invert-mini.yaml
    python trainer/personalize.py --config trainer/configs/relation-mini.yaml
    python benchmarks/quality/inversion.py --adapters runs/relation-mini/left-of.safetensors \
        --embedding runs/invert-mini/left-of.safetensors

Captions of wadi-mini never name left or right. Without ``--adapters`` the word is measured alone; with ``--relation over`` it
is one over the other, which captions do name, by other words. Word and LoRaD are learned from five pairs of objects and
measured on pairs of others. Writes ``mini-inversion.json`` (every figure, count and seed) and ``mini-inversion.png`` (the
same pairs and noise side by side, not chosen by eye). A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.quality import distances
from benchmarks.quality.degraded_scenes import Rough
from benchmarks.quality.localisation import STARTS, WINDOW, located
from benchmarks.quality.sets import Generated, Real, Source, grain_seeds, images_of, measured
from benchmarks.quality.streams import Stream, write_examples
from trainer.evaluation.efficientnet import load_lite
from trainer.evaluation.features import LiteFeatures
from trainer.mini import scenes
from wadi_core import OneStepPipeline, mini
from wadi_core.embeddings import Embedding
from wadi_core.output import take_any_text
from wadi_core.pictures import to_pictures
from wadi_core.sheets import contact_sheet

EXAMPLE_PAIRS, EXAMPLES_EACH = 5, 2
APART = 40  # pixels between the centres of two objects that stand side by side, or one over the other
WINDOWS_APART = 2  # at least, between the windows in which they are found
AXES = {"left-of": 0, "over": 1}  # on which the first object comes before the second
RELATIONS = {
    "left-of": "the first object is to the left of the second; captions of the training data name neither side",
    "over": "the first object is over the second; captions of the training data say above, on top of, under",
}
SHEET_ROWS = 10
STRENGTHS = (1.0, 0.8)  # of the one-step LoRaD
TARGETS = {"true_over_teacher": 0.8}
METHOD = {
    "examples": f"{EXAMPLE_PAIRS * EXAMPLES_EACH} scenes of {EXAMPLE_PAIRS} pairs, none of whose objects is measured",
    "bare": "captions A and B",
    "token": "captions A <word> B",
    "found": "share of pictures of which the two objects that any window looks most like are the caption's",
    "place": f"that of the window ({WINDOW} of 128 pixels, edges at {STARTS} both ways) that looks most like an object",
    "true": f"share of pictures with both objects found, the first at least {WINDOWS_APART} windows before the second",
    "reversed": "the same with the first after the second",
    "placed, placed_reversed": "likewise, whether or not both are found among all objects: where each of the two is likeliest",
    "student at 0.8": "with the one-step LoRaD at this strength; what was learned stays at 1",
    "true_gain, placed_gain": "with the word less that with the bare caption, of the same network and noise",
    "true_over_teacher, placed_over_teacher": "a student's gain over the teacher's",
    "real": "real scenes with the relation, and with its reverse: how far the rule can be trusted",
}


@dataclass(frozen=True)
class Related(Stream):
    """Scenes of two objects side by side, the first on the left, or one over the other, the first above.

    Attributes:
        relation: what captions say between them.
        axis: 0 side by side, 1 one over the other.
        reverse: the first is on the right, or below, instead.
        examples: scenes to learn from, a few pairs in turn; else pairs of objects that are in none of those.
    """

    relation: str = "and"
    axis: int = 0
    reverse: bool = False
    examples: bool = False

    def scene(self, index: int) -> scenes.Scene:
        rng, pairs = random.Random(self.first + index), example_pairs()
        taken = {thing for pair in pairs for thing in pair}
        while True:
            plan = scenes.draw_plan(rng, pair=True)
            if self.examples:
                things = pairs[index % len(pairs)]
                plan = scenes.Scene(plan.caption, plan.background, plan.shade, _as_others(plan.placed, things))
            one, other = plan.placed
            apart = (other.x - one.x, other.y - one.y)[self.axis]
            free = self.examples or not taken & {one.thing, other.thing}
            if apart > APART and free:
                caption = f"{one.thing.phrase} {self.relation} {other.thing.phrase}"
                placed = _as_others((other, one), (one.thing, other.thing)) if self.reverse else plan.placed
                return scenes.Scene(caption, plan.background, plan.shade, placed)


def _as_others(placed: Sequence[scenes.Placed], things: Sequence[scenes.Thing]) -> tuple[scenes.Placed, ...]:
    pairs = zip(placed, things, strict=True)
    return tuple(scenes.Placed(thing, item.x, item.y, item.size, item.mirrored) for item, thing in pairs)


@functools.cache
def example_pairs() -> tuple[tuple[scenes.Thing, scenes.Thing], ...]:
    """The pairs to learn from: ten objects, spread over the list."""
    chosen = random.Random(EXAMPLES.first).sample(scenes.things(), 2 * EXAMPLE_PAIRS)
    return tuple(zip(chosen[::2], chosen[1::2], strict=True))


EXAMPLES = Related("inversion-examples", 730_000_000, examples=True)
FIRST, SHEET_FIRST = 430_000_000, 630_000_000  # the same scenes and noise for bare captions and for the word


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and the contact sheet written on the way.

    Raises:
        OSError, ValueError: a file is missing or does not fit; one line.
    """
    work, count, axis = Path(options.work), options.count, AXES[options.relation]
    word = Embedding.load(options.embedding or mini.embedding_paths()[0])
    eye = LiteFeatures(load_lite().to(options.device), options.grain)
    device = torch.device(options.device)
    pipe = OneStepPipeline.from_pretrained(options.model, device=device, dtype="fp32", lorad=[], embeddings=word)
    kinds = Real(), Rough(pipe, bfloat16=not options.float32)
    single = distances.prototypes(work, eye, options.study, distances.SINGLE, *kinds)

    def looked_at(source: Source, name: str, relation: str = "and", reverse: bool = False) -> dict[str, float]:
        stream = Related(f"inversion-{name}", FIRST, relation=relation, axis=axis, reverse=reverse)

        def look(images: Tensor, rows: range) -> Tensor:
            found, place = located(eye, single, images, grain_seeds(stream, rows), stream.shown(rows))
            return torch.from_numpy(np.concatenate([found[:, None], place.reshape(len(place), -1)], axis=1).astype(np.float32))

        kind = f"windows-{len(STARTS)}-rough-{options.study}-grain-{eye.grain:g}"
        return figures(measured(work, source, stream, count, kind, look), axis)

    sets = {"real": looked_at(Real(), "real"), "real, reversed": looked_at(Real(), "reversed", reverse=True)}
    one = {"pipe": pipe, "batch": options.batch, "bfloat16": not options.float32}
    many = {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}
    shown: dict[str, list[Any]] = {}
    lorad = options.lorad or mini.lorad_path()
    students = {report.student_at(strength): ([(lorad, strength)], {}) for strength in options.strengths}
    for who, (one_step, how) in {"teacher": ([], many), **students}.items():
        source = Generated(**one, **how, name=who)
        for what, relation, learned in ((report.BARE, "and", []), ("token", word.token, options.adapters)):
            pipe.set_lorad([*one_step, *learned])
            sets[f"{who}, {what}"] = looked_at(source, what, relation)
            stream = Related(f"sheet-inversion-{what}", SHEET_FIRST, relation=relation, axis=axis)
            shown[f"{who}, {what}"] = to_pictures(images_of(work, source, stream, SHEET_ROWS))
    captions = stream.captions(range(SHEET_ROWS))
    rows = list(zip(*shown.values(), strict=True))
    report.write_picture(Path(options.output) / "mini-inversion.png", contact_sheet(rows, captions, list(shown)))
    return {
        **report.origin("inversion", options.words),
        "method": {"relation": RELATIONS[options.relation], **METHOD},
        "settings": {
            "relation": options.relation,
            "adapters": [Path(path).name for path in options.adapters],
            "word": {"file": word.name, "token": word.token, "vectors": len(word.vectors), "sha256": word.sha256, **word.extra},
            **report.how(options),
        },
        "seeds": {"examples": EXAMPLES.first, "pictures": FIRST, "sheet": SHEET_FIRST},
        "sets": sets,
        "gains": report.gains(sets, ["true", "placed"]),
        "targets": TARGETS,
    }


def figures(found: np.ndarray, axis: int = 0) -> dict[str, float]:
    """Shares of a set from rows of (both objects found, column and row of the first, column and row of the second)."""
    both, apart = found[:, 0] > 0, found[:, 3 + axis] - found[:, 1 + axis]
    before, after = apart >= WINDOWS_APART, apart <= -WINDOWS_APART
    return {
        "found": float(both.mean()),
        "true": float((both & before).mean()),
        "reversed": float((both & after).mean()),
        "placed": float(before.mean()),
        "placed_reversed": float(after.mean()),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--examples", metavar="DIR", help="write the pictures to learn from into this folder, and leave")
    add("--relation", choices=AXES, default="left-of", help="of the first object to the second (default: left-of)")
    add("--word", help="that their captions say (default: the relation in angle brackets)")
    add("--embedding", metavar="FILE", help="the learned word (default: the one in the package)")
    add("--adapters", nargs="+", default=[], metavar="FILE", help="LoRaDs that were learned beside the word")
    add("--strengths", nargs="+", type=float, default=STRENGTHS, metavar="S", help="of the one-step LoRaD (default: 1 0.8)")
    add("--count", type=int, default=500, help="pictures of each set (default: 500)")
    report.add_options(parser)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    take_any_text()
    parser = _parser()
    options = report.read_options(parser, words)

    def act() -> str:
        if options.examples:
            word, axis = options.word or f"<{options.relation}>", AXES[options.relation]
            stream = replace(EXAMPLES, relation=word, axis=axis)
            write_examples(stream, EXAMPLE_PAIRS * EXAMPLES_EACH, Path(options.examples))
            return f"{options.examples}: {EXAMPLE_PAIRS * EXAMPLES_EACH} pictures\n"
        found = measure(options)
        report.write_json(Path(options.output) / "mini-inversion.json", found)
        return report.table("inversion", found["sets"]) + report.table("gains", found["gains"])

    return report.ended("inversion", options.debug, act)


if __name__ == "__main__":
    sys.exit(main())
