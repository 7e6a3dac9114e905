"""Files: written whole or not at all, and messages of one line."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .entries import NAME_LIMIT

MESSAGE_LENGTH = 400
_CACHED = "models--"  # how the folder of a repository begins in a model hub's cache


def one_line(text: object) -> str:
    """Text as one line that any terminal or log can take, at most a few hundred characters of it.

    Names out of a damaged file may hold anything: line ends, control characters, half of a surrogate pair.
    """
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    # A long path stands in front, and what is wrong with it at the end.
    half = (MESSAGE_LENGTH - 3) // 2
    return line if len(line) <= MESSAGE_LENGTH else f"{line[:half]}...{line[-half:]}"


class RefusedFile(ValueError):
    """A file that is not used; the message of one line begins with its path and says why."""


def refusal(path: str | os.PathLike[str], why: str) -> RefusedFile:
    """The error, to be raised, that says in one line what is wrong with a file."""
    return RefusedFile(one_line(f"{path}: {why}"))


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The path, if there is a file that can be read.

    Raises:
        OSError: there is none, or it is a folder or a device; one line.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(one_line(f"{path}: this is a folder, a file is needed"))
    if not path.exists():
        why = "this is a link to a file that is not there: download it again" if path.is_symlink() else "there is no such file"
        raise FileNotFoundError(one_line(f"{path}: {why}"))
    if not path.is_file():
        raise OSError(one_line(f"{path}: this is no ordinary file"))
    return path


def as_text(name: str) -> str:
    """A file's name as text, to be written into other files: its bytes that are no UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def known_name(path: str | os.PathLike[str]) -> str:
    """What people call a file or folder: its name as it was given, without the folders above it. Links are not followed.

    In a model hub's cache (``models--ORG--NAME/snapshots/REVISION/FILE``, a link to ``blobs/SHA256``) a revision or a
    blob stands for ORG/NAME.
    """
    place = Path(os.path.abspath(path))
    holder = place.parent
    if holder.name in ("snapshots", "blobs") and holder.parent.name.startswith(_CACHED):
        return holder.parent.name.removeprefix(_CACHED).replace("--", "/")
    return as_text(place.name)


def check_writable(path: str | os.PathLike[str], makes_folders: bool = False) -> None:
    """Find out before the work whether a file can be written there; nothing is left behind.

    Args:
        path: the file.
        makes_folders: whether folders that do not exist yet are made when it is written.

    Raises:
        OSError: it cannot be; one line.
    """
    target = Path(os.path.realpath(path))
    if any(len(os.fsencode(part)) > NAME_LIMIT for part in target.parts):
        raise OSError(errno.ENAMETOOLONG, one_line(f"{path}: cannot be written: a name of more than {NAME_LIMIT} bytes"))
    if target.is_dir():
        raise IsADirectoryError(one_line(f"{path}: this is a folder, a file name is needed"))
    folder = target.parent
    while makes_folders and not os.path.lexists(folder):
        folder = folder.parent
    if not os.path.lexists(folder):
        raise FileNotFoundError(one_line(f"{path}: cannot be written: the folder does not exist"))
    if not folder.is_dir():
        raise NotADirectoryError(one_line(f"{path}: cannot be written: {folder} is not a folder"))
    probe = folder / f".wadi-{secrets.token_hex(8)}.tmp"
    try:
        # The system's answer, not the permission bits: disks can be read-only and root ignores the bits.
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise type(error)(one_line(f"{path}: cannot be written: {error.strerror or error}")) from error


def files_below(folder: str | os.PathLike[str], ending: str) -> list[Path]:
    """The files of an ending in a folder and its subfolders, sorted; linked folders are followed, each of them once."""
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(here)
        if place in seen:  # a link that leads back to where it was met
            folders.clear()
            continue
        seen.add(place)
        folders.sort()
        found += [Path(here, name) for name in names if name.lower().endswith(ending)]
    return sorted(found)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder that appears under its name only when all of it is there.

    Raises:
        OSError: it cannot be written, or there is something in it already; one line.
    """
    folder = Path(path)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(one_line(f"{path}: there is something of this name already: choose another one"))
    temporary = Path(os.path.abspath(folder)).with_name(f".wadi-{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except OSError as error:
        raise OSError(one_line(f"{path}: cannot be written: {error.strerror or error}")) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file that appears under its name only when it is complete and on the disk.

    The bytes go to a temporary name in the same folder, which is removed if anything goes wrong: what was at
    ``path`` before stays as it was. A link is followed, not replaced.

    Raises:
        OSError: the folder does not exist or cannot be written, or the disk is full; one line.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(one_line(f"{path}: this is a folder, a file name is needed"))
    temporary = target.with_name(f".wadi-{secrets.token_hex(8)}.tmp")
    try:
        # Unlike tempfile's, a file made this way has the permissions that the user's umask gives.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _about(error, temporary, target) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _about(error: OSError, temporary: Path, target: Path) -> OSError:
    """The same error, speaking of the file that was asked for; one about some other file stays as it is."""
    if error.errno is None or error.filename not in (None, str(temporary)):
        return error
    missing_folder = error.errno == errno.ENOENT
    why = "the folder does not exist" if missing_folder else (error.strerror or type(error).__name__)
    return type(error)(one_line(f"{target}: cannot be written: {why}"))


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk too, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
