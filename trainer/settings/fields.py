"""Typed configuration: a dataclass is the schema, a YAML file the values, ``key=value`` words the overrides."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import math
import os
import types
import typing
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import yaml

from wadi_core import entries
from wadi_core.entries import nearest
from wadi_core.files import existing_file, one_line

C = TypeVar("C")
FilePath: TypeAlias = Annotated[str, "a path"]  # of a file or folder; ~ in front of it is the home folder
CONFIGS = Path(__file__).parents[1] / "configs"

logger = logging.getLogger("wadi")

_TAG = "tag:yaml.org,2002:"
_KNOWN_TAGS = {"str", "int", "float", "bool", "null", "timestamp", "value", "merge", "seq", "map"}


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a setting means and which values it takes.

    Attributes:
        text: one line for whoever sets it.
        unit: of the number, where it has one.
        low, high: smallest and largest value, both allowed; None where there is no such bound.
        choices: the words that it may be.
    """

    text: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, key: str, value: Any) -> None:
        """Do nothing if the value is one of those allowed.

        Raises:
            ValueError: it is not; one line.
        """
        if self.choices and value not in self.choices:
            raise ValueError(
                f"{key}: one of {', '.join(self.choices)} is expected, not {_shown(value)}{nearest(value, self.choices)}"
            )
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            below = self.low is not None and not value >= self.low
            above = self.high is not None and not value <= self.high
            if below or above or not math.isfinite(value):
                raise ValueError(f"{key}: {self.range_text()} is expected, not {value!r}")

    def range_text(self) -> str:
        """The range in words: ``0 to 1``, ``at least 1``, ``at most 3``, or ``a finite number``."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.high is not None else "a finite number"

    def __str__(self) -> str:
        bounded = self.low is not None or self.high is not None
        words = [self.unit, " | ".join(self.choices), self.range_text() if bounded else ""]
        inside = ", ".join(word for word in words if word)
        return f"{self.text} [{inside}]" if inside else self.text


def setting(
    default: Any,
    text: str,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a schema, with its :class:`Meaning`."""
    return dataclasses.field(default=default, metadata={"meaning": Meaning(text, unit, low, high, choices)})


def meanings(schema: Any) -> dict[str, Meaning]:
    """Name -> meaning of the settings that have one."""
    return {field.name: field.metadata["meaning"] for field in dataclasses.fields(schema) if "meaning" in field.metadata}


def _read(value: Any, kind: Any, key: str) -> Any:
    """What a setting of type ``kind`` is by what was written, or is already.

    Text is read by the type: a text as it stands, numbers as :mod:`wadi_core.words` reads them, yes and no. None is
    YAML's ``null``.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None or value in ("", "null"):
            return None
        return _read(value, next(option for option in typing.get_args(kind) if option is not type(None)), key)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}: a list is expected, as in {key}=[first, second] (none is []), not {_shown(value)}")
        item = typing.get_args(kind)[0]
        return tuple(_read(entry, item, f"{key}, entry {number}") for number, entry in enumerate(value, 1))
    base = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    if isinstance(value, str):
        try:
            read = _READERS[base](value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        return read if base is kind else _expanded(read, key)
    whole = base is float and isinstance(value, int)
    if (isinstance(value, base) or whole) and isinstance(value, bool) == (base is bool):
        return float(value) if whole else value
    quoted = "; for none leave it empty, for this word put it in quotes" if value is None and base is str else ""
    raise ValueError(f"{key}: {_KINDS[base]} is expected, not {_shown(value)}{quoted}")


def _text(text: str) -> str:
    control = next((sign for sign in text if unicodedata.category(sign) in ("Cc", "Zl", "Zp")), None)
    if control is not None:
        raise ValueError(
            f"a text of one line is expected, and {control!r} stands in it: in YAML write a path without quotes, or in "
            "single ones, where a backslash is a backslash"
        )
    return text


def _switch(text: str) -> bool:
    word = text.strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError(f"true or false is expected, not {_shown(text)}")


def _number(text: str) -> float:
    try:
        return entries.decimal(text)
    except ValueError as error:
        raise ValueError(f"a number is expected: {error}") from None


def _whole(text: str) -> int:
    try:
        return entries.whole(text)
    except ValueError as error:
        raise ValueError(f"a whole number is expected: {error}") from None


_READERS: dict[type, Callable[[str], Any]] = {str: _text, int: _whole, float: _number, bool: _switch}
_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _expanded(text: str, key: str) -> str:
    """A path with ``~`` in front of it as one in the home folder."""
    if text != "~" and not text.startswith(("~/", f"~{os.sep}")):
        return text
    path = os.path.expanduser(text)
    if path == text:
        raise ValueError(f"{key}: ~ is the home folder, and this user has none: write the whole path")
    return path


def _shown(value: Any) -> str:
    return "null" if value is None else one_line(repr(value))[:80]


def build(schema: type[C], values: Mapping[str, Any]) -> C:
    """``schema(**values)`` with every name, type and range checked.

    Args:
        values: each as its type, or as the text that stands for it.

    Raises:
        ValueError: one line naming the key, and the nearest valid one where a key is unknown.
    """
    return schema(**_typed(schema, values))


# Old name -> the name it has now, where a schema has that one. Read until the next version.
RENAMED = {
    "student_rate": "student_lr",
    "fake_rate": "fake_lr",
    "rate": "lr",
    "learning_rate": "lr",
    "clip": "max_grad_norm",
    "keep": "keep_last",
    "null_share": "uncond_prob",
    "noisy_share": "high_noise_fraction",
}


def with_new_names(schema: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names that they have now.

    Raises:
        ValueError: one is given under both names; one line.
    """
    known = {field.name for field in dataclasses.fields(schema)}
    found: dict[str, Any] = {}
    for key, value in values.items():
        new = RENAMED.get(key, key)
        new = new if new in known and key not in known else key
        if new in found or (new != key and new in values):
            raise ValueError(f"{key} is the old name of {new}, and both are given: leave out {key}")
        found[new] = value
    return found


def settings_before(config: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an earlier run of the same kind, under today's names; those that it did not know at their defaults."""
    return {field.name: field.default for field in dataclasses.fields(config)} | with_new_names(config, saved)


def _typed(schema: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    renamed = with_new_names(schema, values)
    for old, new in zip(values, renamed, strict=True):
        if old != new:
            logger.warning("the setting %s is called %s now; the old name is read in this version only", old, new)
    values = renamed
    kinds = typing.get_type_hints(schema, include_extras=True)
    kinds = {field.name: kinds[field.name] for field in dataclasses.fields(schema)}
    unknown = sorted(str(key) for key in values if key not in kinds)
    if unknown:
        near = nearest(unknown[0], kinds) or "; --print-config shows all there are"
        raise ValueError(f"unknown setting {unknown[0]!r}{near}")
    typed = {key: _read(value, kinds[key], key) for key, value in values.items()}
    known = meanings(schema)
    for key, value in typed.items():
        if key in known:
            known[key].check(key, value)
    return typed


def load(schema: type[C], path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file (or nothing) and apply ``key=value`` overrides to it.

    Both are read alike, by the type of the setting: a text as it stands, even where YAML would take it for a date, a
    number or a yes; ``~`` in front of a path is the home folder. Lists are written ``[one, two]``. What may be none is
    so as ``null`` or empty. Of several overrides of one key the last is taken.

    Raises:
        ValueError, OSError: with one line that names file and key.
    """
    given: dict[str, Any] = {}
    if path is not None:
        try:
            text = existing_file(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a text file in UTF-8") from None
        except OSError as error:
            near = _shipped(path) if isinstance(error, FileNotFoundError) else ""
            raise type(error)(f"{path}: the settings cannot be read: {_reason(error)}{near}") from None
        try:
            given = _typed(schema, _entries(text))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    values: dict[str, Any] = {}
    for word in overrides:
        key, sign, text = word.partition("=")
        if not sign:
            raise ValueError(f"{word!r}: an override is written key=value")
        values[key] = _listed(text, key) if text.lstrip().startswith("[") and _is_list(schema, key) else text
    return schema(**given | _typed(schema, values))


def _reason(error: OSError) -> str:
    return error.strerror or str(error).rpartition(": ")[2]


def _is_list(schema: Any, key: str) -> bool:
    return typing.get_origin(typing.get_type_hints(schema).get(key)) is tuple


def _listed(text: str, key: str) -> Any:
    """The list in an override."""
    try:
        return _plain(typing.cast(yaml.Node, _parsed(text)), key)  # what begins with a bracket is not nothing
    except _Unreadable as error:
        raise ValueError(
            f"{key}: a list is expected, as in {key}=[first, 'the second'], not {_shown(text)} ({error})"
        ) from None


def _entries(text: str) -> dict[str, Any]:
    """The keys of a YAML file and what is written behind them, as text or lists of it: what it means its type says."""
    root = _parsed(text)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise _Unreadable("a list of `key: value` lines is expected")
    values: dict[str, Any] = {}
    for name, content in root.value:
        line = f"line {name.start_mark.line + 1}"
        if not isinstance(name, yaml.ScalarNode):
            raise _Unreadable(f"{line}: the name of a setting is expected")
        if name.value in values:
            raise _Unreadable(f"{line}: {name.value} stands here a second time")
        values[name.value] = _plain(content, name.value)
    return values


class _Unreadable(ValueError):
    """Text that is not the YAML that settings are written in; the message says where and why."""


def _parsed(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        if "'\\t'" in str(error.problem):
            raise _Unreadable(f"{where}a tab stands here; YAML takes spaces only") from None
        raise _Unreadable(f"not a YAML file: {where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise _Unreadable(f"not a YAML file: {one_line(error)}") from None
    except RecursionError:
        raise _Unreadable("not a YAML file of settings: lists in lists without end") from None


def _plain(node: yaml.Node, key: str) -> Any:
    """A node as the text that it was written as, as a list of such, or as None where ``null`` is written."""
    if node.tag.removeprefix(_TAG) not in _KNOWN_TAGS:
        raise _Unreadable(f"{key}: the tag {one_line(node.tag)} means nothing in settings")
    if isinstance(node, yaml.ScalarNode):
        return None if node.value and node.tag == f"{_TAG}null" else node.value
    if isinstance(node, yaml.SequenceNode):
        if not all(isinstance(entry, yaml.ScalarNode) for entry in node.value):
            raise _Unreadable(f"{key}: a list of single values is expected; put what holds a colon or a bracket in quotes")
        return [_plain(entry, key) for entry in node.value]
    raise _Unreadable(f"{key}: a value or a list is expected, not names with values below it")


def _shipped(path: str | os.PathLike[str]) -> str:
    """What to add where there is no such file of settings: the nearest of those that ship, or where they are."""
    names = {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}
    near = difflib.get_close_matches(Path(path).stem.lower(), names, n=3, cutoff=0.5)
    shown = [os.path.relpath(names[name]) if names[name].is_relative_to(Path.cwd()) else str(names[name]) for name in near]
    return f"; did you mean {' or '.join(shown)}?" if shown else f"; {CONFIGS} holds {', '.join(names)}"


def parser(description: str) -> argparse.ArgumentParser:
    """The command line that every script here shares: ``--config FILE key=value ...``."""
    shared = argparse.ArgumentParser(description=description)
    shared.add_argument("--config", metavar="FILE", help="YAML file of settings")
    shared.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    return shared


def as_yaml(config: Any, explain: bool = False) -> str:
    """The settings as a YAML text that :func:`load` reads back.

    Args:
        explain: write after each what it means, its unit and its range.
    """
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()}
    if not explain:
        return yaml.safe_dump(values, sort_keys=False)
    known, lines = meanings(config), []
    for key, value in values.items():
        flow = isinstance(value, list)
        line = yaml.safe_dump(value if flow else {key: value}, default_flow_style=flow, width=1 << 16).strip()
        line = f"{key}: {line}" if flow else line
        lines.append(f"{line:<36}# {known[key]}" if key in known else line)
    return "\n".join(lines) + "\n"
