"""The benchmarks of a picture's speed and of its precision, on wadi-mini and few pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipeline_kit import largest_difference

from benchmarks.quality import precision
from benchmarks.speed import latency


def test_errors_by_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert precision.main(["--count", "1", "--output", str(tmp_path)]) == 0
    errors = json.loads((tmp_path / "precision-mini.json").read_text())["errors"]
    assert {"entry, level 0", "exit, level 0", "shortcut, level 0", "attention, level 2", "balanced", "fast"} <= set(errors)
    assert all(0 < row["latent"] < errors["fast"]["latent"] * 1.5 for row in errors.values())
    assert errors["balanced"]["grey levels"] < errors["fast"]["grey levels"]
    assert "| balanced |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["diffusers, fp32", "wadi, exact"])
def test_a_measurement_tells_its_stages(name: str) -> None:
    found = latency.measure(name, "mini", 1)
    assert set(found) == {"seconds", "processor", *latency.STAGES, "peak_gb"}
    assert found["seconds"] == pytest.approx(sum(found[stage] for stage in latency.STAGES))
    assert min(found.values()) > 0


def test_both_sides_draw_the_same_picture() -> None:
    one, other = (draw(3)[0] for draw in (latency.ours("mini", "exact"), latency.diffusers("mini", torch.float32)))
    assert largest_difference(one, other) <= 1


def test_table_and_bars(tmp_path: Path) -> None:
    row = {"seconds": 2.0, "processor": 4.0, "text": 0.5, "network": 0.5, "decode": 0.5, "rest": 0.5, "peak_gb": 1.0}
    medians = {latency.DEFAULT: row, "wadi, fast": {**row, "processor": 1.0}}
    text = latency.table(medians)
    assert text.splitlines()[3].startswith("| wadi, fast | 0.25 | 1.000 | 2.000 | 0.500 |")
    latency.draw_bars(medians, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.width > 500
