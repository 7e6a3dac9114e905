"""The benchmark of the trainer measures what it says, on small networks."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.speed import naive, training
from benchmarks.speed.repeats import summary
from trainer.distill.roles import FAKE, STUDENT
from wadi_core.lorad.rotation import rotate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.prepare(tmp_path_factory.mktemp("benchmark") / "small", "small")


def options(**changes: object) -> Namespace:
    words = ["--size", "small", "--precision", "fp32", "--base-weights", "fp32", "--steps", "1"]
    words += ["--rotation-precision", "fp32", "--no-compile-rotation"]
    return Namespace(**{**vars(training.make_parser().parse_args(words)), **changes})


@pytest.mark.parametrize("naively", [naive.rotate_keeping_six, naive.rotate_by_autograd])
def test_naive_rotations_are_the_rotation(naively: naive.Rotate) -> None:
    weight, theta = torch.randn(6, 8), (torch.randn(6, 4) * 2).requires_grad_()
    direction = torch.randn(6, 8)
    found = naively(weight, theta)
    expected = rotate(weight, theta)
    assert torch.allclose(found, expected, atol=1e-5)
    gradients = [torch.autograd.grad((turned * direction).sum(), theta)[0] for turned in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_all_ways_train_the_same(folder: Path) -> None:
    """The same losses and the same angles after three steps: what differs is only how it is computed."""
    exact = options(precision="fp64", base_weights="fp64")
    runs = {way: naive.kinds()[way](training.make_config(way, exact, folder)) for way in ("trainer", "naive", "hooks")}
    logs = {way: [run.train_step() for _ in range(3)] for way, run in runs.items()}
    ours = runs["trainer"]
    for way in ("naive", "hooks"):
        for mine, other in zip(logs["trainer"], logs[way], strict=True):
            assert other == pytest.approx(mine, rel=1e-9)
        for role in (STUDENT, FAKE):
            theirs = runs[way].roles.adapters[role].parameters
            for name, parameter in ours.roles.adapters[role].parameters.items():
                assert torch.allclose(theirs[name], parameter, rtol=1e-6, atol=1e-9), name
        networks = {runs[way].model.network, *(runs[way].roles.adapters[role].network for role in (STUDENT, FAKE))}
        storages = {p.data_ptr() for network in networks for p in network.parameters()}
        assert len(networks) == 3 and len(storages) == 3 * len(list(runs[way].model.network.parameters()))


def test_what_is_kept_for_backward_is_counted(folder: Path) -> None:
    found = {}
    for way in ("trainer", "naive", "hooks"):
        run = naive.kinds()[way](training.make_config(way, options(), folder))
        found[way] = training.kept(run, way)
        largest = max(run.model.network.get_submodule(path).weight.nbytes for path in training.student_paths(run))
        found[way]["weights"] = found[way]["bytes"] / largest
    assert (found["naive"]["halves"], found["naive"]["wholes"]) == (6, 1)
    assert found["naive"]["weights"] <= 4 and found["trainer"]["weights"] <= 1
    assert found["trainer"]["weights"] < found["hooks"]["weights"] <= found["naive"]["weights"]


def test_a_straw_man_would_be_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = naive.NaiveDistillation(training.make_config("naive", options(), folder))
    monkeypatch.setattr(naive, "SIX", 5)
    with pytest.raises(ValueError, match="not 5 halves and the rotated weight"):
        training.kept(run, "naive")


@pytest.mark.parametrize("way", training.WAYS)
def test_a_measurement_has_a_time_and_a_peak(folder: Path, way: str) -> None:
    if way == "lora":
        pytest.importorskip("peft")
    found = training.measure(way, options(), folder)
    assert found["seconds"] > 0 and len(found["steps"]) == 1
    assert found["peak_bytes"] > 1e7
    assert found["trained"][STUDENT] > found["trained"][FAKE] > 0


def test_loras_have_the_same_ranks_on_the_same_layers(folder: Path) -> None:
    pytest.importorskip("peft")
    ours, theirs = (naive.kinds()[way](training.make_config(way, options(), folder)) for way in ("trainer", "lora"))
    for role in (STUDENT, FAKE):
        paths = {name.removesuffix(".a") for name in ours.roles.adapters[role].parameters if name.endswith(".a")}
        assert paths == {name.removesuffix(".lora_A") for name in theirs.roles.adapters[role].parameters if name.endswith("_A")}


def test_the_benchmark_writes_its_report(folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--size", "small", "--repeats", "1", "--steps", "1", "--only", "trainer", "hooks", "--work", str(folder.parent)]
    assert training.main(words) == 0
    shown = capsys.readouterr().out
    assert "| peak memory against hooks |" in shown
    report = json.loads((folder.parent / "training.json").read_text())
    assert [one["ratio"] > 0 for one in report["ratios"]] == [True, True]
    assert str(folder) not in json.dumps(report)
    assert (folder.parent / "training.md").read_text() == shown


def test_medians_and_ratios_are_reported() -> None:
    rounds = {
        "trainer": [{"seconds": s, "processor_seconds": 1.0, "peak_bytes": 1e9} for s in (1.0, 9.0, 2.0)],
        "naive": [{"seconds": 4.0, "processor_seconds": 4.0, "peak_bytes": 4e9}],
        "lora": [{"seconds": 1.0, "processor_seconds": 2.0, "peak_bytes": 5e8}],
        "hooks": [],
    }
    found = summary(rounds, training.TARGETS, training.MEASURED)
    assert {one["what"]: one["ratio"] for one in found["ratios"]} == {
        "peak memory against naive": 0.25, "step time against naive": 0.5, "processor time against naive": 0.25,
        "step time against peft's LoRA of the same rank": 2.0, "peak memory against peft's LoRA of the same rank": 2.0,
        "processor time against peft's LoRA of the same rank": 0.5,
    }  # fmt: skip
