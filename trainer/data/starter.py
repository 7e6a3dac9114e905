"""Writes the list of prompts that ships with the trainer, so that a first run needs nothing.

    python -m trainer.data.starter

Kinds of pictures, each with some sentences and the words that fit into them; all of it written for this project. No
person is named. Of each kind as many prompts are drawn as it says, words in turn so that all of them occur, the same
list every time. What a sentence leaves open is in braces; ``@`` stands for a or an.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wadi_core.files import atomic_write
from wadi_core.output import take_any_text

from .starter_words import KINDS, SHARED

OUTPUT = Path(__file__).parent / "starter_prompts.txt"
SEED = 20
COUNT = 2000
ATTEMPTS = 200  # to find a prompt that is not in the list yet

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"@ (\W*)(\w+)")
# Words whose first sound is not what their first letter says.
_SOUNDS_LIKE_VOWEL = ("hour", "heir", "honest")
_SOUNDS_LIKE_CONSONANT = ("uni", "use", "euro", "one", "ukulele")


@dataclass
class Bag:
    """Words that come out in a random order, all of them before any comes again."""

    words: tuple[str, ...]
    random: random.Random

    def __post_init__(self) -> None:
        self._left: list[str] = []

    def draw(self) -> str:
        if not self._left:
            self._left = self.random.sample(self.words, len(self.words))
        return self._left.pop()


def starter_prompts() -> list[str]:
    """All prompts of the list, in its order.

    Raises:
        ValueError: the words of a kind do not yield as many different prompts as it should give, or a sentence has an
            open place that no words are for.
    """
    source = random.Random(SEED)
    found: dict[str, None] = {}
    for kind in KINDS:
        found |= dict.fromkeys(_of_kind(kind.name, kind.count, kind.sentences, kind.words, found, source))
    prompts = list(found)
    source.shuffle(prompts)
    return prompts


def _of_kind(
    name: str, count: int, sentences: str, words: dict[str, str], taken: dict[str, None], source: random.Random
) -> Iterator[str]:
    choices = {**SHARED, **words}
    bags = {slot: Bag(_entries(text), source) for slot, text in choices.items()}
    forms = Bag(_entries(sentences), source)
    made: set[str] = set()
    for _ in range(count):
        for _ in range(ATTEMPTS):
            prompt = with_articles(_filled(forms.draw(), bags))
            if prompt.lower() not in made and prompt not in taken:
                break
        else:
            raise ValueError(f"{name}: the words yield no more than {len(made)} prompts")
        made.add(prompt.lower())
        yield prompt


def _entries(text: str) -> tuple[str, ...]:
    """Entries of a word list, which are divided by line ends or semicolons."""
    return tuple(entry for part in re.split(r"[;\n]", text) if (entry := " ".join(part.split())))


def _filled(sentence: str, bags: dict[str, Bag]) -> str:
    """A sentence whose open places are filled, each with another word."""
    used: set[str] = set()
    while match := _SLOT.search(sentence):
        if match[1] not in bags:
            raise ValueError(f"no words are given for {match[0]} in {sentence!r}")
        word = next(word for word in iter(bags[match[1]].draw, None) if word not in used)
        used.add(word)
        sentence = sentence[: match.start()] + word + sentence[match.end() :]
    return sentence


def with_articles(sentence: str) -> str:
    """``@`` as "a" or "an", whichever the next word needs; a capital where the sentence begins with one."""

    def article(match: re.Match[str]) -> str:
        word = match[2].lower()
        vowel = word.startswith(_SOUNDS_LIKE_VOWEL) or (word[0] in "aeiou" and not word.startswith(_SOUNDS_LIKE_CONSONANT))
        return f"{'an' if vowel else 'a'} {match[1]}{match[2]}"

    sentence = _ARTICLE.sub(article, sentence)
    if sentence.endswith("."):
        sentence = sentence[0].upper() + sentence[1:]
    return sentence


def main() -> int:
    take_any_text()
    prompts = starter_prompts()
    if len(prompts) != COUNT:
        sys.stderr.write(f"error: the kinds give {len(prompts)} prompts, not {COUNT}\n")
        return 1
    with atomic_write(OUTPUT) as file:
        file.write("".join(f"{prompt}\n" for prompt in prompts).encode())
    sys.stdout.write(f"{OUTPUT}: {len(prompts)} prompts\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
