"""The COCO validation sets as they are used to judge text-to-image models: which files there must be, and what of them is used.

One caption of each image is a prompt (the one with the lowest number), and the images, their middle squares at 256
pixels, are what the generated pictures are held against. Of the 2014 set papers take 30,000 captions of their own
choice; who has such a list gives it in place of this one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from wadi_core.files import refusal
from wadi_core.text_files import tidy

from ..data.random_draws import COCO, shuffled


@dataclass(frozen=True)
class Coco:
    """A preset.

    Attributes:
        name: on the command line.
        annotations: file with the captions, below the folder of the data.
        folder: of the images, below the same.
        images, captions: how many there are.
        prompts: how many are used; fewer than there are images are chosen at random, always the same.
        side: at which pictures are judged, in pixels.
        archives: where the files come from, as COCO names its archives.
    """

    name: str
    annotations: str
    folder: str
    images: int
    captions: int
    prompts: int
    archives: tuple[str, str]
    side: int = 256

    @property
    def expects(self) -> str:
        """What the preset needs, in a sentence."""
        annotations, images = self.archives
        return (
            f"{self.annotations} with {self.captions:,} captions ({annotations}) and {self.folder}/ with {self.images:,} "
            f"images ({images})"
        )


PRESETS = {
    preset.name: preset
    for preset in (
        Coco(
            name="coco2014-30k",
            annotations="annotations/captions_val2014.json",
            folder="val2014",
            images=40_504,
            captions=202_654,
            prompts=30_000,
            archives=("annotations_trainval2014.zip", "val2014.zip"),
        ),
        Coco(
            name="coco2017-5k",
            annotations="annotations/captions_val2017.json",
            folder="val2017",
            images=5_000,
            captions=25_014,
            prompts=5_000,
            archives=("annotations_trainval2017.zip", "val2017.zip"),
        ),
    )
}
SEED = 0  # of the choice of prompts


@dataclass(frozen=True)
class CocoData:
    """What a preset found.

    Attributes:
        prompts: one for each picture to make.
        images: the real ones.
    """

    prompts: list[str]
    images: list[Path]


def read(preset: Coco, data: Path) -> CocoData:
    """Check the files of a preset and read its prompts.

    Args:
        data: the folder with COCO's own folders in it.

    Raises:
        OSError: a file is missing. ValueError: it is not the whole or the right one. Both with one line.
    """
    path = data / preset.annotations
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this file is missing; {preset.name} expects in {data}: {preset.expects}")
    names, captions = _captions(path)
    if (len(names), len(captions)) != (preset.images, preset.captions):
        found = f"{len(names):,} images and {len(captions):,} captions"
        raise refusal(path, f"there are {found} in this file; {preset.name} expects {preset.expects}")
    images = [data / preset.folder / name for _, name in sorted(names.items())]
    if missing := [image for image in images if not image.is_file()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{missing[0]}{more}: missing; {preset.name} expects in {data}: {preset.expects}")
    first: dict[int, tuple[int, str]] = {}
    for number, image, caption in captions:
        first[image] = min(first.get(image, (number, caption)), (number, caption))
    if len(first) != len(names) or first.keys() != names.keys():
        raise refusal(path, "there are images without a caption in this file")
    prompts = [tidy(caption) for _, (_, caption) in sorted(first.items())]
    if preset.prompts < len(prompts):
        prompts = [prompts[row] for row in sorted(shuffled(len(prompts), SEED, COCO)[: preset.prompts])]
    return CocoData(prompts, images)


def _captions(path: Path) -> tuple[dict[int, str], list[tuple[int, int, str]]]:
    """Image -> file name, and (number, image, caption) of each caption."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        names = {int(image["id"]): str(image["file_name"]) for image in read["images"]}
        captions = [(int(one["id"]), int(one["image_id"]), str(one["caption"])) for one in read["annotations"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise refusal(path, f"these are not COCO's captions ({type(error).__name__}: {error})") from error
    return names, captions
