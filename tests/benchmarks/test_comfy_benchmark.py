"""The benchmark of the ComfyUI nodes: its files, its ratios and its report; the measurements need ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import comfyui
from benchmarks.speed.repeats import summary, this_machine
from wadi_core import LoRaD
from wadi_core.lorad.checkpoint import read_header
from wadi_core.lorad.weights import Weights


def test_network_and_adapters_belong_together(tmp_path: Path) -> None:
    files = comfyui.Files(tmp_path)
    comfyui.prepare(files, "small")
    lorad = LoRaD.load(files.lorad)
    lorad.matched(Weights.open(files.base).layout.network).check()
    lora = {name.rsplit(".", 2)[0] for name in read_header(files.lora).places if ".lora_up." in name}
    assert lora == set(lorad.factors) and lorad.rank == comfyui.RANKS["small"]
    before = files.lora.stat().st_mtime_ns
    comfyui.prepare(files, "small")
    assert files.lora.stat().st_mtime_ns == before


def test_medians_and_ratios_are_reported() -> None:
    def patched(seconds: float, peak: float) -> dict[str, float]:
        return {"seconds": seconds, "cpu_seconds": seconds, "file_seconds": 0.1, "file_cpu_seconds": 0.1, "peak_bytes": peak}

    rounds = {
        "lora": [patched(4.0, 2e9)] * 3,
        "lorad": [patched(seconds, 1e9) for seconds in (1.0, 9.0, 2.0)],
        "start": [{"seconds": 0.15, "cpu_seconds": 0.15}],
    }
    found = summary(rounds, comfyui.TARGETS, limits=comfyui.LIMITS)
    assert [one["ratio"] for one in found["ratios"]] == [0.5, 0.5, 0.5, pytest.approx(0.5)]
    report = {**found, "comfyui": "1.2.3", "size": "sd15", "rank": 256, "repeats": 3, "machine": this_machine()}
    text = comfyui.as_markdown(json.loads(json.dumps(report)))
    assert "peak memory 2.00 GB" in text and "| Load LoRaD against Load LoRA, time to patch | 0.50 | 1.3 |" in text


def test_it_says_what_it_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(SystemExit):
        comfyui.main([])
    assert "COMFYUI_PATH" in capsys.readouterr().err
