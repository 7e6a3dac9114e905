"""The benchmark of the adapter tools measures what it says, on small networks."""

from __future__ import annotations

import json

import pytest

from benchmarks.speed import adapters
from benchmarks.speed.repeats import summary, this_machine
from wadi_core.lorad.weights import Weights


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> adapters.Files:
    files = adapters.Files(tmp_path_factory.mktemp("benchmark"))
    adapters.prepare(files, "small")
    return files


def test_networks_are_prepared_once(files: adapters.Files) -> None:
    before = files.student.stat().st_mtime_ns
    adapters.prepare(files, "small")
    assert files.student.stat().st_mtime_ns == before
    assert Weights.open(files.base).architecture == Weights.open(files.student).architecture == "unet-custom"


@pytest.mark.parametrize("name", [name for name in adapters.MEASURES if name != "peft-merge"])
def test_a_measurement_has_a_time_and_a_peak(files: adapters.Files, name: str) -> None:
    found = adapters.measure(name, files, "small")
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 1e7


def test_peft_merges_as_many_layers(files: adapters.Files) -> None:
    pytest.importorskip("peft")
    assert adapters.measure("peft-merge", files, "small")["seconds"] > 0


def test_medians_and_ratios_are_reported() -> None:
    rounds = {
        "fuse": [{"seconds": s, "peak_bytes": 1e9} for s in (1.0, 9.0, 2.0)],
        "peft-merge": [{"seconds": 4.0, "peak_bytes": 1e9}],
        "merge": [{"seconds": 3.0, "peak_bytes": 5e9}],
    }
    found = summary(rounds, adapters.TARGETS, limits={"output": {"peak_bytes": 2e9}})
    assert found["medians"]["fuse"]["seconds"] == 2.0
    assert [one["ratio"] for one in found["ratios"]] == [0.5, 2.5]
    report = {**found, "size": "sd15", "rank": 256, "repeats": 3, "machine": this_machine()}
    assert "| fuse | 2.00 | 1.00 |" in adapters.as_markdown(json.loads(json.dumps(report)))
