"""Checkpoints that survive a kill at any moment, and the lock that keeps a folder to one run.

A checkpoint is one file, written under a temporary name, flushed to the disk and renamed: either it is there
whole or it is not there. Files are read with ``weights_only=True``, so they hold tensors and plain values alone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from wadi_core.files import atomic_write, existing_file, one_line
from wadi_core.lorad.checkpoint import unpickle

logger = logging.getLogger("wadi")

LOCK = ".lock"
DEAD = 600.0  # seconds without a byte, after which nobody writes a temporary file any more
LOCKLESS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # of a file system that cannot lock


class DamagedCheckpoint(ValueError):
    """A checkpoint from which no run can go on; the one before it may do."""


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
                torch.save(dict(state), cast("IO[bytes]", _Watched(file, failed)))
        except RuntimeError as error:
            # torch's writer turns an error of the file into one of its own, which does not say what was wrong.
            if not failed:
                raise
            raise OSError(failed[0].errno, one_line(f"{path}: cannot be written: {failed[0].strerror}")) from error
        for old in [path for path in self.paths() if self.step_of(path) <= step][: -self.keep]:
            if old.is_file() and not (self.keep_every and self.step_of(old) % self.keep_every == 0):
                old.unlink(missing_ok=True)
        for left in self.folder.glob(".wadi-*.tmp"):  # of a process that was killed while it wrote
            if time.time() - left.stat().st_mtime > DEAD:
                left.unlink(missing_ok=True)
        return path

    @staticmethod
    def step_of(path: Path) -> int:
        """The step of a checkpoint, by its name."""
        return int(path.stem.removeprefix("step-"))

    def newest(self, damaged: dict[Path, str]) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, and what it holds; None where there is none.

        Args:
            damaged: those that are left out, and why; those that cannot be read are added.

        Raises:
            ValueError: checkpoints are there but not one of them can be used; one line.
        """
        paths = self.paths()
        for path in reversed(paths):
            if path not in damaged:
                try:
                    return path, read_checkpoint(path)
                except (OSError, ValueError) as error:
                    damaged[path] = str(error).removeprefix(f"{path}: ")
        if paths:
            raise ValueError(
                one_line(
                    f"{self.folder}: none of the {len(paths)} checkpoints can be read ({paths[-1].name}: "
                    f"{damaged[paths[-1]]}); nothing was deleted: remove them to start anew, or choose another output folder"
                )
            )
        return None

    def latest(self) -> dict[str, Any] | None:
        """What the newest checkpoint that can be read holds; None where there is none.

        Raises:
            ValueError: checkpoints are there but not one of them can be read; one line.
        """
        damaged: dict[Path, str] = {}
        found = self.newest(damaged)
        for path, why in damaged.items():
            logger.warning("%s is left out: %s", path, why)
        return found[1] if found else None


def set_aside(path: Path) -> Path:
    """Give something damaged a name under which it is in nobody's way; returns its name after that.

    Raises:
        OSError: it cannot be renamed.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return path.rename(aside)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """One checkpoint by its path.

    Raises:
        OSError, ValueError: it cannot be read; one line.
    """
    try:
        with zipfile.ZipFile(existing_file(path)) as archive:  # torch itself leaves the checksums alone
            if spoilt := archive.testzip():
                raise DamagedCheckpoint(one_line(f"{path}: this checkpoint is damaged: {spoilt} has another checksum"))
        state = unpickle(path, "it is damaged")
    except DamagedCheckpoint:
        raise
    except OSError as error:
        if error.errno is None:  # of one line already
            raise
        raise type(error)(one_line(f"{path}: cannot be read: {error.strerror or error}")) from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise DamagedCheckpoint(one_line(f"{path}: this is no checkpoint of a run, or it is damaged")) from error
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int or step < 0:
        raise DamagedCheckpoint(one_line(f"{path}: this is no checkpoint of a run"))
    return state


def check_like(found: Any, wanted: Mapping[str, Tensor], part: str) -> None:
    """Do nothing if a part of a checkpoint has the names and shapes that the run's own has.

    Raises:
        DamagedCheckpoint: it has not; one line.
    """
    if not isinstance(found, Mapping) or found.keys() != wanted.keys():
        raise DamagedCheckpoint(f"this checkpoint is damaged: its {part} has other names than this run's")
    for name, tensor in wanted.items():
        other = found[name]
        if not isinstance(other, Tensor) or other.shape != tensor.shape or not other.is_floating_point():
            raise DamagedCheckpoint(one_line(f"this checkpoint is damaged: {name} of its {part} has another shape or type"))


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str], output: Path) -> None:
    """Do nothing if some settings of a checkpoint's run are those of now.

    Raises:
        ValueError: they are not; one line that names the first that differs.
    """
    for name in names:
        if (held := before.get(name)) != (wanted := now.get(name)):
            raise ValueError(f"{output} holds a run with {name}={held}, not {wanted}; choose another output folder")


@contextlib.contextmanager
def damage_told() -> Iterator[None]:
    """What goes wrong inside is a checkpoint's fault.

    Raises:
        DamagedCheckpoint: in place of whatever came; one line.
    """
    try:
        yield
    except DamagedCheckpoint:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DamagedCheckpoint(one_line(f"this checkpoint is damaged, something in it is missing or wrong ({why})")) from error


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

    On a file system without locks there is none, which is told. A file that stands for a lock would stay when a run is
    killed, and after a move to another machine nobody could tell whether its run is alive: it would block the next one.

    Raises:
        ValueError: another run has the folder. OSError: nothing can be written there. Both with one line.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._lock = FileLock(Path(folder) / LOCK, timeout=0, fallback_to_soft=False)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                one_line(f"{folder}: another run is writing here; wait for it, or choose another output folder")
            ) from error
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise type(error)(one_line(f"{folder}: nothing can be written here: {error.strerror or error}")) from error
            logger.warning(
                "%s: there are no locks on this file system (%s): the run goes on without one, so start no second run here",
                folder, error.strerror,
            )  # fmt: skip

    def release(self) -> None:
        """Let another run have the folder."""
        self._lock.release()
