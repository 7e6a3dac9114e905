"""Checkpoints that survive a kill at any moment, and the lock that keeps a folder to one run.

A checkpoint is one file, written under a temporary name, flushed to the disk and renamed: either it is there
whole or it is not there. Files are read with ``weights_only=True``, so they hold tensors and plain values alone.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wadi_core.files import atomic_write, existing_file, one_line, refusal

LOCK = ".lock"


class Checkpoints:
    """The checkpoints of one run: ``step-000123.pt`` files in one folder, newest wins.

    Args:
        folder: where the files live; made when the first one is saved.
        keep: how many of the newest stay.
        keep_every: those of multiples of this step stay for good; 0 is none.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2, keep_every: int = 0) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.keep_every = keep_every

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        return sorted(self.folder.glob(f"step-{'[0-9]' * 8}.pt"))

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write ``state`` as the checkpoint of ``step`` and drop the ones that need not stay.

        Raises:
            OSError: it cannot be written, as on a full disk; one line, and the checkpoints before it are whole.
        """
        path = self.folder / f"step-{step:08d}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        failed: list[OSError] = []
        try:
            with atomic_write(path) as file:
                torch.save(dict(state), _Watched(file, failed))
        except RuntimeError as error:
            # torch's writer turns an error of the file into one of its own, which does not say what was wrong.
            if not failed:
                raise
            raise OSError(failed[0].errno, one_line(f"{path}: cannot be written: {failed[0].strerror}")) from error
        for old in self.paths()[: -self.keep]:
            if not (self.keep_every and self.step_of(old) % self.keep_every == 0):
                old.unlink(missing_ok=True)
        return path

    @staticmethod
    def step_of(path: Path) -> int:
        """The step of a checkpoint, by its name."""
        return int(path.stem.removeprefix("step-"))

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None where there is none.

        Raises:
            ValueError: checkpoints are there but not one of them can be read.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError):
                continue
        if paths:
            raise ValueError(f"{self.folder}: none of the {len(paths)} checkpoints can be read; remove them to start anew")
        return None


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """One checkpoint by its path.

    Raises:
        OSError, ValueError: it cannot be read; one line.
    """
    try:
        state = torch.load(existing_file(path), map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise refusal(path, "this is no checkpoint of a run, or it is damaged") from error
    if not isinstance(state, dict) or "step" not in state:
        raise refusal(path, "this is no checkpoint of a run")
    return state


class _Watched:
    """A file that remembers why a write failed."""

    def __init__(self, file: Any, failed: list[OSError]) -> None:
        self._file, self._failed = file, failed

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self._failed.append(error)
            raise

    def flush(self) -> None:
        self._file.flush()


def random_state() -> dict[str, Any]:
    """The state of Python's and torch's random generators, as plain values."""
    version, internal, gauss = random.getstate()
    state = {"python": [version, list(internal), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class FolderLock:
    """Keeps a folder to one run; the system lets go of it when the process ends, however it ends.

    Raises:
        ValueError: another run has the folder. OSError: nothing can be written there. Both with one line.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        path = Path(folder) / LOCK
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise type(error)(one_line(f"{folder}: nothing can be written here: {error.strerror or error}")) from error
        try:
            _lock(self._handle)
        except OSError as error:
            os.close(self._handle)
            raise ValueError(
                one_line(f"{folder}: another run is writing here; wait for it, or choose another output folder")
            ) from error

    def release(self) -> None:
        """Let another run have the folder."""
        os.close(self._handle)


def _lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
