"""Runs that are interrupted end with the bits of one that never was; the benchmark does it two hundred times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.robustness import interruptions


def test_a_few_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruptions, "EACH", 2)
    monkeypatch.setattr(interruptions, "STEPS", 6)
    found = interruptions.measure(tmp_path, kills=2, interrupts=1, seed=1)
    assert found["SIGKILL"] >= 2 and found["SIGINT"] >= 1 and found["runs"] >= 2
    assert found["runs that differ"] == 0 and found["other exit statuses"] == 0
    report = json.loads((tmp_path / "interruptions.json").read_text())
    assert report["summary"] == found and {made["kind"] for made in report["rounds"]} == set(interruptions.KINDS)
    assert interruptions.measure(tmp_path, kills=2, interrupts=1, seed=1) == found  # nothing is tried twice


def test_differences_are_found() -> None:
    one = {"a": [torch.ones(2), 1.5], "b": {"c": "text"}}
    assert interruptions.differing(one, {"a": [torch.ones(2), 1.5], "b": {"c": "text"}}, "") == []
    for other, where in (
        ({**one, "a": [torch.tensor([1.0, 1.0000001]), 1.5]}, "/a/0"),
        ({**one, "a": [torch.ones(2).double(), 1.5]}, "/a/0"),
        ({**one, "a": [torch.ones(2)]}, "/a"),
        ({**one, "b": {}}, "/b/c"),
        ({**one, "b": {"c": "other"}}, "/b/c"),
    ):
        assert interruptions.differing(one, other, "") == [where]
