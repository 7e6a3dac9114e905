"""The study of wadi-mini's adapter, on a small network with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import networks
import pytest
from PIL import Image

from benchmarks.quality import mini_adapter


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    _, made = networks.write_base(place / "base")
    networks.random_lorad(made["unet"], rank=4).save(place / "one-step.safetensors")
    return place


def test_errors_fall_with_the_rank_and_norms_stay(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mini_adapter, "CALLS", 4)
    monkeypatch.setattr(mini_adapter, "SHOWN", (8,))
    words = ["--model", str(place / "base"), "--lorad", str(place / "one-step.safetensors"), "--output", str(tmp_path)]
    assert mini_adapter.main([*words, "--ranks", "2", "8", "128"]) == 0
    found = json.loads((tmp_path / "mini-adapter.json").read_text())
    assert found["norm change, %"]["mean"] < 1e-4 < found["direction change, %"]["mean"]
    rows = [found["lora"][rank] for rank in ("2", "8", "128")]
    for figure in ("weights", "output", "output over change"):
        assert rows[0][figure] > rows[1][figure] > rows[2][figure]
    assert rows[2]["weights"] < 2e-3  # only half precision is left
    assert "LoRA of rank" in capsys.readouterr().out
    with Image.open(tmp_path / "mini-change.png") as change, Image.open(tmp_path / "mini-lora.png") as sheet:
        assert change.width > 1000 and sheet.height > 500


def test_what_is_missing_is_said_in_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(place / "base"), "--lorad", str(tmp_path / "none.safetensors"), "--output", str(tmp_path)]
    assert mini_adapter.main(words) == 1
    assert capsys.readouterr().err.startswith("mini_adapter: error: ")
