"""A few pictures to learn from, each with what can be said of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wadi_core.files import one_line, refusal, sha256_of_file
from wadi_core.pictures import to_tensor
from wadi_core.text_files import read_captions, tidy

from .picture_files import listing, load
from .random_draws import shuffled, uniform64

logger = logging.getLogger("wadi")

PICTURE, CAPTION = 31, 32  # purposes of random numbers


class Encoding(Protocol):
    """What has an autoencoder: a base model."""

    vae: Any
    device: torch.device
    dtype: torch.dtype

    def on_device(self, helper: Any) -> AbstractContextManager[Any]:
        """The autoencoder on the device, for the time that it is used."""
        ...


@dataclass(frozen=True)
class Examples:
    """Pictures and captions.

    Attributes:
        paths: of the pictures, by name.
        captions: of each picture, one or several.
        digest: of names, contents and captions.
    """

    paths: tuple[Path, ...]
    captions: tuple[tuple[str, ...], ...]
    digest: str

    @classmethod
    def read(cls, folder: str, templates: Sequence[str], check: Callable[[str], str | None]) -> Examples:
        """The pictures of a folder.

        Args:
            folder: pictures, and beside a picture a ``.txt`` or ``.caption`` of the same name with its captions, a line
                each.
            templates: captions of the pictures that have no such file.
            check: what is wrong with a caption, if anything is.

        Raises:
            OSError, ValueError: no picture, a picture without a caption, or a wrong caption; one line.
        """
        if not folder:
            raise ValueError("pictures: name the folder of pictures to learn from: pictures=PATH")
        there = listing(folder)
        logger.info("%s", there)
        digest, found = hashlib.sha256(), []
        for path in there.pictures:
            source, own = "templates", [line for line in map(tidy, templates) if line]
            if beside := there.captions.get(path):
                source, own = _captions(beside)
            if not own:
                wanted = path.with_suffix(".txt").name
                raise refusal(path, f"this picture has no caption: write {wanted} beside it, or give templates")
            for caption in own:
                if wrong := check(caption):
                    raise refusal(source, f"{caption!r} {wrong}")
            found.append(tuple(own))
            digest.update(f"{path.name} {sha256_of_file(path)} {own}\n".encode("utf-8", "surrogateescape"))
        return cls(tuple(there.pictures), tuple(found), digest.hexdigest())

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def all_captions(self) -> list[str]:
        """Each caption once."""
        return list(dict.fromkeys(caption for own in self.captions for caption in own))

    def draw(self, seed: int, numbers: Iterable[int]) -> tuple[list[int], list[str]]:
        """Which picture each sample of a run is, all of them in turn, and which of its captions."""
        chosen, said = [], []
        for number in numbers:
            time, place = divmod(number, len(self))
            chosen.append(index := int(shuffled(len(self), seed, PICTURE, time)[place]))
            own = self.captions[index]
            said.append(own[uniform64(seed, CAPTION, number) % len(own)])
        return chosen, said

    @torch.no_grad()
    def latents(self, model: Encoding, size: tuple[int, int], mirror: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each picture's latents, scaled, (n, 4, h/8, w/8) float32 on the CPU.

        Args:
            size: width and height in pixels; of a picture the middle square is taken.
            mirror: after them the same of the mirrored pictures.
        """
        means, deviations = [], []
        with model.on_device(model.vae) as vae:
            for flipped in (False, True)[: 1 + mirror]:
                for path in self.paths:
                    pixels = to_tensor([load(path, size[0])])
                    pixels = pixels.flip(3) if flipped else pixels
                    found = vae.encode(pixels.to(model.device, model.dtype)).latent_dist
                    means.append(found.mean.float().cpu())
                    deviations.append(found.std.float().cpu())
        scale = model.vae.config.scaling_factor
        return torch.cat(means) * scale, torch.cat(deviations) * scale


def _captions(paths: Sequence[Path]) -> tuple[str, list[str]]:
    """The first file that says something, and what; that another one says something else is told."""
    said = [(path, lines) for path in paths if (lines := read_captions(path))]
    if not said:
        return str(paths[0]), []
    (first, own), *others = said
    for path, lines in others:
        if lines != own:
            logger.warning("%s", one_line(f"{first}: its captions are taken; {path.name} beside it says others"))
    return str(first), own
