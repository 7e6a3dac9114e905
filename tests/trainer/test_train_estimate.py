"""What a run will need, before anything is loaded: counted, not guessed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import small_settings, write_settings
from training import tiny

from trainer.distill.estimate import Estimate, empty_network, estimate, helper_parameters
from trainer.distill.hours import PEAKS, operations_of_call, passes_of_step
from trainer.distill.roles import layers_of_roles
from trainer.models import base_models
from trainer.settings.fields import as_yaml
from trainer.train import main


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings without weights."""
    return write_settings(tmp_path_factory.mktemp("shape") / "small", "sd15", small_settings("sd15"))


@pytest.fixture
def of(shape: Path, tmp_path: Path) -> Callable[..., Estimate]:
    def make(**changes: object) -> Estimate:
        return estimate(tiny("", "none", tmp_path, base_config=str(shape), **changes))

    return make


def test_what_is_saved_is_in_the_figures(of: Callable[..., Estimate], shape: Path, tmp_path: Path) -> None:
    plain = of(batch=4)
    network, _ = empty_network(tiny("", "none", tmp_path, base_config=str(shape)))
    layers = layers_of_roles(network, "unet-custom")
    assert plain.network == sum(parameter.numel() for parameter in network.parameters())
    assert (plain.student_layers, plain.fake_layers) == tuple(len(paths) for paths in layers.values())
    linears = [network.get_submodule(path) for path in layers["student"]]
    assert plain.student == sum(4 * (layer.out_features + layer.in_features // 2) for layer in linears)
    rotated = 4 * sum(layer.weight.numel() for layer in linears)
    assert plain.kept_bytes > rotated
    assert of(batch=4, recompute_rotation=True).kept_bytes == plain.kept_bytes - rotated
    assert of(batch=4, gradient_checkpointing=True).kept_bytes < 0.5 * plain.kept_bytes
    half = of(batch=4, micro_batch=2)
    assert half.kept_bytes < plain.kept_bytes and (half.calls, half.pictures) == (2, 6 * 4)
    assert of(precision="bf16", base_weights="fp8").frozen_bytes < 0.6 * plain.frozen_bytes
    assert of(adapter="full").student == plain.network
    assert of(adapter="lora").student > plain.student
    assert of(ema=0.0).trained_bytes == plain.trained_bytes - 4 * plain.student
    assert plain.total_bytes < 1e8  # on a CPU there is no driver that takes half a gigabyte
    assert of(batch=4, device="cuda").total_bytes > 5e8  # planned here for a machine that has one


def test_a_fused_kernel_keeps_no_matrix_of_attention(of: Callable[..., Estimate]) -> None:
    sides = {"batch": 1, "resolution": 256}  # 1024 places: a matrix of them is larger than all else
    fused, plain = (of(attention=kind, **sides).kept_bytes for kind in ("sdpa", "plain"))
    heads, layers, places = 2, 3, 1024  # one on the way down, two on the way up
    assert plain - fused > 0.9 * 4 * layers * heads * places**2
    assert fused < plain / 2


def test_it_is_shown_without_any_weight(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["train.py", "--dry-run", "base=", f"base_config={shape}", f"output={tmp_path / 'run'}", "steps=100", "batch=8"]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 0
    shown = capsys.readouterr().out
    assert "100 of 8 pictures in 1 calls each: 800 pictures" in shown and "kept for backward" in shown
    assert not (tmp_path / "run").exists()
    for given, told in (("base_config=", "base_config=NAME, one of sd15, sd21, wadi-mini, pixart"),
                        (f"base_config={tmp_path}", "no folder with unet/config.json")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [*words[:3], given])
        assert main() == 1
        message = capsys.readouterr().err
        assert told in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("preset", "given", "architecture"),
    [("pixart", "batch=8", "pixart-alpha"), ("sd15-12gb", "base_config=sd15", "sd15"), ("sd21", "base_config=sd21", "sd21")],
)
def test_a_shape_that_ships_is_enough(
    preset: str, given: str, architecture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = Path(__file__).parents[2] / "trainer" / "configs" / f"{preset}.yaml"
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), "--dry-run", given, "micro_batch=1", "device=cuda"])
    assert main() == 0
    assert capsys.readouterr().out.startswith(f"{'base':<26}{architecture}, ")


def test_the_shape_of_pixart_is_that_of_its_paper(tmp_path: Path) -> None:
    network, folder = empty_network(tiny("", "none", tmp_path, base_config="pixart"))
    assert sum(parameter.numel() for parameter in network.parameters()) == 610_856_096
    assert sum(parameter.numel() for parameter in network.transformer_blocks.parameters()) == 28 * 21_255_552
    assert helper_parameters(folder) == pytest.approx(4.76e9 + 0.084e9, rel=0.01)  # T5 v1.1 XXL and the autoencoder


def test_pixarts_shape_is_for_no_other_base(shape: Path) -> None:
    with pytest.raises(ValueError, match="this is no folder of PixArt, whose shape base_config=pixart is"):
        base_models.load(str(shape), "pixart", "epsilon")


def test_hours_are_those_of_a_run_that_was_measured(of: Callable[..., Estimate], tmp_path: Path) -> None:
    assert "to a factor of two: RTX 3090 " in str(of()) and "(no step was measured yet" in str(of())
    rows = [(10, 60.0), (20, 80.0), (30, 100.0), (40, 121.0), (50, 20.0), (60, 40.0)]  # it was stopped after step 40
    (tmp_path / "losses.csv").write_text("step,seconds\n" + "".join(f"{step},{seconds}\n" for step, seconds in rows))
    (tmp_path / "config.yaml").write_text(as_yaml(tiny("", "none", tmp_path, base_config="other", steps=60, keep_last=9)))
    assert f"5 hours, 2.05 s a step (measured in {tmp_path})" in str(of(steps=8780))
    assert of(steps=8780).seconds == 2.05
    assert f"(the run in {tmp_path} had batch=2, not 4" in str(of(batch=4))
    # The same of a run whose settings had other names when it was made.
    written = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(written.replace("student_lr:", "student_rate:").replace("keep_last:", "keep:"))
    assert of(steps=8780).seconds == 2.05
    assert "(the run in" in str(of(device="cuda"))
    (tmp_path / "losses.csv").write_text("step,seconds\n10,60\n")
    assert "has too few steps in its log" in str(of())
    (tmp_path / "losses.csv").write_text("step,seconds\n10,soon\n")
    assert "cannot be read" in str(of())


def test_hours_are_calculated_from_operations(of: Callable[..., Estimate], shape: Path, tmp_path: Path) -> None:
    paper = {"teacher_guidance": 1.5, "fake_guidance": 1.5}
    passes = {
        10: {}, 12: {"gradient_checkpointing": True}, 14: {"loss": "sid"}, 8: {"teacher_guidance": 1.0, "fake_guidance": 1.0},
        18: {"fake_updates": 3}, 14.5: {"anchor_weight": 1.0, "anchor_steps": 9, "anchor_every": 4},
    }  # fmt: skip
    for wanted, changes in passes.items():
        assert passes_of_step(tiny("", "none", tmp_path, base_config=str(shape), **paper | changes)) == wanted
    network, _ = empty_network(tiny("", "none", tmp_path, base_config="sd15"))
    # Of every convolution and linear layer twice its weight for each place of its output; attention's products come on top.
    counted = [0]

    def count(layer: torch.nn.Module, given: object, output: torch.Tensor) -> None:
        counted[0] += 2 * layer.weight.numel() * output.numel() // layer.weight.shape[0]

    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(count)
    found = operations_of_call(network, 64)
    assert counted[0] < found < 1.3 * counted[0]
    hours = of().hours
    assert hours["A100"] / hours["H100"] == pytest.approx(PEAKS["H100"] / PEAKS["A100"])
    assert of(steps=12).hours["A100"] == pytest.approx(2 * of(steps=6).hours["A100"])
