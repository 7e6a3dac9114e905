"""The files of a repository on a model hub for one LoRaD: card, pictures, thumbnail, and a pipeline that loads it.

Nothing is uploaded: the folder is whole as it is, and any client of the hub takes it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from .. import catalog, images, pictures
from .. import settings as descriptions
from ..entries import check_file_name
from ..files import existing_file, known_name, new_folder, one_line, refusal

if TYPE_CHECKING:
    from ..lorad import LoRaD

HERE = Path(__file__).parent
THUMBNAIL, THUMBNAIL_SIDE = "thumbnail.jpg", 512
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_MARKS = re.compile(r"[\\`\[\]<>*{}]")
TAGS = ("text-to-image", "diffusers", "one-step", "lorad", "wadi")


@dataclass(frozen=True)
class Picture:
    """A picture for the card: the file, and what it was made with where it says so."""

    file: Path
    settings: descriptions.PictureSettings | None

    @property
    def prompt(self) -> str:
        return self.settings.prompt if self.settings else ""


@dataclass
class Repository:
    """What goes into the folder.

    Attributes:
        lorad: the adapter's file.
        base: repository of its base on the hub; by default that of its architecture.
        pictures: files of pictures; PNGs of this program say their prompts themselves.
        license: as the hub spells it; by default what the adapter's file says.
        prompts: that show what it has learned; those of the pictures if none are given.

    Raises:
        OSError, ValueError: a file cannot be read, or no base is known; one line.
    """

    lorad: Path
    base: str | None = None
    pictures: Sequence[str | os.PathLike[str]] = ()
    license: str | None = None
    prompts: Sequence[str] = ()
    adapter: LoRaD = field(init=False)
    shown: list[Picture] = field(init=False)

    def __post_init__(self) -> None:
        from ..lorad import LoRaD

        self.lorad = existing_file(self.lorad)
        if self.lorad.suffix.lower() != ".safetensors":
            raise refusal(self.lorad, "only a .safetensors file is published: write one with wadi convert --to lorad")
        check_file_name(self.name, ".safetensors")
        self.adapter = LoRaD.load(self.lorad)
        architecture = self.adapter.metadata.architecture
        # The catalogue's entries are named as the architectures are, but for PixArt, of which there is one.
        entry = catalog.entries().get(architecture.partition("-")[0])
        self.base = self.base or (entry.base[0] if entry is not None else None)
        if not self.base:
            raise refusal(self.lorad, f"no base is known for {architecture}: name it with --base ORG/NAME")
        if not _ID.fullmatch(self.base):
            raise ValueError(one_line(f"{self.base!r} is no repository's name: ORG/NAME, as on the hub"))
        for text in (self.license or "", *self.prompts):
            descriptions.check("prompt", text)
        self.shown = [_read(Path(one)) for one in self.pictures]

    @property
    def name(self) -> str:
        """Of the LoRaD's file, without ending."""
        return Path(known_name(self.lorad)).stem

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the folder, whole or not at all.

        Raises:
            OSError: it cannot be written, or there is something in it already; one line.
        """
        with new_folder(folder) as temporary:
            shutil.copyfile(self.lorad, temporary / f"{self.name}.safetensors")
            for place, picture in self._places():
                pictures.save(images.opened(picture.file).convert("RGB"), temporary / place, picture.settings)
            if self.shown:
                small = images.opened(self.shown[0].file).convert("RGB")
                small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
                small.save(temporary / THUMBNAIL, "jpeg", quality=90)
            (temporary / "README.md").write_text(self.card(), encoding="utf-8")
            (temporary / "pipeline.py").write_text(self._filled("pipeline.py.txt"), encoding="utf-8")
        return Path(folder)

    def card(self) -> str:
        """The text of README.md."""
        from huggingface_hub import ModelCardData

        prompts = list(self.prompts) or [one for one in dict.fromkeys(picture.prompt for picture in self.shown) if one]
        about: dict[str, Any] = {
            "license": self.license or self.adapter.metadata.license or "unknown",
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "base_model": self.base,
            "base_model_relation": "adapter",
            "tags": list(TAGS),
        }
        if prompts:
            about["instance_prompt"] = prompts[0] if len(prompts) == 1 else prompts
        if self.shown:
            about["thumbnail"] = THUMBNAIL
            about["widget"] = [{"text": one.prompt or " ", "output": {"url": place}} for place, one in self._places()]
        return f"---\n{ModelCardData(**about).to_yaml()}\n---\n\n{self._filled('card.md.txt')}"

    def _places(self) -> list[tuple[str, Picture]]:
        return [(f"images/{number}.png", one) for number, one in enumerate(self.shown, 1)]

    def _filled(self, template: str) -> str:
        metadata, one_step = self.adapter.metadata, self.adapter.one_step
        pixart = metadata.architecture == "pixart-alpha"
        gallery = "\n".join(f"![{_plain(one.prompt or self.name)}]({place})" for place, one in self._places())
        schedule = "none, it is an ordinary adapter"
        if one_step:
            schedule = f"one network call at t = {one_step.timestep}, alpha_T^2 = {one_step.alpha_T_squared}"
        return Template((HERE / template).read_text(encoding="utf-8")).substitute(
            title=_plain(metadata.title or self.name),
            file=f"{self.name}.safetensors",
            stem=self.name,
            base=self.base,
            layers=len(self.adapter.factors),
            rank=self.adapter.rank,
            schedule=schedule,
            gallery=gallery,
            prompt=_plain(next((one.prompt for one in self.shown if one.prompt), "a red apple")),
            parent="PixArtAlphaPipeline" if pixart else "StableDiffusionPipeline",
            parts=_PIXART_PARTS if pixart else _SD_PARTS,
        )


_SD_PARTS = """vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,"""
_PIXART_PARTS = """tokenizer,
        text_encoder,
        vae,
        transformer,
        scheduler,"""


def _plain(text: str) -> str:
    """Text for one line of Markdown and for the inside of a string in the examples' code."""
    return _MARKS.sub(" ", one_line(text)).replace('"', "'").strip()


def _read(file: Path) -> Picture:
    picture = images.opened(file)
    return Picture(file, pictures.read_settings(file) if pictures.JSON_KEY in picture.info else None)
