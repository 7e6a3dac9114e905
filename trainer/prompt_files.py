"""Reading prompts out of the files that people have them in, one at a time, whatever the size of the file.

| ending | what is read |
|---|---|
| `.txt` | one prompt a line |
| `.jsonl`, `.ndjson` | an object a line, or a JSON string a line; JourneyDB's annotations are known by their keys |
| `.csv`, `.tsv` | a column; a file of a single column needs no title |
| `.parquet` | a column (needs the package pyarrow) |
| a folder | each `.txt` and `.caption` below it is the caption of one picture, the other kinds are read as above |

A key or column is found by its name (prompt, caption or text, in this order), or named by the user; a key inside
another one is written with a dot, as in ``Task2.Caption``.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from wadi_core.files import existing_file, refusal
from wadi_core.packages import install

logger = logging.getLogger("wadi")

FIELDS = ("prompt", "caption", "text")
CAPTION_ENDINGS = (".txt", ".caption")
LONGEST_CELL = 1 << 24  # characters in a cell of a table; more is a quotation mark that is never closed
PARQUET_ROWS = 4096  # at once

# Midjourney's own words in JourneyDB's prompts: addresses of pictures at the start, settings at the end.
_ADDRESS = re.compile(r"https?://\S+")
_SETTINGS = re.compile(r"\s(?:--|\u2014)[A-Za-z].*$")


def tidy(text: str) -> str:
    """A prompt as one line, without spaces around it."""
    return " ".join(text.split())


def read_prompts(source: str | os.PathLike[str], field: str | None = None) -> Iterator[str]:
    """The prompts of a file or folder in its order, each one line; empty ones are left out.

    Args:
        source: see the table above.
        field: name of the key or column; found by itself if not given.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: it is of no known kind, or damaged. Both with a message of one line.
    """
    path = Path(source)
    return (line for line in map(tidy, _read(path, field)) if line)


def is_journeydb(record: Any) -> bool:
    """Whether this is an entry of JourneyDB's annotation file."""
    return isinstance(record, dict) and "img_path" in record and "prompt" in record and "Task2" in record


def repeats_prompts(source: str | os.PathLike[str]) -> bool:
    """Whether a file says the same prompt once for each picture that was made of it, as JourneyDB's does."""
    path = Path(source)
    if path.suffix.lower() not in (".jsonl", ".ndjson") or not path.is_file():
        return False
    return is_journeydb(next(_records(path), None))


def without_midjourney_settings(prompt: str) -> str:
    """The words of a Midjourney prompt that describe the picture."""
    return tidy(_SETTINGS.sub("", _ADDRESS.sub("", " " + tidy(prompt))))


def files_of(folder: Path) -> Iterator[Path]:
    """The files with prompts below a folder, in an order that is the same on every machine."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith((*CAPTION_ENDINGS, *_READERS)):
                yield Path(here, name)


def _read(path: Path, field: str | None) -> Iterator[str]:
    if not path.is_dir():
        return _reader_of(existing_file(path))(path, field)
    return _folder(path, field)


def _reader_of(path: Path) -> Callable[[Path, str | None], Iterator[str]]:
    name = path.name.lower()
    if name.endswith((".tgz", ".tar.gz", ".gz", ".zip")):
        raise refusal(path, "prompts are not read out of an archive: unpack it first")
    for ending, reader in _READERS.items():
        if name.endswith(ending):
            return reader
    raise refusal(path, f"prompts are read from {', '.join(_READERS)} and folders of captions")


def _folder(folder: Path, field: str | None) -> Iterator[str]:
    for path in files_of(folder):
        if path.suffix.lower() in CAPTION_ENDINGS:
            yield " ".join(_lines(path))
        else:
            yield from _reader_of(path)(path, field)


def _lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """Lines of a text file in UTF-8, with or without a byte order mark; ``newline`` as :func:`open` takes it."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except UnicodeDecodeError:
        raise refusal(path, f"line {_first_bad_line(path)} is no UTF-8 text") from None


def _first_bad_line(path: Path) -> int:
    """Number of the first line that is no text; the decoder itself only knows its place in some block of bytes."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return number


def _text(path: Path, field: str | None) -> Iterator[str]:
    return _lines(path)


def _records(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_lines(path), 1):
        if line := line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise refusal(path, f"line {number} is not JSON ({error}); is the file cut short?") from None


def _json_lines(path: Path, field: str | None) -> Iterator[str]:
    clean, without = None, 0
    for record in _records(path):
        if clean is None:
            clean = without_midjourney_settings if is_journeydb(record) else str
        if field is None and isinstance(record, dict):
            field = _found(path, record)
        value = record if isinstance(record, str) else _value(record, field)
        if isinstance(value, str):
            yield clean(value)
        else:
            without += 1
    if without:
        logger.warning("%s: %d of its entries have no text under %r and are left out", path, without, field)


def _value(record: Any, field: str | None) -> Any:
    """What an object holds under a key, which may lead into objects inside it."""
    if isinstance(record, dict) and field in record:
        return record[field]
    for key in field.split(".") if field else ():
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _found(path: Path, names: Iterable[str]) -> str:
    """The first of :data:`FIELDS` among some names, however it is written."""
    names = list(names)
    for wanted in FIELDS:
        if found := next((name for name in names if name.strip().lower() == wanted), None):
            return found
    there = ", ".join(names) or "none"
    raise refusal(path, f"which of its fields holds the prompts? None is called {', '.join(FIELDS)}; there are: {there}")


def _table(path: Path, field: str | None) -> Iterator[str]:
    csv.field_size_limit(LONGEST_CELL)
    rows = csv.reader(_lines(path, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        column = None
        for row in rows:
            if not row:
                continue
            if column is None:
                column = _column(path, row, field)
                if len(row) == 1 and row[0].strip().lower() not in (*FIELDS, (field or "").lower()):
                    yield row[0]
            elif len(row) > column:
                yield row[column]
    except csv.Error as error:
        raise refusal(path, f"line {rows.line_num} is not {path.suffix[1:].upper()}: {error}") from None


def _column(path: Path, titles: list[str], field: str | None) -> int:
    names = [title.strip() for title in titles]
    if field is not None and field in names:
        return names.index(field)
    if field is not None:
        raise refusal(path, f"there is no column {field!r}; there are: {', '.join(names)}")
    return 0 if len(names) == 1 else names.index(_found(path, names))


def _parquet(path: Path, field: str | None) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise refusal(path, f"Parquet files need the package pyarrow: {install('pyarrow')}") from None
    try:
        # A generator must not leave the file open for as long as it is not exhausted.
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field is not None and field not in names:
                raise refusal(path, f"there is no column {field!r}; there are: {', '.join(names)}")
            column = field or _found(path, names)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                yield from (value for value in batch.column(0).to_pylist() if isinstance(value, str))
    except pyarrow.ArrowException as error:
        raise refusal(path, f"this is no whole Parquet file: {error}") from None


_READERS: dict[str, Callable[[Path, str | None], Iterator[str]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
