"""Which scenes a set of pictures shows: endless lists that a seed decides."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.mini import scenes
from wadi_core.files import atomic_write
from wadi_core.pictures import save


@functools.cache
def drawing_digest() -> str:
    """A hash of what draws the scenes: the list of objects, and some scenes as they come out today."""
    total = hashlib.sha256()
    for thing in scenes.things():
        total.update(f"{thing.character}{thing.name}".encode())
    for seed in range(8):
        plan = scenes.scene(seed)
        total.update(plan.caption.encode() + scenes.draw(plan).tobytes())
    return total.hexdigest()[:16]


@dataclass(frozen=True)
class Stream:
    """An endless list of scenes: scene i has the seed ``first + i``.

    Attributes:
        name: for people.
        first: seed of the first scene; a generated picture i has the noise of seed ``first + i``.
        pair: two objects, one, or (None) either at even odds.
        held: combinations that training never shows.
        each: single objects in turn, one after the other, in place of random ones.
        noises: so many pictures in a row share a caption.
    """

    name: str
    first: int
    pair: bool | None = None
    held: bool = False
    each: bool = False
    noises: int = 1

    def scene(self, index: int) -> scenes.Scene:
        """What picture ``index`` should show; of those that share a caption, the scene of the first."""
        place = index // self.noises
        only = scenes.things()[place % len(scenes.things())] if self.each else None
        return scenes.scene(self.first + place, pair=self.pair, held=self.held, only=only)

    def varied(self, index: int) -> scenes.Scene:
        """A real scene for picture ``index``: each of those that share a caption is drawn anew."""
        plan = self.scene(index)
        return same_caption(plan, self.first + index) if index % self.noises else plan

    def captions(self, rows: range) -> list[str]:
        """The captions of some pictures."""
        return [self.scene(index).caption for index in rows]

    def shown(self, rows: range) -> list[tuple[int, ...]]:
        """The indices of the objects in some pictures."""
        return [tuple(item.thing.index for item in self.scene(index).placed) for index in rows]

    def recipe(self) -> dict[str, Any]:
        """All that decides the scenes, as plain values."""
        return {key: value for key, value in vars(self).items() if key != "name"} | {"drawing": drawing_digest()}


def write_examples(stream: Stream, count: int, folder: Path, stamp_of: Callable[[str], Image.Image] | None = None) -> None:
    """Write the first scenes of a stream as pictures to learn from, each with its caption beside it.

    Args:
        stamp_of: as :func:`scenes.draw` takes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        plan = stream.scene(index)
        save(scenes.draw(plan, stamp_of=stamp_of), folder / f"{index:02d}.png")
        with atomic_write(folder / f"{index:02d}.txt") as file:
            file.write(f"{plan.caption}\n".encode())


def same_caption(plan: scenes.Scene, seed: int) -> scenes.Scene:
    """Another scene with the caption of ``plan``, from the same distribution: drawn until one fits.

    For two objects any pair is drawn, and where the rest of the caption fits, it is exchanged for the wanted one;
    otherwise that would take forever.
    """
    rng = random.Random(seed)
    things = [item.thing for item in plan.placed]
    wanted = _without_objects(plan)
    while True:
        other = scenes.draw_plan(rng, pair=len(things) > 1, only=None if len(things) > 1 else things[0])
        if _without_objects(other) == wanted:
            placed = tuple(replace(item, thing=thing) for thing, item in zip(things, other.placed, strict=True))
            return replace(other, caption=plan.caption, placed=placed)


def _without_objects(plan: scenes.Scene) -> str:
    """A scene's caption; where it shows two objects, with a mark in the place of each."""
    caption = plan.caption
    if len(plan.placed) > 1:
        # The longest first: "corn" is also the end of "a unicorn".
        for place, item in sorted(enumerate(plan.placed), key=lambda one: -len(one[1].thing.phrase)):
            caption = caption.replace(item.thing.phrase, f"<{place}>", 1)
    return caption
