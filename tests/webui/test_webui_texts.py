"""The Japanese of the panel and the settings: for each text of the page there is one, and none that is shown nowhere."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from wadi_core.settings import SAMPLER

ROOT = Path(__file__).resolve().parents[2]
SAME = {"WaDi", "LoRaD"}  # in every language
# Functions that show a text -> which of their arguments it is.
SHOWN = {"Button": 0, "Accordion": 0, "OptionInfo": 1, "info": 0}


def shown(module: str) -> Iterator[str]:
    """The texts that a module puts on the page."""
    for node in ast.walk(ast.parse((ROOT / "a1111_extension" / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP":
            yield unescape(text_of(node.value))
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LABELS":
            assert isinstance(node.value, ast.Dict)
            yield from map(ast.literal_eval, node.value.values)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            labels = [word.value for word in node.keywords if word.arg == "label"]
            labels += node.args[SHOWN[name] :][:1] if name in SHOWN else []
            yield from (text_of(label) for label in labels)


def text_of(node: ast.expr) -> str:
    """A text; of what is put into it only the sampler's name is known."""
    if isinstance(node, ast.JoinedStr):
        return "".join(SAMPLER if isinstance(part, ast.FormattedValue) else text_of(part) for part in node.values)
    return str(ast.literal_eval(node))


def test_each_text_has_its_japanese() -> None:
    words = json.loads((ROOT / "localizations" / "ja_JP.json").read_text(encoding="utf-8"))
    texts = {text for module in ("ui", "options", "grid", "negative", "negative_box") for text in shown(module)}
    assert len(texts) > 12
    assert texts - SAME == set(words) - SAME
    assert all(words.values())
