"""Which prompt is which sample of a distillation: an endless, shuffled stream.

Samples of a run are numbered from 0, once and for all, and which prompt is sample n follows from the seed and n alone.
So a run goes on from a number, and nothing that grows with the list of prompts is in a checkpoint.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from wadi_core.prompt_files import read_prompts

from .random_draws import ORDER, OTHER_ORDER, PROMPTS, shuffled

STARTER = Path(__file__).parent / "starter_prompts.txt"
MINI, OWN = "mini", "starter"
SHOWN = 10


class PromptList:
    """Prompts one after the other in a single buffer: a million of them take little more memory than their text.

    Attributes:
        digest: a hash of all prompts in their order, as hexadecimal digits.
    """

    def __init__(self, prompts: Iterable[str]) -> None:
        self._text, self._ends = bytearray(), array("Q", [0])
        for prompt in prompts:
            self._text += prompt.encode()
            self._ends.append(len(self._text))
        total = hashlib.sha256(self._text)
        total.update(np.array(self._ends, "<u8").tobytes())
        self.digest = total.hexdigest()

    @classmethod
    def read(cls, source: str | os.PathLike[str], field: str | None = None) -> PromptList:
        """All prompts of a file or folder, or those that ship with the trainer (``"starter"``).

        Raises:
            OSError, ValueError: as :func:`wadi_core.prompt_files.read_prompts`.
        """
        return cls(read_prompts(STARTER if str(source) == OWN else source, field or None))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} prompts")
        return self._text[self._ends[row] : self._ends[row + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


class DrawnPrompts(Protocol):
    """Prompts that are made up as they are asked for and never come to an end."""

    shown: tuple[str, ...]

    def at(self, seed: int, number: int) -> str:
        """The prompt of a sample."""
        ...


class Prompts:
    """An endless, seeded stream of prompts.

    Args:
        source: a file or folder as :mod:`wadi_core.prompt_files` reads it (its prompts come in a random order, anew each
            time round), ``"starter"`` for the list that ships with the trainer, or the name that ``drawn`` goes by.
        seed: of the order.
        field: name of the key or column that holds the prompts; found by itself if not given.
        drawn: prompts that take the place of a source's.

    Attributes:
        count: prompts in the source; None for drawn ones, which have no end.
        digest: of all prompts, as hexadecimal digits.
        shown: a few of them, for sheets of samples.
        position: number of the next sample.

    Raises:
        ValueError: the source holds no prompt, or is damaged or of no known kind.
        OSError: it cannot be read. Both with a message of one line.
    """

    def __init__(
        self, source: str | os.PathLike[str], seed: int, field: str | None = None, drawn: DrawnPrompts | None = None
    ) -> None:
        self.seed, self.position, self.drawn = seed, 0, drawn
        self.prompts = PromptList(()) if drawn is not None else PromptList.read(source, field)
        self.count: int | None = None
        if drawn is not None:
            self.digest, self.shown = str(source), drawn.shown
        else:
            self.count, self.digest = len(self.prompts), self.prompts.digest
            self.shown = tuple(self.prompts[row] for row in range(min(SHOWN, self.count)))

    def take(self, count: int) -> list[str]:
        """The next ``count`` prompts."""
        taken = self.at(range(self.position, self.position + count))
        self.position += count
        return taken

    def at(self, numbers: Sequence[int]) -> list[str]:
        """The prompts of some samples."""
        if self.drawn is not None:
            return [self.drawn.at(self.seed, number) for number in numbers]
        count = len(self.prompts)
        rounds = (divmod(number, count) for number in numbers)
        return [self.prompts[shuffled(count, self.seed, PROMPTS, time)[place]] for time, place in rounds]

    def state(self) -> dict[str, Any]:
        """The position in the stream, as plain values."""
        return {"position": self.position, "seed": self.seed, "digest": self.digest, "order": ORDER}

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
            ValueError: it is one in other prompts, or in another order of them.
        """
        if self.drawn is None and state.get("order") != ORDER:
            raise ValueError(f"this folder {OTHER_ORDER} (start_from=FILE begins with its student)")
        self.check(state["digest"])
        self.position, self.seed = int(state["position"]), int(state["seed"])
