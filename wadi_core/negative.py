"""What a picture is not to show: the texts, and how strongly attention is steered away from them.

A preset is a method with its numbers. ``nag`` and ``nasa`` leave out the outermost level of a U-Net, which one step does not
bear (docs/negative.md); ``nag-published`` has the values and the layers that the method's authors give for Stable
Diffusion XL. For the other method no values of its authors are known here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .files import one_line
from .text_files import is_text

METHODS = ("nag", "nasa")
LARGEST = 30.0  # scale; what lies above was never tried

# One text for all pictures, or one entry for each picture: a text, or several for this picture.
Negatives: TypeAlias = "str | Sequence[str | Sequence[str]] | None"


def _check(name: str, value: Any, least: float, most: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or not least <= value <= most:
        raise ValueError(one_line(f"{name} must lie from {least:g} to {most:g}, not {value}"))


@dataclass(frozen=True)
class Guidance:
    """How the outputs of cross-attention for a prompt and for what is unwanted become one (:mod:`.guidance`).

    Attributes:
        method: one of :data:`METHODS`.
        scale: how far the output is moved away from the unwanted one; 0 is not at all.
        tau: of ``nag``: how many times its own length the output may grow at most.
        alpha: of ``nag``: the share of what was moved in the result; the rest is the output for the prompt.
        first_level: the outermost level of a U-Net that is steered; 0 is that of full size. One step multiplies what is
            wrong with a network's output by 14.6, and steering the outermost level, which knows the noise best, shows.

    Raises:
        ValueError: an unknown method or a number outside its range; one line.
    """

    method: str = "nag"
    scale: float = 2.0
    tau: float = 2.5
    alpha: float = 0.5
    first_level: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(one_line(f"a negative prompt works by one of {', '.join(METHODS)}, not {self.method}"))
        _check("negative scale", self.scale, 0.0, LARGEST)
        _check("tau", self.tau, 1.0, LARGEST)
        _check("alpha", self.alpha, 0.0, 1.0)
        if not isinstance(self.first_level, int) or isinstance(self.first_level, bool) or not 0 <= self.first_level <= 3:
            raise ValueError(one_line(f"first_level must be 0, 1, 2 or 3, not {self.first_level}"))


PRESETS = {
    "nag": Guidance("nag", 2.0, 2.5, 0.5),
    "nasa": Guidance("nasa", 0.5),
    "nag-published": Guidance("nag", 2.0, 2.5, 0.5, first_level=0),
}
DEFAULT = "nag"


@dataclass(frozen=True)
class Negative(Guidance):
    """The negative prompt of one picture. Several texts are attended to together, each where it fits best.

    Raises:
        ValueError: as :class:`Guidance`, or what is no text; one line.
    """

    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.texts, str) or not isinstance(self.texts, Sequence) or not self.texts:
            raise ValueError("a negative prompt must be a text or a list of texts")
        object.__setattr__(self, "texts", tuple(self.texts))
        for text in self.texts:
            if not isinstance(text, str) or not is_text(text):
                raise ValueError(one_line(f"a negative prompt must be a text, not {text!r}"))

    @property
    def how(self) -> Guidance:
        """The method and its numbers, without the texts."""
        return Guidance(self.method, self.scale, self.tau, self.alpha, self.first_level)


def preset(name: str | Guidance = DEFAULT, scale: float | None = None) -> Guidance:
    """A preset by its name, or numbers of one's own; with another scale where one is given.

    Raises:
        ValueError: an unknown name or a scale outside its range; one line.
    """
    found = PRESETS.get(name) if isinstance(name, str) else name
    if not isinstance(found, Guidance):
        raise ValueError(one_line(f"a negative prompt works by one of {', '.join(PRESETS)}, not {name!r}"))
    return found if scale is None else dataclasses.replace(found, scale=scale)


def of_each(texts: Negatives, how: Guidance, pictures: int) -> list[tuple[Negative, ...]]:
    """For each picture its negative prompt, as its settings hold it: none where there is no text or the scale is 0.

    Args:
        texts: a text for all pictures, or as many entries as there are pictures; an entry is a text or several.

    Raises:
        ValueError: another number of entries, or what is no text; one line.
    """
    if texts is None or isinstance(texts, str):
        each: list[Any] = [texts] * pictures
    elif isinstance(texts, Sequence) and not isinstance(texts, (bytes, bytearray)):
        each = list(texts) * pictures if len(texts) == 1 else list(texts)
    else:
        raise ValueError(f"a negative prompt must be a text or a list of texts, not {type(texts).__name__}")
    if len(each) != pictures:
        said = "give one text, or one for each picture; several for a picture are a list inside the list"
        raise ValueError(f"there are {pictures} pictures and {len(each)} negative prompts: {said}")
    return [_of_one([one] if one is None or isinstance(one, str) else one, how) for one in each]


def _of_one(texts: Sequence[Any], how: Guidance) -> tuple[Negative, ...]:
    said = [text for text in texts if text is not None and not (isinstance(text, str) and not text.strip())]
    if not said:
        return ()
    made = Negative(**vars(how), texts=tuple(said))
    return (made,) if made.scale else ()
