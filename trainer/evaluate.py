"""Measure the quality of a model's pictures: FID, KID, precision and recall against real ones, and the CLIP score.

    python trainer/evaluate.py --base sd15-folder --lorad one-step.safetensors --preset coco2014-30k --data coco
    python trainer/evaluate.py --base sd15-folder --lorad one-step.safetensors --prompts prompts.txt --real photos
    python trainer/evaluate.py --pictures made-elsewhere --real photos --extractor mini
    python trainer/evaluate.py --base mini --preset mini

Pictures and features are kept in the output folder, so a stopped run resumes. Several machines or GPUs can share the
sampling: start them with ``--shard 1/4``, ``--shard 2/4`` and so on in one output folder. A last run without
``--shard`` computes the figures. It prints a table and writes ``evaluation.json``. Nothing is downloaded; missing
files are named.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: the package's folder is this file's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "trainer"
    from wadi_core.packages import TRAINER, require

    require("evaluate", *TRAINER)

import torch
from torch import Tensor

from wadi_core import __version__, hub, pictures
from wadi_core.cli_tools import DECIMAL, adapters, named, number
from wadi_core.entries import whole
from wadi_core.files import atomic_write, one_line
from wadi_core.output import take_any_text
from wadi_core.packages import missing
from wadi_core.pipeline import find_device

from .data import picture_files
from .data.prompts import MINI, PromptList
from .data.tensor_cache import Store
from .evaluation import coco, extractors
from .evaluation.clip_score import ClipScore
from .evaluation.figures import Judgement, Reference, judge, read_statistics, write_statistics
from .evaluation.sources import LOOK_BATCH, Files, Source, features_of
from .models.generators import Generator, load_generator

if TYPE_CHECKING:
    pass

logger = logging.getLogger("wadi")

MINI_PRESET = "mini"
NO_PROMPTS = "--prompts or --preset is needed to make pictures"
MINI_COUNT = 5000


@dataclass(frozen=True)
class Prompts:
    """The prompts of an evaluation, in their order; ``key`` tells them from others."""

    lines: list[str]
    key: str


def generate(generator: Generator, prompts: Prompts, folder: Path, seed: int, batch: int, shard: tuple[int, int]) -> Files:
    """Make the pictures that are not there yet.

    Args:
        folder: they lie in one below it, whose name tells what made them.
        seed: picture i has the noise of ``seed + i``.
        batch: pictures a network call.
        shard: (k, n): only the k-th of n parts, counted from 0.

    Returns:
        All pictures of these prompts, also those that other shards will make.

    Raises:
        OSError: the disk is full or cannot be written; one line.
    """
    from tqdm import tqdm

    recipe = {"seed": seed, "prompts": prompts.key, **generator.recipe()}
    place = Store(folder, "pictures", recipe).folder
    paths = [place / f"{index:06d}.png" for index in range(len(prompts.lines))]
    left = [index for index in range(shard[0], len(paths), shard[1]) if not paths[index].exists()]
    place.mkdir(parents=True, exist_ok=True)
    with atomic_write(place / "recipe.json") as file:
        file.write((json.dumps(recipe, indent=1) + "\n").encode())
    with tqdm(total=len(range(shard[0], len(paths), shard[1])), unit="picture", desc="generate") as bar:
        bar.update(bar.total - len(left))
        for start in range(0, len(left), batch):
            part = left[start : start + batch]
            made = generator.pictures([prompts.lines[index] for index in part], [seed + index for index in part])
            for index, picture in zip(part, made, strict=True):
                pictures.save(picture, paths[index])
            bar.update(len(part))
    return Files(paths)


def clip_scores(source: Files, prompts: Sequence[str], score: ClipScore, folder: Path) -> Tensor:
    """The cosine (n,) of each picture and its prompt."""

    def look(rows: range) -> Tensor:
        parts = [range(start, min(start + LOOK_BATCH, rows.stop)) for start in range(rows.start, rows.stop, LOOK_BATCH)]
        return torch.cat([score(source.load(part, None), [prompts[row] for row in part]) for part in parts])

    recipe = {"clip": score.key, "prompts": [*prompts], **source.key(None)}
    return Store(folder, "clip", recipe).collect("scores", source.count, look)


def read_prompts(options: argparse.Namespace, preset: coco.CocoData | None) -> Prompts | None:
    """What the pictures are to show; None where nobody needs to know."""
    source, count = options.prompts, options.count
    if preset and not source:
        lines, key = preset.prompts, f"{options.preset} {PromptList(preset.prompts).digest}"
    elif source == MINI:
        from .mini import scenes
        from .mini.reference import MINI_PROMPTS

        lines = [scenes.scene(MINI_PROMPTS + row).caption for row in range(count or MINI_COUNT)]
        key = f"{MINI} {MINI_PROMPTS}"
    elif source:
        found = PromptList.read(source, options.prompt_field)
        lines, key = list(islice(found, count)), found.digest
    else:
        return None
    if count and count > len(lines):
        raise ValueError(f"--count asks for {count} pictures, and there are {len(lines)} prompts")
    return Prompts(lines[: count or None], key)


def _real(options: argparse.Namespace, preset: coco.CocoData | None) -> Source | Path:
    """The real pictures, or the file with what is known of them."""
    if options.real == MINI:
        from .mini.reference import Drawn

        return Drawn(options.count or MINI_COUNT)
    if options.real and not os.path.isdir(options.real):
        return Path(options.real)
    return Files(preset.images if preset and not options.real else picture_files.pictures_in(options.real))


def evaluate(options: argparse.Namespace) -> Judgement | None:
    """Do what the command line asks for; None where only a part of the pictures was to be made.

    Raises:
        OSError, ValueError: something is missing, damaged or does not fit; one line.
    """
    output, device = Path(options.output), find_device(options.device)
    preset = None
    if options.preset in coco.PRESETS:
        preset = coco.read(coco.PRESETS[options.preset], Path(options.data))
    prompts, real = read_prompts(options, preset), _real(options, preset)
    extractor = extractors.find(options.extractor, device, options.inception and Path(options.inception))
    # What can be wrong is found out before hours are spent on pictures.
    known = read_statistics(real, extractor, options.side) if isinstance(real, Path) else real
    score = ClipScore(options.clip, device) if options.clip else None
    if options.pictures:
        made = Files(picture_files.pictures_in(options.pictures))
        recipe: dict[str, Any] = {"pictures": Path(options.pictures).name}
        if prompts and len(prompts.lines) != made.count:
            raise ValueError(f"{options.pictures}: there are {made.count} pictures for {len(prompts.lines)} prompts")
    elif prompts is None:
        raise ValueError(NO_PROMPTS)
    else:
        generator = load_generator(
            options.base, adapters(options.lorad), options.device, options.dtype, options.size,
            options.steps, options.guidance, options.alpha_T_squared,
        )  # fmt: skip
        made = generate(generator, prompts, output, options.seed, options.batch, options.shard)
        recipe = generator.recipe()
        if options.shard[1] > 1:
            return None
    if not isinstance(known, Reference):
        features = features_of(known, "real", extractor, output, options.side).numpy()
        if options.save_statistics:
            write_statistics(Path(options.save_statistics), features, extractor, options.side)
        known = Reference(features)
    found = judge(features_of(made, "generated", extractor, output, options.side).numpy(), known, extractor.components)
    if score and prompts:
        found.figures["clip_score"] = clip_scores(made, prompts.lines, score, output).double().mean().item()
    found.settings.update(
        extractor=extractor.name, side=options.side, preset=options.preset, made_with=recipe, seed=options.seed,
        prompts=options.prompts or options.preset, clip=options.clip and Path(options.clip).name,
    )  # fmt: skip
    return found


def report(found: Judgement, words: Sequence[str]) -> dict[str, Any]:
    """An evaluation as plain values; of paths outside of this folder only the name."""
    command = [Path(word).name if os.path.isabs(word) else word for word in words]
    return {
        "command": shlex.join(["python", "trainer/evaluate.py", *command]),
        "wadi": __version__,
        "torch": torch.__version__.split("+")[0],
        "figures": found.figures,
        "notes": found.notes,
        "settings": found.settings,
    }


def as_markdown(found: Judgement) -> str:
    """The figures as a table."""
    names = {
        "fid": "FID", "kid": "KID", "kid_standard_error": "KID, standard error", "precision": "precision", "recall": "recall",
        "clip_score": "CLIP score",
    }  # fmt: skip
    if found.settings["extractor"] != "Inception v3 (torch-fidelity)":
        names["fid"] = "Fréchet distance"  # the word FID is for Inception's features alone
    shown = {names[name]: value for name, value in found.figures.items()}
    lines = ["| " + " | ".join(shown) + " |", "|---" * len(shown) + "|"]
    lines.append("| " + " | ".join(f"{value:.4g}" for value in shown.values()) + " |")
    lines += [
        "",
        f"{found.settings['generated']} pictures against {found.settings['real']}; {found.settings['extractor']}.",
        *found.notes,
    ]
    return "\n".join(lines) + "\n"


_ALPHA = "for a base that is a one-step network itself; released ones: 0.0047"


def _shard(text: str) -> tuple[int, int]:
    part, slash, count = text.partition("/")
    if not (slash and part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1/4")
    return int(part) - 1, int(count)


def _at_least(low: int) -> Callable[[str], int]:
    def reading(text: str) -> int:
        value = whole(text)
        if value < low:
            raise ValueError(f"at least {low} is needed, not {text}")
        return value

    return number(reading)


def make_parser() -> argparse.ArgumentParser:
    expects = "; ".join(f"{preset.name}: {preset.expects}" for preset in coco.PRESETS.values())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("model or pictures").add_argument
    add("--base", metavar="DIR|FILE", help="the model: a diffusers folder, a single-file checkpoint, a hub id, or mini")
    add("--lorad", action="append", metavar="FILE[:STRENGTH]", help="adapter for it; may be repeated (default: mini's own)")
    add("--pictures", metavar="DIR", help="existing pictures, in the order of the prompts: 2.png before 10.png")
    add("--alpha-T-squared", type=DECIMAL, metavar="A", help=_ALPHA)
    add("--steps", type=_at_least(1), default=1, metavar="N", help="1 (default), or N steps of DPM-Solver++ with guidance")
    add("--guidance", type=DECIMAL, default=3.0, metavar="G", help="guidance scale for more than one step (default: 3)")
    add("--size", type=_at_least(8), metavar="N", help="side of the pictures in pixels (default: the base's own)")
    add("--seed", type=_at_least(0), default=0, metavar="N", help="picture i has the noise of seed N + i (default: 0)")
    add = parser.add_argument_group("reference").add_argument
    add("--preset", choices=(*coco.PRESETS, MINI_PRESET), help=f"prompts and real pictures together. In --data: {expects}")
    add("--data", metavar="DIR", help="folder of the preset's files")
    add("--prompts", metavar="FILE|DIR", help="any format that the trainer reads, starter, or mini; overrides a preset's")
    add("--prompt-field", metavar="NAME", help="key or column of the prompts")
    add("--real", metavar="DIR|FILE", help="real pictures, a file written by --save-statistics, or an .npz with mu and sigma")
    add("--count", type=_at_least(2), metavar="N", help="use only the first N prompts")
    add(
        "--side",
        type=_at_least(8),
        metavar="N",
        help="crop and resize all pictures to squares of N pixels (COCO's presets: 256)",
    )
    add("--save-statistics", metavar="FILE", help="write the statistics of the real pictures, for --real (.safetensors)")
    add = parser.add_argument_group("feature extractors").add_argument
    add("--extractor", metavar="NAME", help="inception (default), mini, or MODULE:FUNCTION that returns a network")
    add("--inception", metavar="FILE", help=f"Inception's weights, {extractors.INCEPTION_FILE}")
    add("--clip", metavar="DIR", help="folder of a CLIP model, for the CLIP score")
    add = parser.add_argument_group("how it runs").add_argument
    add("-o", "--output", default="runs/evaluation", metavar="DIR", help="default: runs/evaluation")
    add("--batch", type=_at_least(1), default=8, metavar="N", help="pictures per network call (default: 8)")
    add("--shard", type=_shard, default=(0, 1), metavar="K/N", help="make only the K-th of N parts of the pictures, then exit")
    add("--device", metavar="D", help="cpu, cuda and so on (default: a GPU if there is one)")
    add("--dtype", metavar="T", help="fp32, bf16 or fp16 (default: fp16 on a GPU, else fp32)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _settle(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in what a preset says, and refuse what makes no sense."""
    if options.preset == MINI_PRESET:
        options.base = options.base or ("mini" if not options.pictures else None)
        options.prompts, options.real = options.prompts or MINI, options.real or MINI
        options.extractor = options.extractor or "mini"
    elif options.preset:
        options.side = options.side or coco.PRESETS[options.preset].side
        if not options.data:
            parser.error(f"--preset {options.preset} needs --data, a folder with {coco.PRESETS[options.preset].expects}")
    options.extractor = options.extractor or "inception"
    if options.base == "mini" and options.lorad is None and options.steps == 1:
        options.lorad = ["mini"]
    if bool(options.base) == bool(options.pictures):
        parser.error("either --base or --pictures is needed")
    if not options.preset and not options.real:
        parser.error("--real or --preset is needed")
    if options.base and not (options.prompts or options.preset):
        parser.error(NO_PROMPTS)
    if options.clip and not (options.prompts or options.preset):
        parser.error("--clip needs the --prompts of the pictures")
    if options.pictures and options.shard[1] > 1:
        parser.error("--shard divides the making of pictures, and --pictures are there already")
    if options.save_statistics and not options.save_statistics.endswith(".safetensors"):
        parser.error("--save-statistics needs a name that ends in .safetensors")


def main(words: Sequence[str] | None = None) -> int:
    """Run an evaluation; returns the exit status."""
    take_any_text()
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    words = sys.argv[1:] if words is None else list(words)
    parser = make_parser()
    options = parser.parse_args(words)
    _settle(parser, options)
    try:
        hub.only_named(named(options))
        found = evaluate(options)
        if found is None:
            sys.stdout.write("this part of the pictures is there; run without --shard when all parts are\n")
            return 0
        path = Path(options.output) / "evaluation.json"
        with atomic_write(path) as file:
            file.write((json.dumps(report(found, words), indent=1) + "\n").encode())
    except (OSError, ValueError, ImportError) as error:
        if options.debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {one_line(missing(error, 'evaluate') if isinstance(error, ImportError) else error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from here\n")
        return 130
    sys.stdout.write(as_markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
