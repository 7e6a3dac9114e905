"""Typed configuration: a dataclass is the schema, a YAML file the values, ``key=value`` words the overrides."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

C = TypeVar("C")


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


def build(schema: type[C], values: dict[str, Any]) -> C:
    """``schema(**values)`` with every name and type checked.

    Raises:
        ValueError: one line naming the key, and the nearest valid one where a key is unknown.
    """
    kinds = typing.get_type_hints(schema)
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        near = difflib.get_close_matches(unknown[0], kinds, n=1, cutoff=0.0)
        raise ValueError(f"unknown setting {unknown[0]!r}; did you mean {near[0]!r}?")
    return schema(**{key: _coerce(value, kinds[key], key) for key, value in values.items()})


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
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a list of `key: value` lines is expected")
    for word in overrides:
        key, sign, text = word.partition("=")
        if not sign:
            raise ValueError(f"{word!r}: an override is written key=value")
        values[key] = yaml.safe_load(text)
    return build(schema, values)


def parser(description: str) -> argparse.ArgumentParser:
    """The command line that every script here shares: ``--config FILE key=value ...``."""
    shared = argparse.ArgumentParser(description=description)
    shared.add_argument("--config", metavar="FILE", help="YAML file of settings")
    shared.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    return shared


def as_yaml(config: Any) -> str:
    """The settings as a YAML text that :func:`load` reads back."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False)
