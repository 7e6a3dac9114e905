"""What a pipeline does once and not again: prompts that were read already; and how long each stage of a picture takes."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 64  # batches of prompts


@dataclass(frozen=True)
class Timings:
    """Seconds that the stages of pictures took.

    Attributes:
        text: prompts to what the network is told.
        network: the network calls.
        decode: the autoencoder.
        pictures: pixels to pictures.
    """

    text: float = 0.0
    network: float = 0.0
    decode: float = 0.0
    pictures: float = 0.0

    def __add__(self, other: Timings) -> Timings:
        return Timings(
            self.text + other.text,
            self.network + other.network,
            self.decode + other.decode,
            self.pictures + other.pictures,
        )

    @property
    def total(self) -> float:
        return self.text + self.network + self.decode + self.pictures

    def __str__(self) -> str:
        parts = {"text": self.text, "network": self.network, "decode": self.decode, "pictures": self.pictures}
        return ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.items())


class Clock:
    """Marks between stages. On a GPU they are put into its queue, and nothing waits for them until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, Any] = {}
        self.mark("start")

    def mark(self, name: str) -> None:
        """The end of a stage."""
        if self._device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
            return
        if self._device.type != "cpu":  # a device without such marks has to be waited for
            getattr(torch, self._device.type).synchronize()
        self._marks[name] = time.perf_counter()

    def read(self) -> Timings:
        """How long each stage took, waiting for the last."""
        names = list(self._marks)
        if self._device.type == "cuda":
            self._marks[names[-1]].synchronize()

        def between(one: str, other: str) -> float:
            first, second = self._marks[one], self._marks[other]
            return first.elapsed_time(second) / 1000 if self._device.type == "cuda" else second - first

        neighbours = zip(names, names[1:])  # noqa: B905
        return Timings(**{end: between(start, end) for start, end in neighbours})


def state_of(network: nn.Module) -> tuple[Any, ...]:
    """What changes whenever a network's parameters do.

    A tensor counts the changes in place; whoever replaces its numbers replaces their address.
    """
    return tuple((one.data_ptr(), one._version, one.dtype, one.device) for one in network.parameters())


class Encoded:
    """What a text encoder made of the last batches of prompts.

    A batch is looked up as a whole: the same prompt in another batch may differ in its last bits.

    Args:
        text_encoder: whose parameters are looked at before each answer: if one was changed, everything is made anew.
    """

    def __init__(self, text_encoder: nn.Module) -> None:
        self._text_encoder = text_encoder
        self._state: tuple[Any, ...] = ()
        self._kept: OrderedDict[tuple[tuple[int, ...], ...], Tensor] = OrderedDict()

    def get(self, ids: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``encode`` returns for these ids, kept for the next time."""
        state = state_of(self._text_encoder)
        if state != self._state:
            self.forget()
            self._state = state
        key = tuple(tuple(row) for row in ids.tolist())
        if key not in self._kept:
            self._kept[key] = encode(ids)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def forget(self) -> None:
        """Let go of everything."""
        self._kept.clear()
