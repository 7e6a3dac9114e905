"""Typed configuration: a dataclass is the schema, a YAML file the values, ``key=value`` words the overrides."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

C = TypeVar("C")


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
                f"{key}: one of {', '.join(self.choices)} is expected, not {value!r}{_nearest(value, self.choices)}"
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


def _coerce(value: Any, kind: Any, key: str) -> Any:
    """``value`` as type ``kind``; the loose cases YAML leaves (1e-4 as text, an int for a float) are accepted."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        return _coerce(value, next(option for option in options if option is not type(None)), key)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}: a list is expected, not {value!r}")
        item = typing.get_args(kind)[0]
        return tuple(_coerce(entry, item, key) for entry in value)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise ValueError(f"{key}: {kind.__name__} is expected, not {value!r}")


def _nearest(word: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def build(schema: type[C], values: dict[str, Any]) -> C:
    """``schema(**values)`` with every name, type and range checked.

    Raises:
        ValueError: one line naming the key, and the nearest valid one where a key is unknown.
    """
    kinds = typing.get_type_hints(schema)
    unknown = sorted(str(key) for key in values if key not in kinds)
    if unknown:
        near = difflib.get_close_matches(unknown[0], kinds, n=1, cutoff=0.0)
        raise ValueError(f"unknown setting {unknown[0]!r}; did you mean {near[0]!r}?")
    typed = {key: _coerce(value, kinds[key], key) for key, value in values.items()}
    known = meanings(schema)
    for key, value in typed.items():
        if key in known:
            known[key].check(key, value)
    return schema(**typed)


def load(schema: type[C], path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file (or nothing) and apply ``key=value`` overrides to it.

    Raises:
        ValueError, OSError: with one line that names file and key.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a text file") from None
        except OSError as error:
            raise type(error)(f"{path}: the settings cannot be read: {error.strerror or error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a list of `key: value` lines is expected")
    for word in overrides:
        key, sign, text = word.partition("=")
        if not sign:
            raise ValueError(f"{word!r}: an override is written key=value")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[key] = text  # a path or a name may be no YAML
        if values[key] is None and text == "":
            values[key] = ""
    return build(schema, values)


def parser(description: str) -> argparse.ArgumentParser:
    """The command line that every script here shares: ``--config FILE key=value ...``."""
    shared = argparse.ArgumentParser(description=description)
    shared.add_argument("--config", metavar="FILE", help="YAML file of settings")
    shared.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
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
