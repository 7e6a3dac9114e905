"""Ending a run when it is asked to: SIGTERM and Ctrl-C are noted, and the run ends after its step."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

PATIENCE = 5.0  # seconds after a signal in which another one is taken for the same


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C are put into the list; another one, some seconds later, ends the program as usual.

    At once would be too early: of a Ctrl-C in a terminal ``accelerate launch`` sends its processes a second signal.
    """
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.getsignal(name) for name in names}
    caught: list[int] = []
    first: list[float] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)
        first.append(time.monotonic())
        if first[-1] - first[0] > PATIENCE:
            for name in names:
                signal.signal(name, before[name])
            signal.raise_signal(number)

    for name in names:
        signal.signal(name, note)
    try:
        yield caught
    finally:
        for name in names:
            signal.signal(name, before[name])
