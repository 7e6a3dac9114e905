"""Which prompt is which sample of a distillation: an endless, shuffled stream.

Samples of a run are numbered from 0, once and for all, and which prompt is sample n follows from the seed and n alone.
So a run goes on from a number, and nothing that grows with the list of prompts is kept in memory or in a checkpoint.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .prompt_table import PromptTable

STARTER = Path(__file__).parent / "starter_prompts.txt"
MINI, OWN = "mini", "starter"
SHOWN = 10
ROUNDS = 8
WORD = (1 << 64) - 1


def uniform64(*key: int) -> int:
    """64 bits that look random and follow from some integers (splitmix64, Steele et al. 2014, chained)."""
    mixed = 0
    for number in key:
        mixed = ((mixed ^ (number & WORD)) + 0x9E3779B97F4A7C15) & WORD
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & WORD
        mixed ^= mixed >> 31
    return mixed


class Shuffle:
    """A random order of ``range(count)`` that is computed place by place, not stored.

    A Feistel network permutes the numbers below a power of four; those that are not below ``count`` are sent through
    it again until they are (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """

    def __init__(self, count: int, *key: int) -> None:
        self.count = count
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)
        self._keys = [uniform64(*key, index) for index in range(ROUNDS)]

    def __call__(self, place: int) -> int:
        """What stands at a place."""
        half, mask = self._half, (1 << self._half) - 1
        while True:
            left, right = place >> half, place & mask
            for key in self._keys:
                left, right = right, left ^ (uniform64(key ^ right) & mask)
            place = left << half | right
            if place < self.count:
                return place


class Prompts:
    """An endless, seeded stream of prompts.

    Args:
        source: a file or folder as :mod:`.prompt_files` reads it (its prompts come in a random order, anew each time
            round), ``"starter"`` for the list that ships with the trainer, or ``"mini"`` for captions of the embedded
            model's scenes.
        seed: of the order.
        field: name of the key or column that holds the prompts; found by itself if not given.
        cache: folder of the table that the source is turned into; the user's cache by default.

    Attributes:
        count: prompts in the source; None for ``"mini"``, which has no end.
        digest: of all prompts, as hexadecimal digits.
        shown: a few of them, for sheets of samples.
        position: number of the next sample.

    Raises:
        ValueError: the source holds no prompt, or is damaged or of no known kind.
        OSError: it cannot be read. Both with a message of one line.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        seed: int,
        field: str | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.seed, self.position = seed, 0
        self.table: PromptTable | None = None
        self._shuffle: tuple[int, Shuffle] | None = None
        if str(source) == MINI:
            from .mini.teacher import SHEET_CAPTIONS

            self.count, self.digest, self.shown = None, MINI, SHEET_CAPTIONS
        else:
            self.table = PromptTable.of(STARTER if str(source) == OWN else source, field or None, cache)
            self.count, self.digest = self.table.count, self.table.digest
            self.shown = tuple(self.table.read(range(min(SHOWN, self.count))))

    def take(self, count: int) -> list[str]:
        """The next ``count`` prompts."""
        taken = self.at(range(self.position, self.position + count))
        self.position += count
        return taken

    def at(self, numbers: Sequence[int]) -> list[str]:
        """The prompts of some samples."""
        if self.table is None:
            from .mini.scenes import draw_plan

            return [draw_plan(random.Random(f"{self.seed} {number}")).caption for number in numbers]
        return self.table.read([self._row(number) for number in numbers])

    def _row(self, number: int) -> int:
        time, place = divmod(number, self.count)
        if self._shuffle is None or self._shuffle[0] != time:
            self._shuffle = time, Shuffle(self.count, self.seed, time)
        return self._shuffle[1](place)

    def state(self) -> dict[str, Any]:
        """The position in the stream, as plain values."""
        return {"position": self.position, "seed": self.seed, "digest": self.digest}

    def check(self, digest: str) -> None:
        """Do nothing if these are the prompts of a digest.

        Raises:
            ValueError: they are others.
        """
        if digest != self.digest:
            raise ValueError("the prompts are not those that this run began with; put them back, or start a new run")

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a position that :meth:`state` returned.

        Raises:
            ValueError: it is one in other prompts.
        """
        self.check(state["digest"])
        self.position, self.seed = int(state["position"]), int(state["seed"])
        self._shuffle = None
