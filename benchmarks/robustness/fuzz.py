"""Damaged files for every reader: each is read, or refused in one line; nothing hangs, grows, warns or is left behind.

    python benchmarks/robustness/fuzz.py                           120,000 files, about a quarter of an hour on one core
    python benchmarks/robustness/fuzz.py --share 0.01              a look at it
    python benchmarks/robustness/fuzz.py --only adapter:4711       one of them again, with its traceback
    python benchmarks/robustness/fuzz.py --page docs/robustness.md put the figures into the page

Each damaged file follows from its kind and number alone. Files are read in a process of its own with a limit on its
memory; it is watched from outside, and after a crash or a hang the next one goes on. Figures are kept in --state after
every thousand files: the same command goes on from there. Works on Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.report import write_json
from benchmarks.robustness.fuzz_attempt import (
    FAILED,
    LONGEST,
    READ,
    REFUSED,
    UNFIT,
    WARNINGS,
    attempt,
    check_good_files,
    damaged,
)
from benchmarks.robustness.fuzz_kinds import KINDS
from wadi_core.output import take_any_text

logger = logging.getLogger("benchmark")

ROOT = Path(__file__).resolve().parents[2]
HANG = 10.0  # seconds
ROOM = 2 << 30  # bytes that a worker may grow by
BATCH = 1000  # files between two saves of the figures
KEPT = 50  # failures of a kind that are written down; all are counted
OUTCOMES = (READ, REFUSED, UNFIT, FAILED)
BEGIN, END = "<!-- fuzz: begin -->", "<!-- fuzz: end -->"


def fingerprint() -> str:
    """A hash of all that decides a figure: how files are damaged, and who reads them."""
    total = hashlib.sha256()
    places = [*Path(__file__).parent.glob("damage*.py"), *Path(__file__).parent.glob("fuzz*.py")]
    for path in sorted([*places, *ROOT.glob("wadi_core/**/*.py"), *ROOT.glob("trainer/**/*.py")]):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


# The worker


def work(kind: str, numbers: range, folder: Path, results: int) -> NoReturn:
    """Try damaged files in this process; a line of JSON for each goes to ``results``."""
    noise = os.open(folder.parent / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(noise, 1)
    os.dup2(noise, 2)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    torch.set_num_threads(1)
    tempfile.tempdir = str(folder)
    os.chdir(folder)
    at_start = peak = resident()
    for number in numbers:
        began = time.perf_counter()
        found = asdict(attempt(kind, number, folder))
        found |= {"seconds": time.perf_counter() - began, "grown": 0}
        if os.fstat(noise).st_size:
            text = os.pread(noise, 10 * LONGEST, 0).decode(errors="replace")
            if text.count("\n") > WARNINGS or len(text) > LONGEST:  # a line of a C library, as of libtiff, may pass
                found |= {"outcome": FAILED, "why": f"on stderr: {text[:LONGEST]!a}"}
            os.truncate(noise, 0)
            os.lseek(noise, 0, os.SEEK_SET)
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if highest > peak:
            found["grown"], peak = highest - at_start, highest
        os.write(results, json.dumps(found).encode() + b"\n")
    os._exit(0)


def resident() -> int:
    """Bytes of memory that this process uses now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def tried(kind: str, numbers: range, place: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """What came of each file: number and result; a worker that hangs or dies is a result too."""
    while numbers:
        folder = place / "files"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        reading, writing = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.close(reading)
            try:
                work(kind, numbers, folder, writing)
            finally:  # an error of this script itself: never back into the parent's stack
                traceback.print_exc()
                os._exit(99)
        os.close(writing)
        number, hung = numbers.start, False
        for line in said_by(reading):
            if hung := line is None:
                os.kill(worker, signal.SIGKILL)
                break
            yield number, json.loads(line)
            number += 1
        os.close(reading)
        _, status = os.waitpid(worker, 0)
        if os.waitstatus_to_exitcode(status) == 99:
            raise ValueError((place / "stderr").read_text(errors="replace"))
        if number < numbers.stop:
            why = f"longer than {HANG:g} s" if hung else f"ends the process ({os.waitstatus_to_exitcode(status)})"
            yield number, {"outcome": FAILED, "damage": damaged(kind, number)[3], "why": why, "seconds": HANG, "grown": 0}
            number += 1
        numbers = range(number, numbers.stop)


def said_by(pipe: int) -> Iterator[bytes | None]:
    """Each line that comes through a pipe to its end; None, and nothing after it, when none has come for too long."""
    rest = b""
    while select.select([pipe], [], [], HANG)[0]:
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield None


# Figures


def empty(kind: str) -> dict[str, Any]:
    """The figures of a kind before its first file."""
    return {"done": 0, **dict.fromkeys(OUTCOMES, 0), "seconds": 0.0, "slowest": 0.0, "grown": 0, "damages": {}, "failures": []}


def count(figures: dict[str, Any], kind: str, number: int, found: dict[str, Any]) -> None:
    """Add one file's result."""
    figures["done"] = number + 1
    figures[found["outcome"]] += 1
    figures["seconds"] += found["seconds"]
    figures["slowest"] = max(figures["slowest"], found["seconds"])
    figures["grown"] = max(figures["grown"], found["grown"])
    for damage in found["damage"].split(" + "):
        row = figures["damages"].setdefault(damage, dict.fromkeys(OUTCOMES, 0))
        row[found["outcome"]] += 1
    if found["outcome"] == FAILED:
        logger.warning("%s:%d  %s: %s", kind, number, found["damage"], found["why"])
        if len(figures["failures"]) < KEPT:
            figures["failures"].append({"only": f"{kind}:{number}", "damage": found["damage"], "why": found["why"]})


def run(state: Path, kinds: Sequence[str], share: float) -> dict[str, Any]:
    """Try all files of some kinds, from where the state stopped; returns the figures.

    Raises:
        ValueError: the state is of other code than this.
    """
    report: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {"code": fingerprint(), "kinds": {}}
    if report["code"] != fingerprint():
        raise ValueError(f"{state}: these figures are of other code than this; remove the file to start anew")
    with tempfile.TemporaryDirectory(prefix="wadi-fuzz-") as place:
        for kind in kinds:
            figures = report["kinds"].setdefault(kind, empty(kind))
            wanted = max(1, round(KINDS[kind].count * share))
            good = Path(place) / "good"
            good.mkdir(exist_ok=True)
            check_good_files(kind, good)  # here, for all workers
            while figures["done"] < wanted:
                numbers = range(figures["done"], min(figures["done"] + BATCH, wanted))
                for number, found in tried(kind, numbers, Path(place)):
                    count(figures, kind, number, found)
                write_json(state, report)
            logger.info("%s: %s", kind, ", ".join(f"{figures[outcome]} {outcome}" for outcome in OUTCOMES))
    return report


def again(only: str) -> int:
    """One file again in this process: what was done, what came, and the traceback."""
    kind, _, number = only.rpartition(":")
    if kind not in KINDS or not number.isdecimal():
        raise ValueError(f"--only takes KIND:NUMBER with one of {', '.join(KINDS)}, not {only}")
    sample, content, name, damage = damaged(kind, int(number))
    with tempfile.TemporaryDirectory(prefix="wadi-fuzz-") as folder:
        found = attempt(kind, int(number), Path(folder))
        sys.stdout.write(f"{damage}\n{content[:2000]!r}\n{found.outcome}: {found.why}\n")
        for other, text in {**sample.beside, name: content}.items():
            (Path(folder) / other).write_bytes(text)
        try:
            KINDS[kind].use(KINDS[kind].read(Path(folder) / name))
        except Exception:  # shown as it is: that is what --only is for
            traceback.print_exc()
    return 1 if found.outcome == FAILED else 0


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    titles = ("kind of file", "tried", "read", "refused", "refused in use", "outside the contract", "slowest", "memory")
    rows = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
    total = dict.fromkeys(("done", *OUTCOMES), 0)
    for kind, found in report["kinds"].items():
        for name in total:
            total[name] += found[name]
        figures = " | ".join(f"{found[name]:,}" for name in total)
        rows.append(f"| {kind} | {figures} | {found['slowest']:.2f} s | {found['grown'] / 1e6:.0f} MB |")
    seconds = sum(found["seconds"] for found in report["kinds"].values())
    rows.append("| **all** | " + " | ".join(f"{total[name]:,}" for name in total) + f" | {seconds / 60:.0f} min in all | |")
    return "\n".join(rows) + "\n"


def put(page: Path, text: str) -> None:
    """The table into its place in a page.

    Raises:
        ValueError: the page has no such place.
    """
    whole = page.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: the lines {BEGIN} and {END} are missing")
    page.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 1 if anything was outside the contract."""
    take_any_text()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--state", type=Path, default=Path("runs/fuzz.json"), metavar="FILE", help="the figures (default: runs/fuzz.json)")
    add("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)}")
    add("--share", type=float, default=1.0, help="of the files of each kind (default: 1, all)")
    add("--only", metavar="KIND:NUMBER", help="one file, with what was done to it and the traceback")
    add("--page", type=Path, metavar="FILE", help="put the figures of --state into this page, and leave")
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when diffusers is imported, for the first good file
    torch.set_num_threads(1)
    try:
        if options.only:
            return again(options.only)
        if options.page:
            put(options.page, table(json.loads(options.state.read_text())))
            return 0
        report = run(options.state, options.kinds, options.share)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(table(report))
    return 1 if any(found[FAILED] for found in report["kinds"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
