"""Damaged files of every kind: the same ones as in benchmarks/robustness/fuzz.py, a few hundred of each."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.robustness import damage
from benchmarks.robustness.fuzz_attempt import FAILED, READ, Attempt, attempt, check_good_files, damaged, samples
from benchmarks.robustness.fuzz_kinds import KINDS, Kind, demand
from benchmarks.robustness.fuzz_samples import Sample

COUNT = 300  # of each kind


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    check_good_files(kind, tmp_path)
    found = {number: attempt(kind, number, tmp_path) for number in range(COUNT)}
    wrong = [f"{kind}:{number} {one.damage}: {one.why}" for number, one in found.items() if one.outcome == FAILED]
    assert wrong == []
    assert len({one.outcome for one in found.values()}) > 1  # neither all read nor all refused
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_follows_from_its_number(kind: str) -> None:
    before = [damaged(kind, number)[1:] for number in range(30)]
    samples.cache_clear()
    assert [damaged(kind, number)[1:] for number in range(30)] == before
    assert len({content for content, _, _ in before}) > 15


def raises(error: type[Exception], text: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        raise error(text.format(path=path))

    return read


# Readers that break the contract, each in one way, and what is said of them.
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "several lines": (raises(ValueError, "{path}:\nno"), "no printable line"),
    "no end": (raises(ValueError, "{path}" + "no" * 400), "a message of"),
    "no name": (raises(OSError, "no"), "does not name the file"),
    "another error": (raises(KeyError, "no"), "KeyError at test_fuzz.py"),
    "a file left": (lambda path: path.with_name("left").touch(), "left behind: 'left'"),
    "the file changed": (lambda path: path.write_text("x"), "changed: a.txt"),
    "a warning": (lambda path: warnings.warn("no", stacklevel=1), "a warning of Python: no"),
    "not sound": (lambda path: demand(False, "no"), "read, but no"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_outside_the_contract_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    reader, said = BAD[case]
    kind = Kind(10, lambda: [Sample("a.txt", b"some text", damage.ANY)], reader, lambda found: None)
    monkeypatch.setitem(KINDS, "bad", kind)
    found = attempt("bad", 0, tmp_path)
    samples.cache_clear()
    assert found.outcome == FAILED and said in found.why


@pytest.mark.skipif(sys.platform != "linux", reason="the watched process is forked, its memory read from /proc")
def test_a_crash_and_a_hang_are_results_and_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch) -> None:
    from benchmarks.robustness import fuzz

    def tried(kind: str, number: int, folder: Path) -> Attempt:
        if number == 3:
            time.sleep(60)
        if number == 5:
            os._exit(7)
        if number == 6:
            os.write(2, b"a library says this\n" * 4)
        return Attempt(READ, "a way + another way")

    monkeypatch.setattr(fuzz, "attempt", tried)
    monkeypatch.setattr(fuzz, "HANG", 1.0)
    monkeypatch.setitem(KINDS, "numbers", Kind(8, lambda: [Sample("a.txt", b"good", damage.ANY)], bool, print))
    state = tmp_path / "fuzz.json"
    assert fuzz.run(state, ["numbers"], 0.5)["kinds"]["numbers"]["done"] == 4
    found = fuzz.run(state, ["numbers"], 1.0)["kinds"]["numbers"]
    assert (found["done"], found[READ], found[FAILED]) == (8, 5, 3)
    assert json.loads(state.read_text())["kinds"]["numbers"] == found
    assert [one["only"] for one in found["failures"]] == ["numbers:3", "numbers:5", "numbers:6"]
    whys = [one["why"] for one in found["failures"]]
    assert "longer than 1 s" in whys[0] and "ends the process (7)" in whys[1] and "a library says this" in whys[2]

    page = tmp_path / "page.md"
    page.write_text(f"before\n{fuzz.BEGIN}\nold\n{fuzz.END}\nafter\n")
    assert fuzz.main(["--state", str(state), "--page", str(page)]) == 0
    assert "| numbers | 8 | 5 | 0 | 0 | 3 |" in page.read_text() and "old" not in page.read_text()
    state.write_text(state.read_text().replace(fuzz.fingerprint(), "0" * 16))
    assert fuzz.main(["--state", str(state), "--kinds", "numbers"]) == 1  # figures of other code are not added to
