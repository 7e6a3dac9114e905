"""Whether a relation that was learned for the multi-step teacher is understood by the one-step student as well.

    python benchmarks/inversion.py --examples runs/left-of                 ten pictures to learn "left of" from
    python trainer/invert.py --config trainer/configs/invert-mini.yaml
    python benchmarks/inversion.py --embedding runs/invert-mini/left-of.safetensors

Captions of wadi-mini never name left or right. The word is learned from five pairs of objects and measured on pairs of
others. Writes ``mini-inversion.json`` (every figure, count and seed) and ``mini-inversion.png`` (the same pairs and
noise side by side, not chosen by eye). A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks import report, ruler
from benchmarks.places import STARTS, WINDOW, columns
from benchmarks.rough import Rough
from benchmarks.sets import Generated, Real, Source, grain_seeds, images_of, measured
from benchmarks.streams import Stream
from trainer.efficientnet import load_lite
from trainer.features import Eye
from trainer.mini import scenes
from trainer.watch import contact_sheet
from wadi_core import OneStepPipeline, mini
from wadi_core.embeddings import Embedding
from wadi_core.files import atomic_write
from wadi_core.pictures import save, to_pictures

EXAMPLE_PAIRS, EXAMPLES_EACH = 5, 2
APART = 40  # pixels between the centres of two objects that stand side by side
SHEET_ROWS = 10
TARGETS = {"student_over_teacher_gain": 0.8}
METHOD = {
    "relation": "the first object is to the left of the second; captions of the training data name neither side",
    "examples": f"{EXAMPLE_PAIRS * EXAMPLES_EACH} scenes of {EXAMPLE_PAIRS} pairs, none of whose objects is measured",
    "bare": "captions A and B",
    "token": "captions A <word> B",
    "found": "share of pictures of which the two likeliest objects are the caption's",
    "place": f"an object is in the column of the window ({WINDOW} of 128 pixels, edges at {STARTS}) most like it",
    "true": "share of pictures with both objects found, and the first in a column left of the second's",
    "reversed": "the same with the first right of the second",
    "gain": "true with the word less true with the bare caption, of the same network and noise",
    "real": "real scenes with the relation, and with its reverse: how far the rule can be trusted",
}


@dataclass(frozen=True)
class Related(Stream):
    """Scenes of two objects side by side, the first on the left.

    Attributes:
        relation: what captions say between them.
        reverse: the first is on the right instead.
        examples: scenes to learn from, a few pairs in turn; else pairs of objects that are in none of those.
    """

    relation: str = "and"
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
            apart = (one.x - other.x) if self.reverse else (other.x - one.x)
            free = self.examples or not taken & {one.thing, other.thing}
            if apart > APART and free:
                caption = f"{one.thing.phrase} {self.relation} {other.thing.phrase}"
                return scenes.Scene(caption, plan.background, plan.shade, plan.placed)


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


def write_examples(folder: Path, word: str) -> int:
    """Write the pictures to learn from, each with its caption; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    count = EXAMPLE_PAIRS * EXAMPLES_EACH
    for index in range(count):
        plan = Related(EXAMPLES.name, EXAMPLES.first, examples=True, relation=word).scene(index)
        save(scenes.draw(plan), folder / f"{index:02d}.png")
        with atomic_write(folder / f"{index:02d}.txt") as file:
            file.write(f"{plan.caption}\n".encode())
    return count


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and the contact sheet written on the way.

    Raises:
        OSError, ValueError: a file is missing or does not fit; one line.
    """
    work, count = Path(options.work), options.count
    word = Embedding.load(options.embedding or mini.embedding_paths()[0])
    eye = Eye(load_lite().to(options.device), options.grain)
    device = torch.device(options.device)
    pipe = OneStepPipeline.from_pretrained(options.model, device=device, dtype="fp32", lorad=[], embeddings=word)
    judge = ruler.Judge.learn(work, eye, options.study, Rough(pipe, bfloat16=not options.float32))

    def looked_at(source: Source, stream: Related) -> dict[str, float]:
        def look(images: Tensor, rows: range) -> Tensor:
            shown, seeds = stream.shown(rows), grain_seeds(stream, rows)
            hits = judge.pair.hits(eye(images, seeds).numpy(), shown)
            place = columns(eye, judge.single, images, seeds, shown)
            return torch.from_numpy(np.concatenate([hits[:, None], place], axis=1).astype(np.float32))

        return figures(measured(work, source, stream, count, f"places-rough-{options.study}-grain-{eye.grain:g}", look))

    sets = {
        "real": looked_at(Real(), Related("inversion-real", FIRST)),
        "real, reversed": looked_at(Real(), Related("inversion-reversed", FIRST, reverse=True)),
    }
    one = {"pipe": pipe, "batch": options.batch, "bfloat16": not options.float32}
    many = {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}
    shown: dict[str, list[Any]] = {}
    for who, how in (("teacher", many), ("student", {})):
        pipe.set_lorad(None if who == "teacher" else options.lorad or mini.lorad_path())
        source = Generated(**one, **how, name=who)
        for what, relation in (("bare", "and"), ("token", word.token)):
            sets[f"{who}, {what}"] = looked_at(source, Related(f"inversion-{what}", FIRST, relation=relation))
            drawn = images_of(work, source, Related(f"sheet-inversion-{what}", SHEET_FIRST, relation=relation), SHEET_ROWS)
            shown[f"{who}, {what}"] = to_pictures(drawn)
    captions = Related("sheet", SHEET_FIRST, relation=word.token).captions(range(SHEET_ROWS))
    titles = {"teacher": f"teacher, {options.steps} steps", "student": "student, 1 step"}
    heads = [f"{titles[who]}, {what}" for who, _, what in (name.partition(", ") for name in shown)]
    rows = list(zip(*shown.values(), strict=True))
    report.write_picture(Path(options.output) / "mini-inversion.png", contact_sheet(rows, captions, heads))
    return {
        **report.origin("inversion", options.words),
        "method": METHOD,
        "settings": {
            "word": {"file": word.name, "token": word.token, "vectors": len(word.vectors), "sha256": word.sha256, **word.extra},
            **report.how(options),
        },
        "seeds": {"examples": EXAMPLES.first, "pictures": FIRST, "sheet": SHEET_FIRST},
        "sets": sets,
        "gains": gains(sets),
        "targets": TARGETS,
    }


def figures(found: np.ndarray) -> dict[str, float]:
    """Shares of a set from rows of (objects found, column of the first, column of the second)."""
    both = found[:, 0] == 2
    return {
        "found": float(both.mean()),
        "true": float((both & (found[:, 1] < found[:, 2])).mean()),
        "reversed": float((both & (found[:, 1] > found[:, 2])).mean()),
    }


def gains(sets: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the word gains each of them, and the student's share of the teacher's gain, where the teacher has one."""
    found = {f"{who}_gain": sets[f"{who}, token"]["true"] - sets[f"{who}, bare"]["true"] for who in ("teacher", "student")}
    if found["teacher_gain"] > 0:
        found["student_over_teacher_gain"] = found["student_gain"] / found["teacher_gain"]
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--examples", metavar="DIR", help="write the pictures to learn from into this folder, and leave")
    add("--word", default="<left-of>", help="that their captions say (default: <left-of>)")
    add("--embedding", metavar="FILE", help="the learned word (default: the one in the package)")
    add("--count", type=int, default=500, help="pictures of each set (default: 500)")
    report.add_options(parser)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = _parser()
    options = report.read_options(parser, words)

    def act() -> str:
        if options.examples:
            return f"{options.examples}: {write_examples(Path(options.examples), options.word)} pictures\n"
        found = measure(options)
        report.write_json(Path(options.output) / "mini-inversion.json", found)
        return report.table("inversion", found["sets"]) + "".join(f"{k}: {v:.3f}\n" for k, v in found["gains"].items())

    return report.ended("inversion", options.debug, act)


if __name__ == "__main__":
    sys.exit(main())
