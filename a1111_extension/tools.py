"""The panel's two tools: a LoRaD out of a complete one-step network, and a LoRaD merged into a new checkpoint.

Both work on files, by the core's toolbox, and leave the loaded network alone.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

from modules import sd_models

from wadi_core.entries import check_file_name
from wadi_core.files import files_below, one_line
from wadi_core.lorad.checkpoint import read_header

from . import catalog, host

Say = Callable[[str], None]
WATCHED_EVERY = 0.5  # seconds

_NAME = re.compile(r"[^\w. -]+")


def students() -> list[str]:
    """What a LoRaD can be extracted from: complete networks in the folders of LoRaD files, and checkpoints."""
    return [*_networks(), *sd_models.checkpoints_list]


def extract(student: str, rank: float, name: str) -> Iterator[str]:
    """Extract a LoRaD from a student and the chosen checkpoint, saying what is going on.

    Args:
        student: one of :func:`students`.
        rank: of every layer; 0 for the smallest that loses nothing.
        name: of the file that is written, without its ending; empty for one like the student's.

    Yields:
        A sentence, the last one with the result, or with what went wrong.
    """

    def work(say: Say) -> str:
        from wadi_core.lorad.extract import extract as extract_lorad
        from wadi_core.lorad.weights import Weights

        source = _student_file(student)
        output = catalog.folders()[0] / f"{_file_name(name or f'{source.stem}-lorad')}{catalog.ENDING}"
        output.parent.mkdir(parents=True, exist_ok=True)
        _refuse_existing(output)
        base = Weights.open(_base_file())
        lorad, found = extract_lorad(base, Weights.open(source), rank=int(rank) or None, progress=counted(say, "layers"))
        lorad.save(output)
        catalog.refresh()
        note = "" if found.is_rotation else "; the student is no rotation of this base, see 'wadi_core extract' for more"
        return f"{output.name}: {len(found.layers)} layers, {found.explained:.1%} of the change is a rotation{note}"

    return watched(work)


def merge(name: str, strength: float, output_name: str) -> Iterator[str]:
    """Write the chosen checkpoint with a LoRaD turned into its weights as a new checkpoint, saying what is going on.

    Args:
        name: of the LoRaD, as in the list.
        strength: of its angles.
        output_name: of the new checkpoint, without its ending; empty for one made of both names.

    Yields:
        A sentence, the last one with the result, or with what went wrong.
    """

    def work(say: Say) -> str:
        from wadi_core.lorad.merge import merge as merge_into

        base, lorad = _base_file(), catalog.file_of(name)
        if lorad is None:
            raise ValueError("choose a LoRaD first")
        output = base.with_name(f"{_file_name(output_name or f'{base.stem}-{lorad.stem}')}{catalog.ENDING}")
        _refuse_existing(output)
        report = merge_into(base, [(lorad, float(strength))], output, progress=counted(say, "bytes"))
        settings = base.with_suffix(".yaml")
        if settings.is_file():  # without it the program would take the checkpoint for one of another shape
            shutil.copyfile(settings, output.with_suffix(".yaml"))
        sd_models.list_models()
        return f"{output.name}: {report.layers} layers rotated; refresh the list of checkpoints to choose it"

    return watched(work)


def counted(say: Say, unit: str) -> Callable[[int, int], None]:
    """What the core calls with how much of how much is done, as sentences."""
    return lambda done, total: say(f"{done:,} of {total:,} {unit}")


def watched(work: Callable[[Say], str]) -> Iterator[str]:
    """Do something long in a thread of its own, and say every half second how far it is; last of all its result.

    Args:
        work: is given a function to call with how far it is; returns a sentence, or raises OSError or ValueError with one.
    """
    said: SimpleQueue[tuple[bool, str]] = SimpleQueue()

    def run() -> None:
        try:
            said.put((True, work(lambda sentence: said.put((False, sentence)))))
        except (OSError, ValueError) as error:
            host.logger.warning("WaDi: %s", one_line(error))
            said.put((True, f"⚠ {one_line(error)}"))
        except BaseException:
            said.put((True, "⚠ an error in the program: the console says more"))
            raise

    threading.Thread(target=run, name="wadi-tool", daemon=True).start()
    last, done = "reading", False
    while not done:
        yield last
        try:
            done, last = said.get(timeout=WATCHED_EVERY)
            while not done:
                done, last = said.get_nowait()
        except Empty:
            continue
    yield last


def _networks() -> dict[str, Path]:
    """Complete networks in the folders of LoRaD files, by file name."""
    found = {}
    for folder in catalog.folders():
        for path in files_below(folder, catalog.ENDING):
            try:
                names = read_header(path).shapes
            except (OSError, ValueError):  # cannot be chosen then; where it is used, it is told why
                continue
            if not any(name.endswith((".lorad_a", ".theta_a", ".lora_down.weight", ".lora_A.weight")) for name in names):
                found[path.name] = path
    return found


def _student_file(choice: str) -> Path:
    networks = _networks()
    if choice in networks:
        return networks[choice]
    if choice in sd_models.checkpoints_list:
        return Path(sd_models.checkpoints_list[choice].filename)
    raise ValueError(f"choose a one-step network first; its file may lie in {catalog.folders()[0]}")


def _base_file() -> Path:
    file = host.checkpoint_file()
    if file is None:
        raise ValueError("no checkpoint is chosen")
    return file


def _file_name(name: str) -> str:
    """A name that stays in its folder."""
    cleaned = _NAME.sub("_", name.strip()).strip(". ")
    if not cleaned:
        raise ValueError("the new file needs a name")
    name = cleaned.removesuffix(catalog.ENDING)
    check_file_name(name, catalog.ENDING)
    return name


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path.name}: there is a file of this name already: choose another one")
