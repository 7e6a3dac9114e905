"""Whether a thing that was learned for the multi-step teacher is drawn by the one-step student as well: LoRaD and LoRA.

    python benchmarks/quality/personal.py --set EMOJI [key=value ...]

EMOJI is a folder of pictures with a transparent background, called by code point (``1f98a.png``, ``emoji_u1f98a.png``)
or by name (``fox.png``): Twemoji's and Fluent Emoji's packages have such folders. A few of wadi-mini's objects are
learned as that set draws them ("a sks fox"), each from ten pictures, by ``trainer/personalize.py`` with
``personalize-mini.yaml`` and whatever settings are added, as a LoRaD and as a LoRA with as many parameters. Writes
``mini-personal.json`` and ``mini-personal.png`` (the same captions and noise side by side, not chosen by eye). A run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import report
from benchmarks.quality.degraded_scenes import Rough
from benchmarks.quality.openings import bare_pipeline, opened
from benchmarks.quality.sets import Generated, feature_set, images_of
from benchmarks.quality.streams import Stream, write_examples
from trainer.data.picture_files import fingerprint, pictures_in
from trainer.evaluation.features import LiteFeatures
from trainer.evaluation.retrieval import Prototypes
from trainer.mini import scenes
from trainer.personalize import personalize
from trainer.settings import fields as settings
from trainer.settings.finetuning import PersonalizeConfig
from wadi_core import OneStepPipeline, images, mini
from wadi_core.files import refusal
from wadi_core.lorad.checkpoint import read_header, read_tensors
from wadi_core.lorad.layers import adapter_key, linear_shapes, student_layers
from wadi_core.pictures import to_pictures, to_tensor
from wadi_core.sheets import contact_sheet

PRESET = Path(__file__).resolve().parents[2] / "trainer" / "configs" / "personalize-mini.yaml"
EXAMPLES, SUBJECTS, WORD = 10, 4, "sks"
FEWEST = 30  # objects that both sets have
CHOICE_SEED, EXAMPLE_SEED, FIRST, SHEET_FIRST, STUDY = 740_000_000, 741_000_000, 440_000_000, 640_000_000, 140_000_000
SHEET_ROWS = 2  # of each subject
SEEDS_EACH = 100_000  # between the scenes of two subjects
# Learning rates for the preset's Muon: the best that were tried for each kind of student.
RATES = {"lorad": 1.5e-2, "lora": 6e-3}
NAMES = {"lorad": "LoRaD", "lora": "LoRA"}
OWN, OTHER = 0, 1  # the two sets of drawings
STRENGTHS = (1.0, 0.7, 0.0)  # of the one-step LoRaD beside what was learned; at 0 it is the teacher in one step
TARGETS = {"both_over_teacher": 0.8}
METHOD = {
    "subjects": f"objects that wadi-mini knows, as another set of emoji draws them; called by {WORD!r}, which no caption says",
    "examples": f"{EXAMPLES} scenes of each",
    "captions": "as those of wadi-mini's scenes, every second one with the background; those measured of other scenes",
    "judge": "likeliest of all objects of both sets, by prototypes of real scenes as they are drawn and roughly painted",
    "in_style": "share of pictures whose likeliest object is of the other set",
    "object": "share of pictures whose likeliest object is the caption's, of either set",
    "both": "share of pictures whose likeliest object is the caption's of the other set",
    "student at 0.7": "with the one-step LoRaD at this strength; what was learned stays at 1",
    "both_gain": "both with the adapter less both without it, of the same network, captions and noise",
    "both_over_teacher": "a student's gain over the teacher's",
    "real": "real scenes of either set that the prototypes were not made from: how far they can be trusted",
}


class EmojiSet:
    """Pictures of another emoji set.

    Args:
        folder: of the pictures.

    Raises:
        OSError: there is no such folder. ValueError: too few of its pictures are known objects. Both with one line.
    """

    def __init__(self, folder: Path) -> None:
        files = {_plain(path.stem): path for path in pictures_in(folder)}
        self.folder, self.files = folder, {}
        for thing in scenes.things():
            for name in (scenes.code_points(thing.character), _plain(thing.name)):
                if name in files:
                    self.files.setdefault(thing.character, files[name])
        if len(self.files) < FEWEST:
            raise refusal(folder, f"{len(self.files)} of wadi-mini's objects are in this folder, {FEWEST} are needed")
        self._pictures: dict[str, Image.Image] = {}

    @cached_property
    def things(self) -> tuple[scenes.Thing, ...]:
        """The objects that both sets have."""
        return tuple(thing for thing in scenes.things() if thing.character in self.files)

    def subjects(self, names: Sequence[str] = ()) -> tuple[scenes.Thing, ...]:
        """The objects to learn: those of these names, or some by chance.

        Raises:
            ValueError: a name is none of the objects in both sets; one line.
        """
        if not names:
            one = [thing for thing in self.things if thing.phrase != thing.name]  # neither "socks" nor "santa claus"
            return tuple(random.Random(CHOICE_SEED).sample(one, SUBJECTS))
        known = {thing.name: thing for thing in self.things}
        if lost := [name for name in names if name not in known]:
            raise refusal(self.folder, f"{lost[0]!r} is none of the objects that wadi-mini knows and this folder has")
        return tuple(known[name] for name in names)

    def stamp(self, character: str) -> Image.Image:
        """An object as RGBA, cropped to what is drawn."""
        if character not in self._pictures:
            drawn = images.opened(self.files[character]).convert("RGBA")
            self._pictures[character] = drawn.crop(drawn.getchannel("A").getbbox())
        return self._pictures[character]


def _plain(name: str) -> str:
    """A file's or an object's name without what programs put around it."""
    return name.lower().removeprefix("emoji_u").removeprefix("u+").replace("_", "-").replace(" ", "-").replace("-fe0f", "")


@dataclass(frozen=True)
class Each(Stream):
    """Scenes of single objects in turn; captions name the object and nothing else.

    Attributes:
        things: the objects.
    """

    things: tuple[scenes.Thing, ...] = ()

    def scene(self, index: int) -> scenes.Scene:
        return scenes.scene(self.first + index, pair=False, only=self.things[index % len(self.things)])

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"things": [thing.index for thing in self.things]}


@dataclass(frozen=True)
class Called(Stream):
    """Scenes of one object, in whose captions the word that is learned for it stands before its name.

    Attributes:
        thing: the object.
    """

    thing: scenes.Thing | None = None

    def scene(self, index: int) -> scenes.Scene:
        plan = scenes.scene(self.first + index, pair=False, only=self.thing)
        return replace(plan, caption=called(plan.caption, self.thing))

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"thing": self.thing.index, "word": WORD}


def called(caption: str, thing: scenes.Thing) -> str:
    """A caption with the word before the object's name."""
    return caption.replace(thing.name, f"{WORD} {thing.name}", 1)


@dataclass(frozen=True)
class Drawn:
    """Scenes with the objects of a set.

    Attributes:
        stamp_of: a character's picture.
        name: for people.
        digest: of the set's pictures.
    """

    stamp_of: Callable[[str], Image.Image]
    name: str
    digest: str = ""

    def recipe(self) -> dict[str, Any]:
        return {"source": "drawn", "digest": self.digest}

    def images(self, stream: Stream, rows: range) -> Tensor:
        """(n, 3, h, w) in [-1, 1]."""
        return to_tensor([scenes.draw(stream.scene(index), stamp_of=self.stamp_of) for index in rows])


def learned(options: argparse.Namespace, emoji: EmojiSet, thing: scenes.Thing, kind: str, rank: int) -> Path:
    """The adapter of an object, which is trained if it is not there yet; goes on where it was stopped.

    Raises:
        OSError, ValueError: settings or files are wrong; one line.
    """
    name, place = f"{WORD}-{_plain(thing.name)}", Path(options.learn)
    examples, output = place / "examples" / name, place / kind / name
    words = [f"base={options.model}", f"lorad={_student(options)}", f"pictures={examples}", f"output={output}"]
    words += [f"name={name}", f"adapter={kind}", f"rank={rank}", f"lr={RATES[kind]:g}"]
    words += [f"sheet_prompts=[{called(thing.phrase, thing)}, {thing.phrase}]"]
    config = settings.load(PersonalizeConfig, PRESET, [*words, *options.settings])
    # A run that was stopped has written its file too: the last step tells that it came to its end.
    last = output / f"step-{config.steps:08d}.pt"
    if not last.is_file():
        stream = Called("personal-examples", EXAMPLE_SEED + SEEDS_EACH * thing.index, thing=thing)
        write_examples(stream, EXAMPLES, examples, emoji.stamp)
        personalize(config)
    if not last.is_file():
        raise OSError(f"{output}: this run was stopped; the same command goes on with it")
    return output / f"{name}.safetensors"


def _student(options: argparse.Namespace) -> Path:
    return Path(options.lorad) if options.lorad else mini.lorad_path()


def equal_rank(network: torch.nn.Module, rank: int) -> tuple[int, int, int]:
    """The rank at which a LoRA has about as many parameters as a LoRaD of this rank, and both numbers of parameters."""
    shapes = linear_shapes(network)
    layers = [shapes[path] for path in student_layers(network)]
    ours, theirs = sum(out + width // 2 for out, width in layers), sum(out + width for out, width in layers)
    found = max(1, round(rank * ours / theirs))
    return found, rank * ours, found * theirs


@contextmanager
def adapted(pipe: OneStepPipeline, adapter: Path | None, *lorad: tuple[Path, float]) -> Iterator[int]:
    """The pipeline with a one-step LoRaD at some strength and a personal LoRaD or LoRA, as far as they are given.

    Rotations first, then what a LoRA adds. Gives how many parameters the personal one has.
    """
    tensors = {} if adapter is None else read_tensors(read_header(adapter))
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(".alpha"))
    plain = any(name.endswith(".lora_up.weight") for name in tensors)
    pipe.set_lorad([*lorad, *([] if plain or adapter is None else [adapter])] or None)
    kept = {}
    try:
        for path in student_layers(pipe.base.unet) if plain else ():
            key, weight = adapter_key(path, pipe.base.architecture), pipe.base.unet.get_submodule(path).weight
            up, down = (tensors[f"{key}.lora_{part}.weight"].float() for part in ("up", "down"))
            kept[path] = weight.detach().clone()
            weight.data += (up @ down).to(weight.device) * float(tensors[f"{key}.alpha"]) / len(down)
        yield parameters
    finally:
        for path, weight in kept.items():
            pipe.base.unet.get_submodule(path).weight.data.copy_(weight)


def likeness(
    options: argparse.Namespace, emoji: EmojiSet, eye: LiteFeatures, pipe: OneStepPipeline, sets: Sequence[Drawn]
) -> Prototypes:
    """Prototypes of the objects of the first set, then of the second, from real scenes, clean and rough.

    Without the rough ones a generated picture is taken for the set whose details are missing, whichever that is.
    """
    study = Each("personal-study", STUDY, things=emoji.things)
    number = {thing.index: place for place, thing in enumerate(emoji.things)}
    asked = [number[index] for (index,) in study.shown(range(options.study))]
    features, shown = [], []
    for place, drawn in enumerate(sets):
        rough = Rough(pipe, f"rough-{drawn.name}", not options.float32, drawn.stamp_of, drawn.digest)
        for source in (drawn, rough):
            features.append(feature_set(Path(options.work), eye, source, study, options.study))
            shown += [(place * len(number) + index,) for index in asked]
    return Prototypes.fit(np.concatenate(features), shown, len(sets) * len(number))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and the contact sheet written on the way.

    Raises:
        OSError, ValueError: a file is missing or does not fit; one line.
    """
    (work, count, eye), emoji = opened(options), EmojiSet(Path(options.set))
    own, other = Drawn(scenes.glyph, "own"), Drawn(emoji.stamp, "other", fingerprint(list(emoji.files.values())))
    pipe = bare_pipeline(options.model, options.device)
    ranks = dict(zip(NAMES, (options.rank, equal_rank(pipe.base.unet, options.rank)[0]), strict=True))
    judge = likeness(options, emoji, eye, pipe, (own, other))
    one = {"pipe": pipe, "batch": options.batch, "bfloat16": not options.float32}
    many = {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}

    def figures(features: np.ndarray, thing: scenes.Thing, style: int = OTHER) -> dict[str, float]:
        style_of, object_of = np.divmod(judge.name(features)[:, 0], len(emoji.things))
        right, fits = object_of == emoji.things.index(thing), style_of == style
        return {"in_style": float(fits.mean()), "object": float(right.mean()), "both": float((right & fits).mean())}

    subjects: dict[str, dict[str, dict[str, float]]] = {}
    parameters: dict[str, int] = {}
    rows, captions = [], []
    for thing in emoji.subjects(options.subjects):
        asked, sheet = (
            Called(name, first + SEEDS_EACH * thing.index, thing=thing)
            for name, first in (("personal", FIRST), ("sheet-personal", SHEET_FIRST))
        )
        sets = subjects[thing.name] = {
            "real": figures(feature_set(work, eye, other, asked, count), thing),
            "real, own set": figures(feature_set(work, eye, own, asked, count), thing, OWN),
        }
        shown = {"the other set": to_pictures(other.images(sheet, range(SHEET_ROWS)))}
        adapters = {NAMES[kind]: learned(options, emoji, thing, kind, ranks[kind]) for kind in options.kinds}
        students = {report.student_at(strength): (strength, {}) for strength in options.strengths}
        for who, (strength, how) in {"teacher": (0.0, many), **students}.items():
            lorad = [(_student(options), strength)] if who != "teacher" else []
            for name, path in {report.BARE: None, **adapters}.items():
                with adapted(pipe, path, *lorad) as parameters[name]:
                    source = Generated(**one, **how, name=f"{who}-{name}")
                    sets[f"{who}, {name}"] = figures(feature_set(work, eye, source, asked, count), thing)
                    shown[f"{who}, {name}"] = to_pictures(images_of(work, source, sheet, SHEET_ROWS))
        rows += zip(*shown.values(), strict=True)
        captions += sheet.captions(range(SHEET_ROWS))
    report.write_picture(Path(options.output) / "mini-personal.png", contact_sheet(rows, captions, list(shown)))
    mean = means(list(subjects.values()))
    return {
        **report.origin("personal", options.words),
        "method": METHOD,
        "settings": {
            "set": emoji.folder.name,
            "objects_in_both_sets": len(emoji.things),
            "ranks": {NAMES[kind]: rank for kind, rank in ranks.items()},
            "parameters": {name: number for name, number in parameters.items() if name != report.BARE},
            "trainer": {"preset": PRESET.name, "rates": RATES, "words": options.settings},
            **report.how(options),
        },
        "seeds": {"choice": CHOICE_SEED, "examples": EXAMPLE_SEED, "study": STUDY, "pictures": FIRST, "sheet": SHEET_FIRST},
        "subjects": subjects,
        "sets": mean,
        "gains": report.gains(mean, ["both"]),
        "targets": TARGETS,
    }


def means(subjects: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Every figure's mean over the subjects."""
    return {
        name: {figure: float(np.mean([sets[name][figure] for sets in subjects])) for figure in row}
        for name, row in subjects[0].items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    add("settings", nargs="*", metavar="key=value", help="settings of trainer/personalize.py that win over the preset's")
    add("--set", required=True, metavar="DIR", help="pictures of another emoji set")
    add("--learn", default="runs/personal", metavar="DIR", help="where adapters are learned (default: runs/personal)")
    add("--subjects", nargs="+", default=[], metavar="NAME", help=f"objects to learn (default: {SUBJECTS} by chance)")
    add("--kinds", nargs="+", choices=NAMES, default=list(NAMES), help="of adapters to learn (default: both)")
    add("--rank", type=int, default=8, help="of the LoRaD; the LoRA has as many parameters (default: 8)")
    add("--strengths", nargs="+", type=float, default=STRENGTHS, metavar="S", help="of the one-step LoRaD (default: 1 0.7 0)")
    add("--count", type=int, default=60, help="pictures of each object in each way (default: 60)")
    report.add_options(parser)
    return parser


def _act(options: argparse.Namespace) -> str:
    found = measure(options)
    report.write_json(Path(options.output) / "mini-personal.json", found)
    return report.table("personal", found["sets"]) + report.table("gains", found["gains"])


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return report.run("personal", _parser(), words, _act)


if __name__ == "__main__":
    sys.exit(main())
