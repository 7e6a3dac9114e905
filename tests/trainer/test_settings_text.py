"""Settings as people type them, on the command line and in YAML files: what each becomes, or the line that refuses it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trainer.settings import cli
from trainer.settings import fields as settings
from trainer.settings.distillation import TrainConfig
from trainer.settings.fields import FilePath
from trainer.settings.finetuning import InvertConfig, PersonalizeConfig


@dataclass
class Example:
    """One field of each type."""

    path: FilePath = ""
    text: str = "x"
    count: int = 1
    rate: float = 0.5
    switch: bool = False
    words: tuple[str, ...] = ()
    paths: tuple[FilePath, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    perhaps: str | None = "there"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    monkeypatch.setenv("USERPROFILE", "/users/me")


def from_words(word: str, tmp_path: Path) -> Any:
    return settings.load(Example, None, [word])


def from_file(word: str, tmp_path: Path) -> Any:
    """The same value in a YAML file, unquoted."""
    path = tmp_path / "settings.yaml"
    path.write_text(word.replace("=", ": ", 1) + "\n", encoding="utf-8")
    return settings.load(Example, path)


BOTH = pytest.mark.parametrize("read", [from_words, from_file], ids=["word", "file"])

# What YAML would have taken for something else, or people mean as it stands.
READ = {
    "text=2024-06-01": "2024-06-01",
    "text=20240601": "20240601",
    "text=001": "001",
    "text=1_000": "1_000",
    "text=1e3": "1e3",
    "text=12:30": "12:30",
    "text=0x1F": "0x1F",
    "text=.5": ".5",
    "text=.nan": ".nan",
    "text=on": "on",
    "text=no": "no",
    "text=Yes": "Yes",
    "text=true": "true",
    "text=2001-12-14t21:59:43.10-05:00": "2001-12-14t21:59:43.10-05:00",
    "text==": "=",
    "text=a=b": "a=b",
    "text=日本語": "日本語",
    "text=C:\\models\\new": "C:\\models\\new",
    "path=/data/a b": "/data/a b",
    "path=~/runs/x": "/users/me/runs/x",
    "path=~backup/x": "~backup/x",
    "path=a/~/b": "a/~/b",
    "path=2024-06-01": "2024-06-01",
    "count=010": 10,
    "count=1e3": 1000,
    "count=1.5e1": 15,
    "count=1_000": 1000,
    "count=+7": 7,
    "count=-7": -7,
    "count=3.0": 3,
    "rate=1e-4": 1e-4,
    "rate=1E-4": 1e-4,
    "rate=.5": 0.5,
    "rate=5.": 5.0,
    "rate=010": 10.0,
    "rate=3": 3.0,
    "switch=true": True,
    "switch=YES": True,
    "switch=on": True,
    "switch=1": True,
    "switch=False": False,
    "switch=no": False,
    "switch=OFF": False,
    "switch=0": False,
    "words=[]": (),
    "words=[001, no, 2024-06-01, 'a, b', <R>]": ("001", "no", "2024-06-01", "a, b", "<R>"),
    "paths=[~/a.safetensors, b]": ("/users/me/a.safetensors", "b"),
    "sizes=[010, 1e2]": (10, 100),
    "perhaps=null": None,
    "perhaps=": None,
    "perhaps=no": "no",
    "text=": "",
}


@BOTH
@pytest.mark.parametrize(("word", "value"), READ.items(), ids=READ)
def test_a_value_is_read_by_the_type_of_its_setting(word: str, value: object, read: Any, tmp_path: Path) -> None:
    found = getattr(read(word, tmp_path), word.partition("=")[0])
    assert found == value and type(found) is type(value)


REFUSED = {
    "count=12:30": "count: a whole number is expected: '12:30' is no decimal number",
    "count=1.5": "count: a whole number is expected: '1.5' is no whole number",
    "count=0x10": "'0x10' is no decimal number",
    "count=0o17": "'0o17' is no decimal number",
    "count=1,000": "the decimal sign is a point",
    "count=１０": "is no decimal number",
    "count=1__0": "'1__0' is no decimal number",
    "count=10 %": "is no decimal number",
    "count=yes": "'yes' is no decimal number",
    "count=": "count: a whole number is expected: a number is missing",
    "count=1e999999999": "is too large",
    "count=" + "9" * 5000: "is no decimal number",
    "rate=nan": "rate: a number is expected: 'nan' is no decimal number",
    "rate=.inf": "'.inf' is no decimal number",
    "rate=-inf": "'-inf' is no decimal number",
    "rate=1e400": "'1e400' is too large",
    "rate=0,5": "rate: a number is expected: '0,5' is no decimal number: the decimal sign is a point",
    "rate=0. 5": "'0. 5' is no decimal number",
    "rate=1/2": "'1/2' is no decimal number",
    "rate=2024-06-01": "is no decimal number",
    "rate=true": "'true' is no decimal number",
    "switch=2": "switch: true or false is expected, not '2'",
    "switch=y": "switch: true or false is expected, not 'y'",
    "switch=": "switch: true or false is expected, not ''",
    "words=<R>": "words: a list is expected, as in words=[first, second]",
    "words=": "words: a list is expected",
    "words=[a": "words: a list is expected",
    "words=[[a]]": "a list of single values is expected",
    "words=[a: b]": "a list of single values is expected",
    "words=[a, null]": "words, entry 2: a text is expected, not null",
    "sizes=[1, big]": "sizes, entry 2: a whole number is expected: 'big'",
    "wordz=[a]": "unknown setting 'wordz'; did you mean 'words'?",
    "Text=a": "unknown setting 'Text'; did you mean 'text'?",
    "zzzzzz=1": "unknown setting 'zzzzzz'; --print-config shows all there are",
}


@BOTH
@pytest.mark.parametrize(("word", "message"), REFUSED.items(), ids=[word[:20] for word in REFUSED])
def test_a_value_that_cannot_be_meant_is_refused_in_one_line(word: str, message: str, read: Any, tmp_path: Path) -> None:
    if read is from_file and word == "words=[a":  # there the file is broken, which the tests below look at
        message = "not a YAML file: line"
    with pytest.raises(ValueError) as caught:
        read(word, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert read is from_words or "settings.yaml: " in str(caught.value)


TYPED = [
    "/data/dog #2",
    "/m/my model #2.safetensors",
    "a: b",
    "- a",
    "{a}",
    "[a]",
    "*a",
    "&a",
    "!a",
    "%a",
    "@a",
    "`a",
    "'a",
    '"a"',
]
TYPED += ["null", "a\\b", " a ", "#", ">", "|", "?", "---", "a\udce9"]


@pytest.mark.parametrize("text", TYPED)
def test_a_text_of_the_command_line_is_what_was_typed(text: str) -> None:
    assert settings.load(Example, None, [f"text={text}"]).text == text
    assert settings.load(Example, None, [f"path={text}"]).path == text


@pytest.mark.parametrize("text", [*TYPED, "~", "no", "001", "1e3", "2024-06-01", "", "日本"])
@pytest.mark.parametrize("explain", [False, True])
def test_what_is_written_is_read_back(text: str, explain: bool, tmp_path: Path) -> None:
    path = tmp_path / "written.yaml"
    wanted = TrainConfig(license=text, steps=7, student_lr=1e-12, normalize=True)
    path.write_bytes(settings.as_yaml(wanted, explain=explain).encode())
    assert settings.load(TrainConfig, path) == wanted
    lists = PersonalizeConfig(templates=(text, "b"))
    path.write_bytes(settings.as_yaml(lists, explain=explain).encode())
    assert settings.load(PersonalizeConfig, path) == lists


FILES = {
    "a key twice": ("count: 1\ncount: 2\n", "line 2: count stands here a second time"),
    "a tab behind a key": ("count:\t5\n", "line 1, column 7: a tab stands here; YAML takes spaces only"),
    "a tab before a key": ("count: 1\n\ttext: a\n", "line 2, column 1: a tab stands here"),
    "an unknown key": ("cuont: 1\n", "unknown setting 'cuont'; did you mean 'count'?"),
    "a list for a text": ("text: [a]\n", "text: a text is expected, not ['a']"),
    "a block list for a number": ("count:\n- 1\n", "count: a whole number is expected, not ['1']"),
    "null for a text": ("text: null\n", "text: a text is expected, not null; for none leave it empty"),
    "a tilde for a text": ("text: ~\n", "text: a text is expected, not null"),
    "null for a number": ("count: null\n", "count: a whole number is expected, not null"),
    "names below a name": ("text: {a: b}\n", "text: a value or a list is expected"),
    "no space behind the colon": ("count:1\n", "a list of `key: value` lines is expected"),
    "a list": ("- count: 1\n", "a list of `key: value` lines is expected"),
    "two documents": ("count: 1\n---\ncount: 2\n", "but found another document"),
    "a bracket left open": ("words: [a\n", "not a YAML file: line 2"),
    "a list as a key": ("? [a]\n: 1\n", "line 1: the name of a setting is expected"),
    "a Windows path in double quotes": ('path: "C:\\models"\n', "found unknown escape character 'm'"),
    "a line break in such a path": ('path: "C:\\new"\n', "path: a text of one line is expected, and '\\n' stands in it"),
    "two lines of text": ("text: |\n  a\n  b\n", "text: a text of one line is expected"),
    "a list of itself": ("words: &a [*a]\n", "words: a list of single values is expected"),
    "an alias of nothing": ("text: *a\n", "found undefined alias"),
    "a merge": ("<<: {count: 1}\n", "<<: a value or a list is expected"),
    "a Python object": ("text: !!python/object:os.system x\n", "means nothing in settings"),
    "a tag of one's own": ("text: !secret x\n", "the tag !secret means nothing in settings"),
    "lists without end": ("words: " + "[" * 5000, "lists in lists without end"),
    "a NUL": ("text: a\0b\n", "not a YAML file"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_file_of_settings_that_is_wrong_is_named_with_the_place(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        settings.load(Example, path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", Example()),
        (b"# nothing\n", Example()),
        (b"\xef\xbb\xbfcount: 2\r\ntext: a\r\n", Example(count=2, text="a")),
        (b"text:\npath:\nperhaps:\n", Example(text="", path="", perhaps=None)),
        (b"perhaps: ~\n", Example(perhaps=None)),
        (b"text: 'null'\n", Example(text="null")),
        (b"path: /data/dog #2\n", Example(path="/data/dog")),  # what a comment is, YAML says
        (b"words:\n- 001\n- no\n", Example(words=("001", "no"))),
        (b"text: &a on\npath: *a\n", Example(text="on", path="on")),
    ],
    ids=[
        "empty",
        "comment",
        "BOM and CRLF",
        "nothing behind a key",
        "tilde",
        "quoted",
        "comment behind",
        "block list",
        "alias",
    ],
)
def test_files_of_settings_in_their_other_forms(content: bytes, wanted: Example, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    assert settings.load(Example, path) == wanted


def test_the_last_of_several_overrides_is_taken_and_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("count: 1\ntext: a\n")
    assert settings.load(Example, path, ["count=2", "count=3"]) == Example(count=3, text="a")


def test_the_home_folder_is_told_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.os.path, "expanduser", lambda path: path)  # as without HOME and without a passwd entry
    with pytest.raises(ValueError, match="^output: ~ is the home folder, and this user has none: write the whole path$"):
        settings.load(TrainConfig, None, ["output=~/runs"])


SCHEMAS = [TrainConfig, InvertConfig, PersonalizeConfig]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_paths_of_all_runs_know_the_home_folder(schema: type) -> None:
    assert settings.load(schema, None, ["base=~/a b", "output=~/c"]).base == "/users/me/a b"
    one = "start_from" if schema is TrainConfig else "pictures"
    assert getattr(settings.load(schema, None, [f"{one}=~"]), one) == "/users/me"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sd15", "did you mean {configs}/sd15.yaml or "),
        ("sd21.yml", "did you mean {configs}/sd21.yaml"),
        ("configs/personalise-mini.yaml", "did you mean {configs}/personalize-mini.yaml"),
        ("zzzz", "{configs} holds invert-mini, "),
        (".", "the settings cannot be read: this is a folder, a file is needed"),
        ("x" * 300, "the settings cannot be read: File name too long"),
    ],
    ids=["a name alone", "yml", "a misspelt one", "none alike", "a folder", "300 letters"],
)
def test_a_file_of_settings_that_is_not_there(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", name])
    assert cli.main("About.", TrainConfig, lambda config: None) == 1
    told = capsys.readouterr().err
    assert message.format(configs=settings.CONFIGS) in told and told.startswith("error: ") and told.count("\n") == 1
