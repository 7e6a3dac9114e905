"""Words in a prompt, however they are written: in any letter case, composed or decomposed, and never inside another word.

Text is compared as Unicode's canonical caseless matching does, and besides all letters i are one (I, i, and Turkish
I with and without its dot). Folding changes the length of a text, so every folded sign remembers where it came from.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_DOT = "\u0307"  # above; the small I with a dot folds to i and this
_DOTLESS = "\u0131"


class Match(NamedTuple):
    """A word in a text: ``text[start:end]`` says ``word``, which is written as it was given."""

    start: int
    end: int
    word: str


def fold(text: str) -> str:
    """A text in the form in which words are compared."""
    return "".join(folded for _, folded in _clusters(text))


class Words:
    """Finds some words in texts. Of words that begin at the same place the longest one counts."""

    def __init__(self, words: Iterable[str]) -> None:
        self._starting: dict[str, list[tuple[str, str]]] = {}
        for folded, word in {fold(word): word for word in words if word}.items():
            self._starting.setdefault(folded[0], []).append((folded, word))
        for those in self._starting.values():
            those.sort(key=lambda pair: -len(pair[0]))

    def find(self, text: str) -> Iterator[Match]:
        """The words of a text in its order; they do not overlap, and none is a part of a longer word."""
        if not self._starting:
            return
        clusters = list(_clusters(text))
        folded = "".join(part for _, part in clusters)
        places, at = {}, 0  # place in the folded text -> place in the text, where a cluster begins
        for start, part in clusters:
            places.setdefault(at, start)
            at += len(part)
        places[at] = len(text)
        done = 0
        for place, start in places.items():
            if place < done:
                continue
            for wanted, word in self._starting.get(folded[place : place + 1], ()):
                end = place + len(wanted)
                if end in places and folded.startswith(wanted, place) and _stands_alone(folded, place, end):
                    yield Match(start, places[end], word)
                    done = end
                    break


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether what lies between is no part of a longer word."""
    before = start > 0 and _in_word(text[start - 1]) and _in_word(text[start])
    after = end < len(text) and _in_word(text[end - 1]) and _in_word(text[end])
    return not before and not after


def _in_word(sign: str) -> bool:
    return sign.isalnum() or sign == "_" or unicodedata.category(sign).startswith("M")


def _clusters(text: str) -> Iterator[tuple[int, str]]:
    """A sign with the marks above and below it, and the next: (place in the text, folded)."""
    start = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or not unicodedata.combining(text[end]):
            yield start, _folded(text[start:end])
            start = end


def _folded(cluster: str) -> str:
    plain = unicodedata.normalize("NFD", unicodedata.normalize("NFD", cluster).casefold())
    return plain.replace(_DOTLESS, "i").replace("i" + _DOT, "i")
