"""Ending a run when it is asked to: after the first SIGTERM or Ctrl-C it saves, a second one ends it at once.

A terminal that is closed (SIGHUP, where the system has it) is one request, however often it is told: the shell and the
kernel both tell it. Under nohup it stays ignored.

A step under way is left between two network calls as long as it has changed nothing: the checkpoint is then that of the
last whole step, and a run that goes on from it computes the step again, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows
RELAY = 5.0  # seconds after a signal in which a launcher hands it on to its processes


class StepAbandoned(Exception):
    """A step was left before it had changed anything."""


class Left(KeyboardInterrupt):
    """A second signal ended the run without saving.

    Attributes:
        number: of the signal; the exit status is 128 more.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Stop:
    """What signals have asked of a run; true once it is to end.

    Args:
        tell: say on stderr what is going to happen.

    Attributes:
        caught: the signals so far.
        seconds: how long the run will take until it looks here, 0 where that is not known.
    """

    def __init__(self, tell: bool = True) -> None:
        self.caught: list[int] = []
        self.seconds = 0.0
        self._tell = tell
        self._first = 0.0
        self._saving = False
        self._leaving = 0
        # In a terminal a Ctrl-C reaches the processes themselves, and then once more through their launcher.
        self._relay = RELAY if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0.0

    def __bool__(self) -> bool:
        return bool(self.caught)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            Left: it is the second one, and no checkpoint is being written.
        """
        now = time.monotonic()
        if self.caught and number == HANGUP:
            return
        self.caught.append(number)
        if len(self.caught) == 1:
            self._first = now
            about = f" (about {max(1, round(self.seconds))} s)" if self.seconds else ""
            self._say(f"finishing this step{about}, then saving; press again to leave without saving")
        elif now - self._first < self._relay:
            return
        elif self._saving and not self._leaving:
            self._leaving = number
            self._say("a checkpoint is being written: leaving as soon as it is whole; press again to leave without it")
        else:
            raise Left(number)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """While a checkpoint is written: a second signal waits for its end, a third one does not.

        Raises:
            Left: there was a second signal meanwhile.
        """
        self._saving = True
        try:
            yield
        finally:
            self._saving = False
        if self._leaving:
            raise Left(self._leaving)

    def _say(self, text: str) -> None:
        # Not through stderr's buffer: the signal may have come in the middle of its use.
        if self._tell and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), f"\n{text}\n".encode())


@contextlib.contextmanager
def stop_signals(tell: bool = True) -> Iterator[Stop]:
    """SIGTERM, Ctrl-C and the closing of the terminal are noted as long as this is open.

    Args:
        tell: say on stderr what is going to happen.
    """
    stop = Stop(tell)
    numbers = [signal.SIGTERM, signal.SIGINT]
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        numbers.append(HANGUP)
    before = {number: signal.signal(number, stop.note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def go_on() -> None:
    """What a step asks between its calls where nobody will stop it."""
