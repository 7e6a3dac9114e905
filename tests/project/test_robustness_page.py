"""docs/robustness.md: every row names tests that exist, and what it promises of the fuzz is what ran."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "robustness.md"
TITLES = ["kind of input", "what happens", "test"]


def tables() -> list[list[list[str]]]:
    """The tables of the page, as rows of cells; a bar inside a cell is written ``\\|``."""
    blocks = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [
        [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        for block in blocks
    ]


def rows() -> list[list[str]]:
    return [row for table in tables() if table[0] == TITLES for row in table[2:]]


def node_ids(cell: str) -> list[str]:
    return re.findall(r"`(tests/[^`]+)`", cell)


def with_functions(ids: set[str]) -> set[str]:
    """Ids of tests, and those of their functions without a case."""
    return ids | {one.partition("[")[0] for one in ids}


@pytest.fixture(scope="module")
def collected(request: pytest.FixtureRequest) -> set[str]:
    """The ids of the tests of this run; where it is one of a few files, those of the other files that the page names too."""
    named = {one for row in rows() for one in node_ids(row[2])}
    ids = with_functions({item.nodeid for item in request.session.items})
    files = sorted({one.partition("::")[0] for one in named - ids})
    assert [file for file in files if not (ROOT / file).is_file()] == []
    if files:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *files]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        ids |= with_functions({line for line in found.splitlines() if "::" in line})
    return ids


def test_every_row_names_tests_that_exist(collected: set[str]) -> None:
    assert all(len(row) == len(TITLES) and all(row) for row in rows())
    assert [row for row in rows() if not node_ids(row[2])] == []
    assert [one for row in rows() for one in node_ids(row[2]) if one not in collected] == []


def test_the_page_has_rows_enough_and_says_nothing_twice() -> None:
    assert len(rows()) >= 120
    inputs = [row[0] for row in rows()]
    assert sorted({one for one in inputs if inputs.count(one) > 1}) == []


def test_the_figures_of_the_fuzz_are_those_of_a_clean_run() -> None:
    (figures,) = [table for table in tables() if table[0][0] == "kind of file"]
    column = figures[0].index("outside the contract")
    assert {row[column] for row in figures[2:]} == {"0"}
    total = {row[0]: int(row[1].replace(",", "")) for row in figures[2:]}
    assert total["adapter"] >= 100_000 and total["**all**"] - total["adapter"] >= 20_000
