"""inspect, extract and analyze on the command line: files written, tables, JSON, and refusals of one line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lorad_networks as nets
import networks
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from wadi_core import LoRaD, cli
from wadi_core.lorad.adapter import fuse
from wadi_core.lorad.analysis import angle_statistics
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.lorad.rotation import angles
from wadi_core.lorad.weights import Weights


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in LDM layout, its student in diffusers layout, the LoRaD between them, and one trained freely."""
    place = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    network = nets.unet(nets.SMALL)
    base = nets.weights(network)
    ldm = {f"model.diffusion_model.{networks.ldm_unet_name(name, nets.SMALL)}": t for name, t in base.items()}
    write_safetensors(place / "base.safetensors", ldm)
    lorad = networks.random_lorad(network)
    lorad.save(place / "true.safetensors", torch.float32)
    fuse(network, [(lorad, 1.0)], keep_backup=False)
    write_safetensors(place / "student.safetensors", nets.weights(network))
    halved = {name: tensor.half() for name, tensor in nets.weights(network).items()}
    write_safetensors(place / "halved.safetensors", halved)
    free = {name: tensor * (1 + 0.05 * torch.randn_like(tensor)) for name, tensor in base.items()}
    write_safetensors(place / "free.safetensors", free)
    write_safetensors(place / "pixart.safetensors", nets.weights(nets.pixart(nets.SMALL_PIXART)))
    return place


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a command in the folder of the networks: status, what it wrote, and its complaint."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(cli, "_silence", lambda: None)

    def run_command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        out, error = capsys.readouterr()
        return status, out, error.split("\r")[-1].strip()  # behind the progress bar

    return run_command


def test_extract_then_merge_gives_the_student_back(run, place: Path, tmp_path: Path) -> None:
    lorad, merged = tmp_path / "found.safetensors", tmp_path / "merged.safetensors"
    status, out, error = run("extract", "--base", "base.safetensors", "--student", "student.safetensors", "-o", lorad)
    assert (status, error) == (0, "")
    assert "48: 48 of rank 4" in out and "100.00% of the squared change" in out and str(lorad) in out
    status, _, _ = run("merge", "--base", "base.safetensors", "--lorad", lorad, "-o", merged)
    assert status == 0
    weights = [Weights.open(path) for path in (merged, place / "student.safetensors", place / "base.safetensors")]
    missed = change = 0.0
    for path in weights[0].layers():
        made, student, base = (each.linear(path).double() for each in weights)
        missed += (made - student).square().sum().item()
        change += (student - base).square().sum().item()
    assert (missed / change) ** 0.5 < 1e-5
    assert LoRaD.load(lorad).metadata.base_sha256 == weights[2].sha256()


def test_factors_are_as_exact_as_the_networks(run, tmp_path: Path) -> None:
    found = tmp_path / "found.safetensors"
    for student, options, dtype in [
        ("student", (), torch.float32),
        ("halved", (), torch.float16),
        ("student", ("--dtype", "bf16"), torch.bfloat16),
    ]:
        run("extract", "--base", "base.safetensors", "--student", f"{student}.safetensors", "-o", found, *options)
        assert {tensor.dtype for pair in LoRaD.load(found).factors.values() for tensor in pair} == {dtype}


def test_extract_says_what_is_no_rotation_layer_by_layer(run, tmp_path: Path) -> None:
    command = ("extract", "--base", "base.safetensors", "--student", "free.safetensors", "-o", tmp_path / "found.safetensors")
    status, out, _ = run(*command, "--rank", 2, "--layers")
    assert status == 0
    assert "the student is no rotation of this base" in out
    assert out.count("time_emb_proj") >= 4
    _, out, _ = run(*command, "--energy", 0.5, "--json")
    report = json.loads(out)
    assert report["is_rotation"] is False and 0.3 < report["explained"] < 0.7
    assert {"path", "rank", "change", "explained", "error", "norm_change", "wrapped"} <= report["layers"][0].keys()


def test_analyze_writes_a_table_json_and_a_picture(run, tmp_path: Path) -> None:
    picture = tmp_path / "change.png"
    command = ("analyze", "--base", "base.safetensors", "--student", "student.safetensors")
    status, out, error = run(*command, "--plot", picture, "--layers")
    assert (status, error) == (0, "")
    assert "norm_change" in out and "48 layers, %" in out and str(picture) in out
    with Image.open(picture) as image:
        assert image.format == "PNG"
    report = json.loads(run(*command, "--json")[1])
    assert report["norm_change"]["mean"] < 1e-4 < report["direction_change"]["mean"]
    assert len(report["layers"]) == 48
    same = json.loads(run("analyze", "--base", "base.safetensors", "--student", "halved.safetensors", "--json")[1])
    assert same["norm_change"]["mean"] < 0.1


def test_analyze_writes_the_networks_of_the_swap_experiment(run, tmp_path: Path) -> None:
    norms, directions = tmp_path / "norms.safetensors", tmp_path / "directions.safetensors"
    both = ("--base", "base.safetensors", "--student", "free.safetensors")
    status, out, error = run("analyze", *both, "--teacher-norms", norms, "--teacher-directions", directions)
    assert (status, error) == (0, "") and str(norms) in out and str(directions) in out
    found = json.loads(run("analyze", "--base", "base.safetensors", "--student", norms, "--json")[1])
    assert found["norm_change"]["mean"] < 1e-4 < found["direction_change"]["mean"]
    found = json.loads(run("analyze", "--base", "base.safetensors", "--student", directions, "--json")[1])
    assert found["direction_change"]["mean"] < 1e-4 < found["norm_change"]["mean"]


def test_inspect_shows_angles_and_knows_the_base_in_any_layout(run, place: Path) -> None:
    lorad = LoRaD.load(place / "true.safetensors")
    every = torch.cat([angles(a, b).abs().flatten() for a, b in lorad.factors.values()])
    report = json.loads(run("inspect", "true.safetensors", "--base", "base.safetensors", "--json")[1])
    assert report["angles"]["mean"] == pytest.approx(every.mean().item(), rel=1e-4)
    assert report["angles"]["max"] == pytest.approx(every.max().item())
    assert report["angles"]["beyond"] == pytest.approx((every > torch.pi / 2).float().mean().item())
    assert (report["base"]["layers_matched"], report["base"]["layout"]) == (48, "ldm")
    assert report["base"]["trained_on"] is None
    _, out, _ = run("inspect", "true.safetensors", "--base", "student.safetensors")
    assert "48 of 48 layers match" in out and "above pi/2" in out


def test_inspect_tells_the_base_it_was_trained_on_from_another(run, tmp_path: Path) -> None:
    found = tmp_path / "found.safetensors"
    run("extract", "--base", "base.safetensors", "--student", "student.safetensors", "-o", found)
    assert "  the base it was trained on" in run("inspect", found, "--base", "base.safetensors")[1]
    assert "  not the base it was trained on" in run("inspect", found, "--base", "free.safetensors")[1]


def test_statistics_of_angles() -> None:
    found = angle_statistics([(torch.tensor([[1.0]]), torch.tensor([[3.0, -1.0]])), (torch.zeros(1, 1), torch.ones(1, 2))])
    assert (found.mean, found.max, found.beyond) == (1.0, 3.0, 0.25)
    assert found.rms == pytest.approx(2.5**0.5)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest result had."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "split" not in str(func):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_statistics_of_large_layers_take_some_rows_at_a_time() -> None:
    a, b = torch.randn(6000, 2), torch.randn(2, 4000)
    whole = (a @ b).abs()
    with Largest() as largest:
        found = angle_statistics([(a, b)])
    assert largest.numbers <= 1 << 22 < whole.numel()
    assert found.mean == pytest.approx(float(whole.mean()), rel=1e-4) and found.max == pytest.approx(float(whole.max()))


def test_a_small_file_that_claims_huge_layers_is_refused(run, tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {layer: (torch.ones(400_000, 1), torch.ones(1, 400_000))}
    LoRaD(factors).save(tmp_path / "huge.safetensors")
    status, out, error = run("inspect", tmp_path / "huge.safetensors")
    assert (status, out) == (1, "") and "160,000,000,000 angles in all, more than any network" in error


def test_refusals_are_one_line_and_nothing_is_written(run, tmp_path: Path, place: Path, monkeypatch) -> None:
    output = tmp_path / "found.safetensors"
    both = ("--base", "base.safetensors", "--student")
    for command, message in [
        (("extract", *both, "base.safetensors", "-o", output), "the same file"),
        (("extract", *both, "pixart.safetensors", "-o", output), "different networks"),
        (("extract", *both, "missing.safetensors", "-o", output), "no such file"),
        (("extract", *both, "true.safetensors", "-o", output), "LoRaD adapter"),
        (("extract", *both, "student.safetensors", "-o", place / "student.safetensors"), "overwrite an input"),
        (("extract", *both, "student.safetensors", "-o", tmp_path / "no" / "f.safetensors"), "folder does not exist"),
        (("extract", *both, "student.safetensors", "-o", output, "--energy", 2), "energy is a share"),
        (("analyze", *both, "pixart.safetensors"), "different networks"),
        (("analyze", *both, "student.safetensors", "--plot", "picture.jpg"), "must end in .png"),
        (("analyze", *both, "student.safetensors", "--teacher-norms", output.parent), "must end in .safetensors"),
        (("analyze", *both, "student.safetensors", "--teacher-norms", place / "base.safetensors"), "overwrite an input"),
    ]:
        status, out, error = run(*command)
        assert (status, out) == (1, ""), command
        assert message in error and "\n" not in error
    status, _, error = run("extract", *both, "student.safetensors", "-o", output, "--rank", 4, "--energy", 0.5)
    assert status == 2 and "not both" in error
    monkeypatch.setitem(sys.modules, "PIL", None)
    status, _, error = run("analyze", *both, "student.safetensors", "--plot", tmp_path / "picture.png")
    assert status == 1 and "PIL is not installed" in error
    assert list(tmp_path.iterdir()) == []
