"""Whether a style that was learned for the multi-step teacher is drawn by the one-step student as well: LoRaD and LoRA.

    python benchmarks/personal.py --set EMOJI --examples runs/personal     ten pictures in another emoji set
    python trainer/personalize.py --config trainer/configs/personalize-mini.yaml output=runs/style-lorad
    python trainer/personalize.py --config trainer/configs/personalize-mini.yaml output=runs/style-lora adapter=lora rank=N
    python benchmarks/personal.py --set EMOJI --adapters runs/style-*/personal.safetensors

EMOJI is a folder of pictures with a transparent background, called by code point (``1f98a.png``, ``emoji_u1f98a.png``)
or by name (``fox.png``): Twemoji's and Fluent Emoji's packages have such folders. With --examples it also says which
rank gives a LoRA as many parameters. The style is measured on objects that were not among the examples. Writes
``mini-personal.json`` and ``mini-personal.png`` (the same captions and noise side by side, not chosen by eye).
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
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import report
from benchmarks.retrieval import Prototypes
from benchmarks.rough import Rough
from benchmarks.sets import Generated, feature_set, images_of
from benchmarks.streams import Stream
from trainer.efficientnet import load_lite
from trainer.features import Eye
from trainer.mini import scenes
from trainer.mini.vae import to_tensor
from trainer.picture_files import fingerprint
from trainer.watch import contact_sheet
from wadi_core import LoRaD, OneStepPipeline, mini
from wadi_core import base as bases
from wadi_core.files import atomic_write, refusal
from wadi_core.lorad.checkpoint import read_header, read_tensors
from wadi_core.lorad.layers import adapter_key, linear_shapes, student_layers
from wadi_core.pictures import save, to_pictures

EXAMPLES = 10
FEWEST = 3 * EXAMPLES  # objects that both sets have
EXAMPLE_SEED, FIRST, SHEET_FIRST, STUDY = 740_000_000, 440_000_000, 640_000_000, 140_000_000
SHEET_ROWS = 8
OWN, OTHER = 0, 1  # the two styles
TARGETS = {"student_over_teacher_gain": 0.8}
METHOD = {
    "style": "another set of emoji; one object a picture, drawn by the same rules as wadi-mini's own scenes",
    "examples": f"{EXAMPLES} scenes of {EXAMPLES} objects; those measured are others",
    "in_style": "share of pictures nearer to the other set than to wadi-mini's own, by prototypes of both styles",
    "prototypes": "from real scenes of both sets, as they are drawn and roughly painted",
    "object": "share of pictures whose likeliest object is the caption's, by prototypes of the objects in both styles",
    "both": "share of pictures that are right in both",
    "gain": "both with the adapter less both without it, of the same network, captions and noise",
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
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder of emoji")
        files = {_plain(path.stem): path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".png", ".webp")}
        self.folder, self.files = folder, {}
        for thing in scenes.things():
            for name in (_points(thing.character), _plain(thing.name)):
                if name in files:
                    self.files.setdefault(thing.character, files[name])
        if len(self.files) < FEWEST:
            raise refusal(folder, f"{len(self.files)} of wadi-mini's objects are in this folder, {FEWEST} are needed")
        self._pictures: dict[str, Image.Image] = {}

    @cached_property
    def things(self) -> tuple[scenes.Thing, ...]:
        """The objects that both sets have."""
        return tuple(thing for thing in scenes.things() if thing.character in self.files)

    @cached_property
    def examples(self) -> tuple[scenes.Thing, ...]:
        """The objects to learn from."""
        return tuple(random.Random(EXAMPLE_SEED).sample(self.things, EXAMPLES))

    @cached_property
    def others(self) -> tuple[scenes.Thing, ...]:
        """The objects to measure on."""
        return tuple(thing for thing in self.things if thing not in self.examples)

    def stamp(self, character: str) -> Image.Image:
        """An object as RGBA, cropped to what is drawn."""
        if character not in self._pictures:
            with Image.open(self.files[character]) as picture:
                drawn = picture.convert("RGBA")
            self._pictures[character] = drawn.crop(drawn.getchannel("A").getbbox())
        return self._pictures[character]


def _plain(name: str) -> str:
    """A file's or an object's name without what programs put around it."""
    return name.lower().removeprefix("emoji_u").removeprefix("u+").replace("_", "-").replace(" ", "-").replace("-fe0f", "")


def _points(character: str) -> str:
    return "-".join(f"{ord(sign):x}" for sign in character if sign != "\ufe0f")


@dataclass(frozen=True)
class Styled(Stream):
    """Scenes of single objects in turn; captions name the object and nothing else.

    Attributes:
        things: the objects.
    """

    things: tuple[scenes.Thing, ...] = ()

    def scene(self, index: int) -> scenes.Scene:
        plan = scenes.scene(self.first + index, pair=False, only=self.things[index % len(self.things)])
        return replace(plan, caption=plan.placed[0].thing.phrase)

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"things": [thing.index for thing in self.things]}


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


def write_examples(emoji: EmojiSet, folder: Path) -> None:
    """Write the pictures to learn from, each with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = Styled("personal-examples", EXAMPLE_SEED, things=emoji.examples)
    for index in range(EXAMPLES):
        plan = stream.scene(index)
        save(scenes.draw(plan, stamp_of=emoji.stamp), folder / f"{index:02d}.png")
        with atomic_write(folder / f"{index:02d}.txt") as file:
            file.write(f"{plan.caption}\n".encode())


def equal_rank(network: torch.nn.Module, rank: int) -> tuple[int, int, int]:
    """The rank at which a LoRA has about as many parameters as a LoRaD of this rank, and both numbers of parameters."""
    shapes = linear_shapes(network)
    layers = [shapes[path] for path in student_layers(network)]
    ours, theirs = sum(out + width // 2 for out, width in layers), sum(out + width for out, width in layers)
    found = max(1, round(rank * ours / theirs))
    return found, rank * ours, found * theirs


@contextmanager
def adapted(pipe: OneStepPipeline, adapter: Path | None, lorad: Path | None) -> Iterator[int]:
    """The pipeline with a one-step LoRaD and a personal LoRaD or LoRA, as far as they are given; how many parameters.

    Rotations first, then what a LoRA adds.
    """
    tensors = {} if adapter is None else read_tensors(read_header(adapter))
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(".alpha"))
    plain = any(name.endswith(".lora_up.weight") for name in tensors)
    stack = [path for path in (lorad, None if plain else adapter) if path is not None]
    pipe.set_lorad(stack or None)
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


def judges(
    options: argparse.Namespace, emoji: EmojiSet, eye: Eye, pipe: OneStepPipeline, own: Drawn, other: Drawn
) -> tuple[Prototypes, Prototypes]:
    """Prototypes of the objects and of the two styles, each from real scenes of both sets, clean and rough.

    Without the rough ones a generated picture is taken for the style whose details are missing, whichever that is.
    """
    study = Styled("personal-study", STUDY, things=emoji.things)
    known = []
    for drawn in (own, other):
        rough = Rough(pipe, f"rough-{drawn.name}", not options.float32, drawn.stamp_of, drawn.digest)
        known += [feature_set(Path(options.work), eye, source, study, options.study) for source in (drawn, rough)]
    objects = study.shown(range(options.study)) * len(known)
    features, styles = np.concatenate(known), [(style,) for style in (OWN, OTHER) for _ in range(2 * options.study)]
    return Prototypes.fit(features, _numbered(objects, emoji), len(emoji.things)), Prototypes.fit(features, styles, 2)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and the contact sheet written on the way.

    Raises:
        OSError, ValueError: a file is missing or does not fit; one line.
    """
    work, count, emoji = Path(options.work), options.count, EmojiSet(Path(options.set))
    eye = Eye(load_lite().to(options.device), options.grain)
    own, other = Drawn(scenes.glyph, "own"), Drawn(emoji.stamp, "other", fingerprint(list(emoji.files.values())))
    device = torch.device(options.device)
    pipe = OneStepPipeline(bases.load(options.model, device, torch.float32), device, torch.float32)
    things, styles = judges(options, emoji, eye, pipe, own, other)

    def figures(features: np.ndarray, stream: Styled, style: int = OTHER) -> dict[str, float]:
        wanted = np.array(_numbered(stream.shown(range(count)), emoji))[:, 0]
        right, fits = things.name(features)[:, 0] == wanted, styles.name(features)[:, 0] == style
        return {"in_style": float(fits.mean()), "object": float(right.mean()), "both": float((right & fits).mean())}

    real = Styled("personal-real", FIRST, things=emoji.others)
    sets = {
        "real": figures(feature_set(work, eye, other, real, count), real),
        "real, own set": figures(feature_set(work, eye, own, real, count), real, OWN),
    }
    asked = Styled("personal", FIRST, things=emoji.others)
    sheet = Styled("sheet-personal", SHEET_FIRST, things=emoji.others)
    shown: dict[str, list[Any]] = {"the other set": to_pictures(other.images(sheet, range(SHEET_ROWS)))}
    one = {"pipe": pipe, "batch": options.batch, "bfloat16": not options.float32}
    many = {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}
    one_step = Path(options.lorad) if options.lorad else mini.lorad_path()
    parameters = {}
    for who, how, lorad in (("teacher", many, None), ("student", {}, one_step)):
        for name, path in {"bare": None, **_named(options.adapters)}.items():
            with adapted(pipe, path, lorad) as own_parameters:
                source = Generated(**one, **how, name=f"{who}-{name}")
                sets[f"{who}, {name}"] = figures(feature_set(work, eye, source, asked, count), asked)
                shown[f"{who}, {name}"] = to_pictures(images_of(work, source, sheet, SHEET_ROWS))
                parameters[name] = own_parameters
    rows = list(zip(*shown.values(), strict=True))
    captions = sheet.captions(range(SHEET_ROWS))
    report.write_picture(Path(options.output) / "mini-personal.png", contact_sheet(rows, captions, list(shown)))
    return {
        **report.origin("personal", options.words),
        "method": METHOD,
        "settings": {
            "set": emoji.folder.name,
            "objects_in_both_sets": len(emoji.things),
            "parameters": {name: number for name, number in parameters.items() if number},
            "steps": {name: _steps(path) for name, path in _named(options.adapters).items()},
            **report.how(options),
        },
        "seeds": {"examples": EXAMPLE_SEED, "study": STUDY, "pictures": FIRST, "sheet": SHEET_FIRST},
        "sets": sets,
        "gains": gains(sets),
        "targets": TARGETS,
    }


def _numbered(shown: Sequence[Sequence[int]], emoji: EmojiSet) -> list[tuple[int, ...]]:
    """Objects by their place among those that both sets have."""
    place = {thing.index: number for number, thing in enumerate(emoji.things)}
    return [tuple(place[index] for index in indices) for indices in shown]


def _named(paths: Sequence[str]) -> dict[str, Path]:
    """Adapters by their kind: ``LoRaD`` or ``LoRA``, numbered where there are several."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        names = read_header(path).places
        kind = "LoRaD" if any(name.endswith(".lorad_a") for name in names) else "LoRA"
        if kind == "LoRaD" and LoRaD.load(path).one_step is not None:
            raise refusal(path, "this is a one-step LoRaD: a style is an ordinary adapter")
        if kind == "LoRA" and not any(name.endswith(".lora_up.weight") for name in names):
            raise refusal(path, "this is neither a LoRaD nor a LoRA")
        found[kind if kind not in found else f"{kind} {len(found) + 1}"] = path
    return found


def _steps(path: Path) -> int:
    return int(read_header(path).metadata.get("ss_steps", 0))


def gains(sets: dict[str, dict[str, float]]) -> dict[str, float]:
    """What each adapter gains teacher and student, and the student's share of the teacher's gain."""
    found = {}
    for key in sets:
        who, _, name = key.partition(", ")
        if who == "teacher" and name != "bare":
            gain = {
                which: sets[f"{which}, {name}"]["both"] - sets[f"{which}, bare"]["both"] for which in ("teacher", "student")
            }
            found |= {f"{which}_gain, {name}": value for which, value in gain.items()}
            if gain["teacher"] > 0:
                found[f"student_over_teacher_gain, {name}"] = gain["student"] / gain["teacher"]
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--set", required=True, metavar="DIR", help="pictures of another emoji set")
    add("--examples", metavar="DIR", help="write the pictures to learn from into this folder, and leave")
    add("--rank", type=int, default=8, help="of the LoRaD, to say which a LoRA is to have (default: 8)")
    add("--adapters", nargs="+", default=[], metavar="FILE", help="what was learned: LoRaDs and LoRAs")
    add("--count", type=int, default=1000, help="pictures of each set (default: 1000)")
    report.add_options(parser)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = _parser()
    options = report.read_options(parser, words)
    if not options.examples and not options.adapters:
        parser.error("--examples DIR or --adapters FILE ... is needed")

    def act() -> str:
        if options.examples:
            write_examples(EmojiSet(Path(options.set)), Path(options.examples))
            base = bases.load(options.model, torch.device("cpu"), torch.float32)
            lora, ours, theirs = equal_rank(base.unet, options.rank)
            said = f"LoRaD of rank {options.rank}: {ours:,} parameters; LoRA of rank {lora}: {theirs:,}"
            return f"{options.examples}: {EXAMPLES} pictures\n{said}\n"
        found = measure(options)
        report.write_json(Path(options.output) / "mini-personal.json", found)
        return report.table("personal", found["sets"]) + "".join(f"{k}: {v:.3f}\n" for k, v in found["gains"].items())

    return report.ended("personal", options.debug, act)


if __name__ == "__main__":
    sys.exit(main())
