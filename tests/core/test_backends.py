"""Backends: the same pictures by another project's compiler, adapters changed without a new export, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipeline_kit import Kit, largest_difference

from wadi_core.backends import openvino as backend
from wadi_core.cli import main

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is converted."""
    done: list[str] = []
    real = backend.convert

    def counted(openvino: Any, network: Any, part: Any) -> Any:
        done.append(part.output)
        return real(openvino, network, part)

    monkeypatch.setattr(backend, "convert", counted)
    return done


def test_openvino_draws_the_same_whatever_is_changed(sd15: Kit, conversions: list[str]) -> None:
    ours, theirs = sd15.load(), sd15.load(backend="openvino")

    def compare(**options: Any) -> None:
        one, other = (pipe(["a cat", "two owls"], return_latents=True, **options) for pipe in (ours, theirs))
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-4, atol=1e-3)
        assert max(map(largest_difference, one.images, other.images)) <= 1

    compare()
    compare(width=72, height=128, batch=1)  # no size is fixed
    for pipe in (ours, theirs):
        pipe.set_lorad((sd15.lorad, 0.3))
    compare()
    for pipe in (ours, theirs):
        pipe.set_lorad(None)
    compare()
    assert conversions == ["out_sample", "sample"]  # adapters are changed without a new one
    theirs.set_backend("eager")
    one, other = (pipe("a cat", return_latents=True).latents for pipe in (ours, theirs))
    assert torch.equal(one, other)


def test_with_a_precision_and_with_embeddings_of_other_prompts(sd15: Kit) -> None:
    pipe = sd15.load(backend="openvino", precision="fast")
    exact = sd15.load()("a cat", return_latents=True).latents
    error = (pipe("a cat", return_latents=True).latents - exact).square().mean() / exact.square().mean()
    assert error.sqrt() < 0.1


def test_on_the_command_line(sd15: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "a cat", "-o", str(tmp_path / "p.png"), "--base", str(sd15.folder), "--lorad", str(sd15.lorad)]
    assert main([*words, "--device", "cpu", "--precision", "exact", "--backend", "openvino"]) == 0
    assert "exact precision by openvino" in capsys.readouterr().out
    with Image.open(tmp_path / "p.png") as picture:
        assert largest_difference(picture, sd15.load()("a cat").images[0]) <= 1


def test_what_is_refused(sd15: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend must be one of eager, openvino, not 'tensorrt'"):
        sd15.load(backend="tensorrt")
    with pytest.raises(ValueError, match="needs networks in float32"):
        sd15.load(backend="openvino", dtype="bf16")
    pipe = sd15.load(backend="openvino")
    with pytest.raises(ValueError, match="without ControlNets, High Resolution"):
        pipe("a cat", width=128, height=128, hires=True)
    with pytest.raises(ValueError, match="set the backend eager first"):
        pipe.to(torch.bfloat16)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"the package openvino is not installed: .*\.\[openvino\]"):
        pipe.set_backend("openvino")
    assert pipe.backend == "openvino"
