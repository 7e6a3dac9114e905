"""Reading prompts out of the files that people have them in, one at a time, whatever the size of the file.

| ending | what is read |
|---|---|
| `.txt` | one prompt a line |
| `.jsonl`, `.ndjson` | an object a line, or a JSON string a line; JourneyDB's annotations are known by their keys |
| `.json` | a list of objects or strings, or an object that holds one under `prompts` or the like |
| `.csv`, `.tsv` | a column; a file of a single column needs no title |
| `.parquet` | a column (needs the package pyarrow) |
| a folder | each `.txt` and `.caption` below it is the caption of one picture, the other kinds but `.json` are read as above |

A key or column is found by its name (prompt, caption or text, in this order, in any letter case), or named by the user;
a key inside another one is written with a dot, as in ``Task2.Caption``. The command line, the trainer and the evaluation
read prompts here and nowhere else, so that a file holds the same prompts for all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from .delimited import FIELDS, find_field, read_column, same_name
from .files import existing_file, refusal
from .packages import install
from .text_files import is_text, read_lines, tidy

logger = logging.getLogger("wadi")

CAPTION_ENDINGS = (".txt", ".caption")
LISTS = ("prompts", "captions", "texts", *FIELDS, "data")  # keys of a JSON object that hold all entries
PARQUET_ROWS = 4096  # at once
NAMED = 5  # entries without text that a warning names

Entries = Iterator[tuple[int, Any]]  # the number of each line, entry or row, and what should be its prompt


class Reader(NamedTuple):
    """How a kind of file is read: its entries, and what their numbers count."""

    entries: Callable[[Path, str | None], Entries]
    counted: str


# Midjourney's own words in JourneyDB's prompts: addresses of pictures at the start, settings at the end.
_ADDRESS = re.compile(r"https?://\S+")
_SETTINGS = re.compile(r"\s(?:--|\u2014)[A-Za-z].*$")


def read_prompts(source: str | os.PathLike[str], field: str | None = None) -> Iterator[str]:
    """The prompts of a file or folder in its order, each one line.

    Blank lines are left out. Entries without text are left out too, and a warning says how many and where.

    Args:
        source: see the table above.
        field: name of the key or column; found by itself if not given.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: it is of no known kind, damaged, or holds no prompt. Both with a message of one line.
    """
    path = Path(source)
    empty = True
    for prompt in _folder(path, field) if path.is_dir() else _file(existing_file(path), field):
        empty = False
        yield prompt
    if empty:
        kind = "folder" if path.is_dir() else "file"
        raise refusal(path, f"there is no prompt in this {kind}{f' under {field!r}' if field else ''}")


def files_of(folder: Path) -> Iterator[Path]:
    """The files with prompts below a folder, in an order that is the same on every machine.

    A ``.json`` there is what a program noted of a picture or of the whole folder, and the caption lies beside it.
    """
    endings = (*CAPTION_ENDINGS, *(ending for ending in _READERS if ending != ".json"))
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(endings):
                yield Path(here, name)


def is_journeydb(record: Any) -> bool:
    """Whether this is an entry of JourneyDB's annotation file."""
    return isinstance(record, dict) and "img_path" in record and "prompt" in record and "Task2" in record


def without_midjourney_settings(prompt: str) -> str:
    """The words of a Midjourney prompt that describe the picture."""
    return tidy(_SETTINGS.sub("", _ADDRESS.sub("", " " + tidy(prompt))))


def _folder(folder: Path, field: str | None) -> Iterator[str]:
    for path in files_of(folder):
        if path.suffix.lower() not in CAPTION_ENDINGS:
            yield from _file(path, field)
        elif caption := tidy(" ".join(read_lines(path))):
            yield caption


def _file(path: Path, field: str | None) -> Iterator[str]:
    reader = _reader_of(path)
    without, count = [], 0
    for number, value in reader.entries(path, field):
        prompt = tidy(value) if isinstance(value, str) and is_text(value) else ""
        if prompt:
            yield prompt
        else:
            count += 1
            without += [str(number)] if count <= NAMED else []
    if count:
        places = f"{reader.counted} {', '.join(without)}" + (" and more" if count > NAMED else "")
        under = f" under {field!r}" if field else ""
        logger.warning("%s: %d of its entries hold no text%s and are left out: %s", path, count, under, places)


def _reader_of(path: Path) -> Reader:
    name = path.name.lower()
    if name.endswith((".tgz", ".tar.gz", ".gz", ".zip")):
        raise refusal(path, "prompts are not read out of an archive: unpack it first")
    for ending, reader in _READERS.items():
        if name.endswith(ending):
            return reader
    raise refusal(path, f"prompts are read from {', '.join(_READERS)} and folders of captions")


def _text(path: Path, field: str | None) -> Entries:
    return ((number, line) for number, line in enumerate(read_lines(path), 1) if not line.isspace())


# JSON


def _json_lines(path: Path, field: str | None) -> Entries:
    lines = ((number, line.strip()) for number, line in enumerate(read_lines(path), 1))
    return _values(path, ((number, _parsed(path, line, number)) for number, line in lines if line), field)


def _json(path: Path, field: str | None) -> Entries:
    whole = _parsed(path, "".join(read_lines(path)), None)
    lists = [key for key in LISTS if isinstance(whole, dict) and isinstance(whole.get(key), list)]
    if len(lists) > 1:
        raise refusal(path, f"which of its lists holds the prompts: {', '.join(lists)}?")
    records = whole[lists[0]] if lists else whole if isinstance(whole, list) else [whole]
    return _values(path, enumerate(records, 1), field)


def _parsed(path: Path, text: str, line: int | None) -> Any:
    """The JSON value of a text, which is a line of the file, or all of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if line is None and error.msg == "Extra data":
            why = "a second value begins: a file of one object a line is a .jsonl"
        else:
            why = f"{error.msg} at column {error.colno}; is the file cut short?"
        raise refusal(path, f"line {line or error.lineno} is not JSON: {why}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise refusal(path, f"{f'line {line}' if line else 'this'} is not JSON that can be read: {error}") from None


def _values(path: Path, records: Iterable[tuple[int, Any]], field: str | None) -> Entries:
    """What stands in each record under the field, which the first record shows if nobody names it."""
    journeydb: bool | None = None
    seen: set[int] = set()
    count = 0
    for count, (number, record) in enumerate(records, 1):  # noqa: B007 - told at the end
        if journeydb is None:
            journeydb = is_journeydb(record)
        if field is None and isinstance(record, dict):
            field = find_field(path, list(record), None)
        value = record if isinstance(record, str) else _under(record, field)
        if journeydb and isinstance(value, str):
            value = without_midjourney_settings(value)
            if (mark := _mark(value)) in seen:
                continue
            seen.add(mark)
        yield number, value
    if journeydb:
        logger.info("%s: %d different prompts of %d pictures", path, len(seen), count)


def _under(record: Any, field: str | None) -> Any:
    """What an object holds under a key, in any letter case, which may lead into objects inside it."""
    if not isinstance(record, dict) or field is None:
        return None
    if field in record:
        return record[field]
    if (name := next((key for key in record if same_name(key, field)), None)) is not None:
        return record[name]
    outer, dot, inner = field.partition(".")
    return _under(record.get(outer), inner) if dot else None


def _mark(prompt: str) -> int:
    """64 bits of a hash: of two million prompts, one is lost to a coincidence with a chance of 1 in 10 million."""
    return int.from_bytes(hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=8).digest(), "little")


# Tables


def _parquet(path: Path, field: str | None) -> Entries:
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError:
        raise refusal(path, f"Parquet files need the package pyarrow: {install('pyarrow')}") from None
    try:
        # A generator must not leave the file open for as long as it is not exhausted.
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            name = find_field(path, schema.names, field)
            column = schema.field(name).type
            kind = column.value_type if types.is_dictionary(column) else column
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise refusal(path, f"its column {name!r} holds {kind}, no text")
            batches = file.iter_batches(PARQUET_ROWS, columns=[name])
            values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            yield from enumerate(values, 1)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's own
            raise
        raise refusal(path, f"this is no whole Parquet file: {error}") from None


_READERS = {
    ".txt": Reader(_text, "line"),
    ".jsonl": Reader(_json_lines, "line"),
    ".ndjson": Reader(_json_lines, "line"),
    ".json": Reader(_json, "entry"),
    ".csv": Reader(read_column, "line"),
    ".tsv": Reader(read_column, "line"),
    ".parquet": Reader(_parquet, "row"),
}
