"""Prompts out of every kind of file: what is read, what is told, and what is refused in one sentence."""

from __future__ import annotations

import codecs
import json
import logging
import re
import sys
from pathlib import Path

import pytest

from trainer.data.examples import Examples
from trainer.data.prompts import PromptList, Prompts
from wadi_core.prompt_files import read_prompts, without_midjourney_settings

FOUR = ["a cat", "a dog on a sofa", "ein grünes Haus", "a red apple, macro photograph"]
TWO = ["a red apple, on a table", "a cat"]
LATIN = "caf\xe9\n".encode("latin-1")


def utf16(text: str, mark: bytes = codecs.BOM_UTF16_LE, encoding: str = "utf-16-le") -> bytes:
    return mark + text.encode(encoding)


READ = [
    # id, name, content, field, prompts
    ("txt-mark-and-windows-lines", "a.txt", "\ufeffa cat\r\n\n  a dog \t x \r\nb".encode(), None, ["a cat", "a dog x", "b"]),
    ("txt-lone-carriage-returns", "a.txt", b"a cat\ra dog\r\rx", None, ["a cat", "a dog", "x"]),
    ("txt-line-separator", "a.txt", "a red apple\u2028on a table\n".encode(), None, ["a red apple on a table"]),
    ("txt-paragraph-separator", "a.txt", "a\u2029b\nc\n".encode(), None, ["a b", "c"]),
    ("txt-next-line", "a.txt", "a cat\x85sleeping\n".encode(), None, ["a cat sleeping"]),
    ("txt-form-feed", "a.txt", b"a dog\x0crunning\n", None, ["a dog running"]),
    ("txt-vertical-tab", "a.txt", b"a dog\x0brunning\n", None, ["a dog running"]),
    ("txt-file-group-record", "a.txt", b"a\x1cb\x1dc\x1ed\n", None, ["a b c d"]),
    ("txt-only-separators-is-blank", "a.txt", "\x1c\n\u2028\na\n".encode(), None, ["a"]),
    ("txt-number-sign-is-no-comment", "a.txt", b"# a cat\na dog\n", None, ["# a cat", "a dog"]),
    ("txt-upper-case-ending", "A.TXT", b"a cat\n", None, ["a cat"]),
    ("txt-utf16-of-windows", "a.txt", utf16("ein grünes Haus\r\na cat\r\n"), None, ["ein grünes Haus", "a cat"]),
    ("txt-utf16-big", "a.txt", utf16("日本\n", codecs.BOM_UTF16_BE, "utf-16-be"), None, ["日本"]),
    ("txt-utf32", "a.txt", utf16("日本\n", codecs.BOM_UTF32_LE, "utf-32-le"), None, ["日本"]),
    ("csv-semicolon", "a.csv", b"id;prompt\n1;a red apple, on a table\n2;a cat\n", None, TWO),
    ("csv-semicolon-mark", "a.csv", "\ufeffprompt;style\r\na cat;oil\r\n".encode(), None, ["a cat"]),
    ("csv-tab", "a.csv", b"id\tprompt\n1\ta red apple, on a table\n2\ta cat\n", None, TWO),
    ("csv-bar", "a.csv", b"id|prompt\n1|a red apple, on a table\n2|a cat\n", None, TWO),
    ("csv-sep-line", "a.csv", b"sep=;\r\nid;prompt\r\n1;a red apple, on a table\r\n2;a cat\r\n", None, TWO),
    ("csv-sep-line-quoted", "a.csv", b'"SEP=|"\nid|prompt\n1|a, b\n', None, ["a, b"]),
    ("csv-sep-line-tab", "a.csv", b"sep=\t\nid\tprompt\n1\ta, b\n", None, ["a, b"]),
    ("csv-excel-unicode-text", "a.csv", utf16("id\tprompt\r\n1\ta red apple, on a table\r\n2\ta cat\r\n"), None, TWO),
    ("csv-semicolon-one-column-commas", "a.csv", b'prompt\n"a red apple, on a table"\na cat\n', None, TWO),
    ("csv-quotes-in-quotes", "a.csv", b'prompt,style\n"a ""big"" cat",oil\n', None, ['a "big" cat']),
    ("csv-quoted-newline", "a.csv", b'id,prompt\n1,"a cat\non a mat"\n2,b\n', None, ["a cat on a mat", "b"]),
    ("csv-quoted-carriage-return", "a.csv", b'id,prompt\r1,"a\rb"\r2,c\r', None, ["a b", "c"]),
    ("csv-space-before-quote", "a.csv", b'id, prompt\n1, "a red apple, on a table"\n2, a cat\n', None, TWO),
    ("csv-empty-cells-at-the-end", "a.csv", b"id,prompt\n1,a cat,,,\n,,\n2,b\n", None, ["a cat", "b"]),
    ("csv-line-separator-in-a-cell", "a.csv", "id,prompt\n1,a\u2028b\x85c\x0cd\n".encode(), None, ["a b c d"]),
    ("csv-title-in-any-case", "a.csv", b"ID, Prompt \n1,a cat\n", None, ["a cat"]),
    ("csv-title-upper-case", "a.csv", b"CAPTION,id\na cat,1\n", None, ["a cat"]),
    ("csv-field-in-any-case", "a.csv", b"id, Long Text \n1,a cat\n", "long text", ["a cat"]),
    ("csv-field-decides-delimiter", "a.csv", b"id;words\n1;a, b\n", "words", ["a, b"]),
    ("csv-sep-line-colon", "a.csv", b"sep=:\nid:prompt\n1:a cat\n", None, ["a cat"]),
    ("csv-one-column-no-title", "a.csv", b'a cat\n"a dog, running"\n', None, ["a cat", "a dog, running"]),
    ("csv-prompt-wins", "a.csv", b"text,caption,prompt\nx,y,a cat\n", None, ["a cat"]),
    ("csv-blank-title", "a.csv", b",prompt\n0,a cat\n", None, ["a cat"]),
    ("tsv", "a.tsv", b"id\tprompt\n1\ta red apple, on a table\n2\ta cat\n", None, TWO),
    ("tsv-with-semicolons", "a.tsv", b"id;prompt\n1;a cat\n", None, ["a cat"]),
    ("jsonl", "a.jsonl", b'{"id": 1, "caption": "a cat"}\r\n\r\n{"caption": "b"}', None, ["a cat", "b"]),
    ("jsonl-strings", "a.ndjson", b'"a cat"\n"b"\n', None, ["a cat", "b"]),
    ("jsonl-newline-in-text", "a.jsonl", b'{"text": "a cat\\non a mat"}', None, ["a cat on a mat"]),
    ("jsonl-line-separator", "a.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), None, ["a b c"]),
    ("jsonl-dotted", "a.jsonl", b'{"caption": "no", "meta": {"long": "a cat"}}', "meta.long", ["a cat"]),
    ("jsonl-dot-in-the-key", "a.jsonl", b'{"meta.long": "a cat"}', "meta.long", ["a cat"]),
    ("jsonl-key-in-any-case", "a.jsonl", b'{"Prompt": "a"}\n{"PROMPT ": "b"}\n', None, ["a", "b"]),
    ("jsonl-prompt-before-caption", "a.jsonl", b'{"caption": "no", "Prompt": "a cat"}', None, ["a cat"]),
    ("json-list-of-strings", "a.json", b'["a cat", "b"]', None, ["a cat", "b"]),
    ("json-list-of-objects", "a.json", b'[{"caption": "a cat"},\n {"caption": "b"}]', None, ["a cat", "b"]),
    ("json-object-with-list", "a.json", b'{"name": "x", "prompts": ["a cat", "b"]}', None, ["a cat", "b"]),
    ("json-object-with-objects", "a.json", b'{"data": [{"text": "a cat"}]}', None, ["a cat"]),
    ("json-one-object", "a.json", b'\xef\xbb\xbf{"prompt": "a cat"}', None, ["a cat"]),
    ("json-utf16", "a.json", utf16('["a cat", "b"]'), None, ["a cat", "b"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "field", "prompts"), [row[1:] for row in READ], ids=[row[0] for row in READ])
def test_what_is_read(tmp_path: Path, name: str, content: bytes, field: str | None, prompts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_prompts(tmp_path / name, field)) == prompts


REFUSED = [
    # id, name, content, field, message
    ("txt-latin-bytes", "a.txt", b"one\ntwo\n" + LATIN, None, "line 3 is no UTF-8 text: save the file as UTF-8"),
    ("txt-latin-after-carriage-returns", "a.txt", b"one\rtwo\r" + LATIN, None, "line 3 is no UTF-8 text"),
    ("txt-latin-after-line-separator", "a.txt", "one\u2028x\n".encode() + LATIN, None, "line 2 is no UTF-8 text"),
    ("txt-bad-after-a-replacement-sign", "a.txt", "\ufffd\n".encode() + LATIN, None, "line 2 is no UTF-8 text"),
    ("txt-cut-inside-a-letter", "a.txt", "a\nü".encode()[:-1], None, "line 2 is no UTF-8 text"),
    ("txt-utf16-cut", "a.txt", utf16("one\ntwo")[:-1], None, "line 2 is no UTF-16 text"),
    ("txt-utf16-without-mark", "a.txt", "one\ntwo".encode("utf-16-le"), None, "line 1 holds a NUL"),
    ("txt-binary", "a.txt", b"\x89PNG\r\n\x1a\n\0\0\0", None, "line 1 is no UTF-8 text"),
    ("txt-empty", "a.txt", b"", None, "no prompt in this file"),
    ("txt-mark-alone", "a.txt", b"\xef\xbb\xbf", None, "no prompt in this file"),
    ("txt-blank", "a.txt", "\n \n\u2028\n".encode(), None, "no prompt in this file"),
    ("csv-comma-in-the-only-column", "a.csv", b"prompt\na red apple, on a table, 4k\na cat\n", None, "line 2 has 3 cells"),
    ("csv-comma-in-the-last-column", "a.csv", b"id,prompt\n1,a red apple, on a table\n2,a cat\n", None, "line 2 has 3 cells"),
    ("csv-comma-in-the-first-column", "a.csv", b"prompt,id\na cat,1\na dog, running,2\n", None, "line 3 has 3 cells"),
    ("csv-comma-without-title", "a.csv", b"a cat\na dog, running\n", None, "line 2 has 2 cells, and the first row has 1"),
    ("csv-comma-after-blank-titles", "a.csv", b"prompt,,\na dog, running,\n", None, "line 2 has 3 cells"),
    ("csv-semicolon-in-semicolons", "a.csv", b"id;prompt\n1;a; b\n", None, "a prompt that holds ';' needs quotation marks"),
    ("csv-tab-in-tabs", "a.tsv", b"id\tprompt\n1\ta\tb\n", None, "a prompt that holds a tab needs quotation marks"),
    ("csv-comma-in-a-first-prompt", "a.csv", b"a dog, running\na cat\n", None, "there are: a dog, running"),
    ("csv-semicolon-in-a-first-prompt", "a.csv", b"a dog; running\na cat\n", None, "None is called prompt, caption, text"),
    ("csv-unknown-delimiter", "a.csv", b"id:prompt\n1:a cat\n", None, "is 'id:prompt' a title, or a prompt"),
    ("csv-title-almost", "a.csv", b"Prompts\na cat\n", None, "is 'Prompts' a title, or a prompt"),
    ("csv-unknown-titles", "a.csv", b"x,y\n1,2\n", None, "None is called prompt, caption, text; there are: x, y"),
    ("csv-unknown-titles-semicolon", "a.csv", b"id;words\n1;a\n", None, "there are: id, words"),
    ("csv-two-delimiters", "a.csv", b"prompt;text,caption\na;b,c\n", None, "cells may be parted by ',' or ';'"),
    ("csv-sep-of-a-letter", "a.csv", b"sep=a\npromptaid\n", None, "line 1 names 'a'"),
    ("csv-same-title-twice", "a.csv", b"prompt,Prompt\na,b\n", None, "2 of its fields are called 'prompt'"),
    ("csv-no-such-column", "a.csv", b"id,prompt\n1,a\n", "words", "there is no column 'words'; there are: id, prompt"),
    ("csv-never-closed", "a.csv", b'prompt\n"never closed', None, "is not CSV"),
    ("csv-text-after-quotes", "a.csv", b'prompt\n"a" cat\n', None, "line 2 is not CSV"),
    ("csv-nul", "a.csv", b"prompt\na\0b\n", None, "line 2 holds a NUL"),
    ("csv-latin-bytes", "a.csv", b"prompt\na\n" + LATIN, None, "line 3 is no UTF-8 text"),
    ("csv-titles-alone", "a.csv", b"id,prompt\n", None, "no prompt in this file"),
    ("jsonl-cut", "a.jsonl", b'{"prompt": "a"}\n{"prompt": "b', None, "line 2 is not JSON: .* is the file cut short"),
    ("jsonl-python-quotes", "a.jsonl", b"{'prompt': 'a'}\n", None, "line 1 is not JSON"),
    ("jsonl-unknown-keys", "a.jsonl", b'{"words": "a"}\n', None, "None is called prompt, caption, text; there are: words"),
    ("jsonl-lists", "a.jsonl", b"[1]\n", None, "no prompt in this file"),
    ("jsonl-key-twice", "a.jsonl", b'{"prompt": "a", "Prompt": "b"}\n', None, "2 of its fields are called 'prompt'"),
    ("jsonl-under-a-key", "a.jsonl", b'{"prompt": "a"}\n', "words", "no prompt in this file under 'words'"),
    ("jsonl-deep", "a.jsonl", b"[" * 100_000, None, "line 1 is not JSON that can be read"),
    ("jsonl-latin-bytes", "a.jsonl", b'{"prompt": "caf\xe9"}\n', None, "line 1 is no UTF-8 text"),
    ("json-cut", "a.json", b'["a",\n "b', None, "line 2 is not JSON"),
    ("json-lines", "a.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', None, "line 2 is not JSON: .* is a .jsonl"),
    ("json-two-lists", "a.json", b'{"prompts": ["a"], "captions": ["b"]}', None, "which of its lists"),
    ("json-empty", "a.json", b"", None, "line 1 is not JSON"),
    ("json-number", "a.json", b"5", None, "no prompt in this file"),
    ("parquet-text", "a.parquet", b"no parquet", None, "no whole Parquet file"),
    ("archive", "a.jsonl.tgz", b"\x1f\x8b", None, "unpack it first"),
    ("other-kind", "a.docx", b"PK", None, "prompts are read from .txt, .jsonl"),
    ("no-ending", "prompts", b"a cat", None, "prompts are read from .txt, .jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "field", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, field: str | None, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        PromptList.read(tmp_path / name, field)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / name))


TOLD = [
    # id, name, content, prompts, message
    ("jsonl-missing", "a.jsonl", b'{"caption":"a"}\n{"text":"b"}\n\n{"caption":null}\n', ["a"], "2 of its .*: line 2, 4$"),
    ("jsonl-blank", "a.jsonl", b'{"caption":"a"}\n{"caption":" "}\n', ["a"], "1 of its entries hold no text .*: line 2$"),
    ("jsonl-list", "a.jsonl", b'{"caption":["x","y"]}\n{"caption":"a"}\n', ["a"], "1 of its entries .*: line 1$"),
    ("jsonl-number", "a.jsonl", b'{"caption":5}\n7\n"a"\n', ["a"], "2 of its entries .*: line 1, 2$"),
    ("jsonl-half-of-a-pair", "a.jsonl", b'{"prompt": "a \\ud800 cat"}\n{"prompt": "b"}\n', ["b"], "line 1$"),
    ("jsonl-many", "a.jsonl", b'"a"\n' + b"5\n" * 9, ["a"], "9 of its entries .*: line 2, 3, 4, 5, 6 and more$"),
    ("json-null", "a.json", b'[null, "a"]', ["a"], "1 of its entries .*: entry 1$"),
    ("csv-short-row", "a.csv", b"id,prompt\n1\n2,a\n", ["a"], "1 of its entries .*: line 2$"),
    ("csv-blank-cell", "a.csv", b"id,prompt\n1,a\n2, \n", ["a"], "1 of its entries .*: line 3$"),
    ("csv-two-fitting-titles", "a.csv", b"caption,prompt\nb,a\n", ["a"], "those under 'prompt'; there is caption too"),
    ("jsonl-two-fitting-keys", "a.jsonl", b'{"text":"b","caption":"a"}', ["a"], "those under 'caption'; there is text too"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "prompts", "message"), [row[1:] for row in TOLD], ids=[row[0] for row in TOLD])
def test_what_is_left_out_is_told(
    tmp_path: Path, name: str, content: bytes, prompts: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.WARNING, "wadi"):
        assert list(read_prompts(tmp_path / name)) == prompts
    (record,) = caplog.records
    assert record.getMessage().startswith(str(tmp_path / name)) and re.search(message, record.getMessage())


@pytest.mark.parametrize(
    "content", [row[2] for row in READ if row[1] == "a.txt"], ids=[row[0] for row in READ if row[1] == "a.txt"]
)
def test_captions_of_pictures_have_the_same_lines(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture is read here")
    (tmp_path / "a.txt").write_bytes(content)
    found = Examples.read(str(tmp_path), (), lambda caption: None)
    assert list(found.captions[0]) == list(read_prompts(tmp_path / "a.txt")) == list(PromptList.read(tmp_path / "a.txt"))


def test_captions_that_are_no_text_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture is read here")
    (tmp_path / "a.txt").write_bytes(b"one\n" + LATIN)
    with pytest.raises(ValueError, match=r"a\.txt: line 2 is no UTF-8 text"):
        Examples.read(str(tmp_path), (), lambda caption: None)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    texts = pyarrow.array([*FOUR, None])
    columns = {"id": range(5), " Text ": texts, "other": texts.dictionary_encode()}
    parquet.write_table(pyarrow.table(columns), path)
    assert list(read_prompts(path)) == list(read_prompts(path, "other")) == list(read_prompts(path, "OTHER")) == FOUR
    with pytest.raises(ValueError, match="there is no column 'none'; there are: id, Text, other"):
        list(read_prompts(path, "none"))
    with pytest.raises(ValueError, match="its column 'id' holds int64, no text"):
        list(read_prompts(path, "id"))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="no whole Parquet file"):
        list(read_prompts(path))
    refused = 0
    for place in range(0, len(whole), 11):  # a damaged byte, which the package tells in many ways
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xAA]) + whole[place + 1 :])
        try:
            list(read_prompts(path))
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert refused > 30


def test_parquet_without_its_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"need the package pyarrow: python -m pip install pyarrow$"):
        list(read_prompts(tmp_path / "a.parquet"))


def test_a_folder_of_captions(tmp_path: Path) -> None:
    files = {"b/2.txt": FOUR[2], "a/1.caption": "a dog\non a sofa\n", "a/0.txt": FOUR[0], "c.jsonl": '"one more"'}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name in ("a/0.png", ".hidden.txt", "a/notes.md", "a/0.json"):
        (tmp_path / name).write_text("nothing to read")
    assert list(read_prompts(tmp_path)) == ["one more", "a cat", "a dog on a sofa", "ein grünes Haus"]


def test_journeydb(tmp_path: Path) -> None:
    raw = ["https://s.mj.run/x1 a cat, cinematic --ar 16:9 --v 5", "a well-known dog \u2014ar 2:3", "a cat, cinematic --v 4"]
    entries = [{"img_path": "./a.jpg", "prompt": text, "Task2": {"Caption": f"caption {i}"}} for i, text in enumerate(raw)]
    path = tmp_path / "train_anno.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    assert list(read_prompts(path)) == ["a cat, cinematic", "a well-known dog"]  # once, however many pictures there are
    assert list(read_prompts(path, "Task2.Caption")) == ["caption 0", "caption 1", "caption 2"]
    assert without_midjourney_settings("--ar 1:1") == ""


def test_missing_files_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Prompts(tmp_path / "none.txt", 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no prompt in this folder"):
        Prompts(tmp_path / "empty", 0)
