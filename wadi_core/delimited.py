"""Tables of text, .csv and .tsv: which sign parts the cells, and which column holds the prompts.

Excel writes semicolons in most of Europe, tabs as "Unicode text", and some programs a first line ``sep=;``. The sign is
found by the titles: it is the one that leaves a column with the name that is looked for. No cell is ever lost silently:
a row with more cells than titles is refused, as it comes from a prompt whose comma should have been quoted.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from .files import refusal
from .text_files import read_lines

logger = logging.getLogger("wadi")

FIELDS = ("prompt", "caption", "text")
DELIMITERS = (",", ";", "\t", "|")
NAMES = {"\t": "a tab", " ": "a space"}
LONGEST_CELL = 1 << 24  # characters; more is a quotation mark that is never closed

_SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)


def same_name(one: str, other: str) -> bool:
    """Whether two names of columns are the same for people: letter case and spaces around them do not count."""
    return one.strip().casefold() == other.strip().casefold()


def find_field(path: Path, names: Sequence[str], field: str | None) -> str:
    """The name, as it is written, of the field with the prompts.

    Args:
        names: of all fields.
        field: which one the user wants; None takes the first of :data:`FIELDS` that is there.

    Raises:
        ValueError: there is none, or several; one line.
    """
    if field is not None and names.count(field) == 1:
        return field
    wanted = FIELDS if field is None else (field,)
    found = {name: [one for one in names if same_name(one, name)] for name in wanted}
    fitting = [name for name in wanted if found[name]]
    if fitting:
        same = found[fitting[0]]
        if len(same) > 1:
            raise refusal(path, f"{len(same)} of its fields are called {fitting[0]!r}; rename those without prompts")
        if len(fitting) > 1:
            others = ", ".join(fitting[1:])
            logger.warning("%s: its prompts are those under %r; there is %s too", path, fitting[0], others)
        return same[0]
    there = ", ".join(name.strip() for name in names) or "none"
    if field is not None:
        raise refusal(path, f"there is no column {field!r}; there are: {there}")
    raise refusal(
        path,
        f"which of its fields holds the prompts? None is called {', '.join(FIELDS)}; there are: {there}. Rename one, or "
        "name it (--prompt-field; prompt_field of the trainer)",
    )


def read_column(path: Path, field: str | None) -> Iterator[tuple[int, str]]:
    """The cells of one column as (number of the line, text); rows without a cell there have the text "".

    A file of a single column needs no title.

    Raises:
        OSError: it cannot be read. ValueError: it is damaged, or its delimiter or column is unknown; one line.
    """
    csv.field_size_limit(LONGEST_CELL)
    delimiter, begin = _delimiter(path, field)
    column, width = None, 0
    for line, row in _rows(path, delimiter, begin):
        if column is None:
            width = max(place for place, cell in enumerate(row, 1) if cell.strip())  # Excel may write ",,," after it
            column, has_title = _column(path, row, field)
            if has_title:
                continue
        if len(row) > width and "".join(row[width:]).strip():
            sign = NAMES.get(delimiter, repr(delimiter))
            raise refusal(
                path,
                f"line {line} has {len(row)} cells, and the first row has {width}: a prompt that holds {sign} needs quotation "
                "marks around it (a file of one prompt a line is a .txt)",
            )
        yield line, row[column] if len(row) > column else ""


def _rows(path: Path, delimiter: str, begin: int) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank and the numbers of their (last) lines, after so many lines of the file."""
    lines = islice(read_lines(path, newline=""), begin, None)
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for row in rows:
            if "".join(row).strip():
                yield begin + rows.line_num, row
    except csv.Error as error:
        kind = path.suffix[1:].upper()
        raise refusal(path, f"line {begin + rows.line_num} is not {kind}: {error}") from None


def _delimiter(path: Path, field: str | None) -> tuple[str, int]:
    """The sign between cells, and how many lines stand before the table.

    Raises:
        ValueError: more than one sign would do, or none; one line.
    """
    first = next(read_lines(path, newline=""), "").rstrip("\r\n")
    if said := _SEPARATOR.fullmatch(first):
        if said[1].isalnum() or said[1] in '" ':
            raise refusal(path, f"line 1 names {said[1]!r} as the sign between cells, which cannot part them")
        return said[1], 1
    own = "\t" if path.suffix.lower() == ".tsv" else ","
    titles = {sign: _first_row(path, sign) for sign in sorted(DELIMITERS, key=lambda sign: sign != own)}
    wanted = FIELDS if field is None else (field,)
    fitting = [
        sign
        for sign, names in titles.items()
        if len(names) > 1 and any(same_name(name, one) for name in names for one in wanted)
    ]
    if len(fitting) > 1:
        signs = " or ".join(NAMES.get(sign, repr(sign)) for sign in fitting)
        raise refusal(path, f"cells may be parted by {signs}: begin the file with a line such as sep={fitting[0]}")
    # Without a title that fits, what splits the first line most says best what is there.
    return (fitting or [max(titles, key=lambda sign: len(titles[sign]))])[0], 0


def _first_row(path: Path, delimiter: str) -> list[str]:
    """The titles if this sign parts them; none where it makes no table."""
    try:
        return next((row for _, row in _rows(path, delimiter, 0)), [])
    except ValueError:
        return []


def _like_titles(text: str) -> bool:
    """Whether a line is no prompt by its looks: ``prompts``, ``prompt_en``, ``id:prompt``."""
    words = re.split(r"[\W_]+", text.strip().casefold())
    return len(text.split()) == 1 and any(word.removesuffix("s") in FIELDS for word in words)


def _column(path: Path, titles: list[str], field: str | None) -> tuple[int, bool]:
    """The place of the column with the prompts, and whether the first row holds titles."""
    if len(titles) == 1 and field is None and not any(same_name(titles[0], name) for name in FIELDS):
        if _like_titles(titles[0]):
            raise refusal(
                path,
                f"is {titles[0].strip()!r} a title, or a prompt? Rename a title to prompt; a first line such as sep=: names "
                "another sign between cells",
            )
        return 0, False
    return titles.index(find_field(path, titles, field)), True
