"""The pictures that wadi-mini learns from: one or two emoji on a plain background, with a caption.

Scenes are drawn at random from a seed, so there are as many as one wants and each can be made again. A caption
names the objects and only partly the rest (place, size, mirror and background vary unsaid), so that one caption
has many pictures. Left and right are never named: they are kept for learning a new relation later.

Edges lie on the grid of the autoencoder, eight pixels apart, and an object has one of two sizes, of which one is half
the other: at two places it is then the same latents, shifted, where places to the pixel and sizes in between would
be hundreds of different ones for a small network to learn of every object.
"""

from __future__ import annotations

import functools
import hashlib
import io
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from wadi_core.files import refusal

SIZE = 128  # pixels of a scene's side
GRID = 8  # pixels between places: one latent
SMALL, BIG = 56, 112  # pixels of an object's longer side: latents of 7x7 or 14x14
SINGLE_SIZES = (SMALL, BIG, BIG)  # two of three are big
PAIR_SIZES: tuple[int, ...] = (SMALL,)
CELLS = SMALL // GRID  # along an object, of one latent when it is small and of 2x2 when it is big
DRAWINGS = Path(__file__).with_name("drawings.zip")  # of the objects; drawings.md tells from where
COLOURS = {
    "white": (250, 250, 250),
    "grey": (150, 150, 155),
    "black": (28, 28, 32),
    "red": (205, 60, 60),
    "orange": (240, 150, 60),
    "yellow": (245, 215, 90),
    "green": (95, 170, 95),
    "blue": (75, 125, 205),
    "light blue": (165, 210, 240),
    "purple": (140, 95, 175),
    "pink": (245, 175, 195),
    "brown": (140, 100, 70),
}
SINGLE_PHRASES = ("{a}", "{a}", "a picture of {a}", "an emoji of {a}", "one {n}", "{n}")
PAIR_PHRASES = ("{a} and {b}", "{a} and {b}", "{a} with {b}", "a picture of {a} and {b}", "{a} next to {b}")
ABOVE_PHRASES = ("{a} on top of {b}", "{a} above {b}", "{b} under {a}")
PLURALS = frozenset("grapes cherries blueberries pancakes spaghetti ramen sushi popcorn bacon scales headphones glasses "
                    "sunglasses scissors jeans socks".split())  # fmt: skip
PLURAL_ENDS = ("french fries", "folded hands", "bowling pins", "hundred points", "fork and knife", "bow and arrow",
               "thumbs up", "thumbs down", "planet earth", "statue of liberty", "santa claus", "fire", "wheat", "bamboo",
               "broccoli", "lettuce", "corn", "garlic", "cheese")  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object: its index in the list, its character and its name."""

    index: int
    character: str
    name: str

    @property
    def phrase(self) -> str:
        """The name with its article."""
        if self.name in PLURALS or self.name in PLURAL_ENDS:
            return self.name
        return ("an " if self.name[0] in "aeiou" and not self.name.startswith("uni") else "a ") + self.name


@dataclass(frozen=True)
class Placed:
    """An object in a scene: centre and longer side in pixels."""

    thing: Thing
    x: int
    y: int
    size: int
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    """Everything that draws one picture."""

    caption: str
    background: tuple[int, int, int]
    shade: float
    placed: tuple[Placed, ...]


@functools.cache
def things() -> tuple[Thing, ...]:
    """The objects of ``objects.txt``, in its order."""
    lines = (Path(__file__).parent / "objects.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    return tuple(Thing(index, character, name) for index, (character, name) in enumerate(pairs))


def held_out(first: Thing, second: Thing) -> bool:
    """Whether this combination of two objects (in either order) is never trained on: one in ten, by a hash."""
    key = "|".join(sorted((first.name, second.name)))
    return hashlib.sha256(key.encode()).digest()[0] < 26


def code_points(character: str) -> str:
    """What sets of emoji call the file of a character: its code points in hexadecimal, as in ``1f469-200d-1f680``."""
    return "-".join(f"{ord(sign):x}" for sign in character if sign != "\ufe0f")


@functools.cache
def _drawings() -> dict[str, bytes]:
    """The PNG file of every object by its code points. Read whole: forked processes would share an open file's place."""
    try:
        with zipfile.ZipFile(DRAWINGS) as archive:
            return {name.removesuffix(".png"): archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise refusal(DRAWINGS, f"damaged ({error}); take it from the project again") from error


@functools.lru_cache(maxsize=1024)
def glyph(character: str) -> Image.Image:
    """The object as an RGBA picture, cropped to what is drawn.

    Raises:
        OSError, ValueError: the file of drawings is missing or damaged, or lacks this object; one line.
    """
    drawing = _drawings().get(code_points(character))
    if drawing is None:
        raise refusal(DRAWINGS, f"there is no drawing of {character}; trainer/mini/drawings.py makes the file anew")
    with Image.open(io.BytesIO(drawing)) as picture:
        return picture.convert("RGBA")


def _pick_pair(rng: random.Random, held: bool) -> tuple[Thing, Thing]:
    while True:
        first, second = rng.sample(things(), 2)
        if held_out(first, second) == held:
            return first, second


def _centres(size: int) -> range:
    """The centres at which an object of this size lies within the picture with its edges on the grid."""
    return range(size // 2, SIZE - size // 2 + 1, GRID)


def _place_pair(rng: random.Random, above: bool) -> list[tuple[int, int, int]]:
    """Centres and sizes of two objects that at most touch: one over the other, or anyhow side by side."""
    first, second = sizes = rng.choice(PAIR_SIZES), rng.choice(PAIR_SIZES)
    along = rng.choice([(a, b) for a in _centres(first) for b in _centres(second) if b - a >= (first + second) / 2])
    middle = rng.randrange(40, 89, GRID)
    across = [rng.choice([place for place in _centres(size) if abs(place - middle) <= 12]) for size in sizes]
    if above:
        return list(zip(across, along, sizes, strict=True))
    places = list(zip(along, across, sizes, strict=True))
    if rng.random() < 0.5:
        return [(SIZE - x, y, size) for x, y, size in places]
    return places


def draw_plan(rng: random.Random, pair: bool | None = None, held: bool = False, only: Thing | None = None) -> Scene:
    """A random scene.

    Args:
        rng: the source of every choice.
        pair: two objects, one, or (None) either at even odds.
        held: take a combination that training never shows (two objects only).
        only: the object of a single-object scene, where it matters.
    """
    colour = rng.choice(list(COLOURS))
    red, green, blue = (min(255, max(0, channel + rng.randint(-14, 14))) for channel in COLOURS[colour])
    shade = rng.uniform(-0.22, 0.22) if rng.random() < 0.4 else 0.0
    pair = (rng.random() < 0.5) if pair is None else pair
    if pair:
        first, second = _pick_pair(rng, held)
        above = rng.random() < 0.4
        phrase = rng.choice(ABOVE_PHRASES if above and rng.random() < 0.75 else PAIR_PHRASES)
        caption = phrase.format(a=first.phrase, b=second.phrase)
        spots = _place_pair(rng, above)
        chosen = (first, second)
    else:
        thing = only or rng.choice(things())
        size = rng.choice(SINGLE_SIZES)
        spots = [(rng.choice(_centres(size)), rng.choice(_centres(size)), size)]
        word = rng.random()
        phrase = rng.choice(SINGLE_PHRASES)
        caption = phrase.format(a=thing.phrase, n=thing.name)
        if size == BIG and word < 0.3:
            caption = f"a big {thing.name}"
        elif size == SMALL and word < 0.3:
            caption = f"a small {thing.name}"
        chosen = (thing,)
    if rng.random() < 0.5:
        caption += f" on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"
    placed = tuple(Placed(thing, *spot, rng.random() < 0.5) for thing, spot in zip(chosen, spots, strict=True))
    return Scene(caption, (red, green, blue), shade, placed)


def draw(
    scene: Scene,
    width: int = SIZE,
    height: int = SIZE,
    scale: int = 1,
    stamp_of: Callable[[str], Image.Image] | None = None,
) -> Image.Image:
    """The scene as an RGB picture, by default of 128x128 pixels.

    Args:
        scene: what to draw.
        width, height: of the canvas, in the unit of the scene's places.
        scale: pixels in that unit; objects are taken from their drawings of about 120 pixels anew.
        stamp_of: a character's RGBA picture; :func:`glyph` if not given.
    """
    canvas = (width * scale, height * scale)
    picture = Image.new("RGB", canvas, scene.background)
    if scene.shade:
        # A soft vertical gradient of the background's own colour.
        ends = [
            tuple(int(min(255, max(0, channel * (1 + sign * scene.shade)))) for channel in scene.background) for sign in (1, -1)
        ]
        strip = Image.new("RGB", (1, 2))
        strip.putpixel((0, 0), ends[0])
        strip.putpixel((0, 1), ends[1])
        picture = strip.resize(canvas, Image.Resampling.BILINEAR)
    for item in scene.placed:
        stamp = (stamp_of or glyph)(item.thing.character)
        share = scale * item.size / max(stamp.size)
        across, down = (max(1, round(side * share)) for side in stamp.size)
        stamp = stamp.resize((across, down), Image.Resampling.LANCZOS)
        if item.mirrored:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture.paste(stamp, (round(scale * item.x - across / 2), round(scale * item.y - down / 2)), stamp)
    return picture


def scene(seed: int, **choices: Any) -> Scene:
    """The scene of a seed; ``choices`` as in :func:`draw_plan`."""
    return draw_plan(random.Random(seed), **choices)
