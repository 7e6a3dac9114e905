"""Adapters in other programs' forms: the authors' factors both ways, and plain LoRA with the error it costs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from layout_networks import SMALL_LINEAR, ldm_state, pixart_original, small_pixart_state, small_state
from lorad_networks import SMALL, SMALL_PIXART, pixart, same_bits, unet
from networks import random_lorad, write_base

from wadi_core.lorad import LoRaD, Metadata, fuse
from wadi_core.lorad.checkpoint import read_header, read_tensors, write_safetensors
from wadi_core.lorad.convert import convert_file, eps_error, save_factors, to_lora
from wadi_core.lorad.weights import Weights


@pytest.fixture(scope="module")
def state():
    return small_state(SMALL_LINEAR)


@pytest.fixture(scope="module")
def lorad():
    return random_lorad(unet(SMALL_LINEAR), rank=3)


def same_factors(one: LoRaD, other: LoRaD) -> bool:
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(a, b) for key in one.factors for a, b in zip(one.factors[key], other.factors[key], strict=True)
    )


# The authors' factors


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("make", [lambda: unet(SMALL), lambda: unet(SMALL_LINEAR), lambda: pixart(SMALL_PIXART)])
def test_factors_there_and_back(make, ending, tmp_path):
    lorad = random_lorad(make())
    lorad.save(tmp_path / "lorad.safetensors", torch.float32)
    convert_file(tmp_path / "lorad.safetensors", tmp_path / f"kduv.{ending}", "factors", torch.float32)
    convert_file(tmp_path / f"kduv.{ending}", tmp_path / "back.safetensors", "lorad", torch.float32)
    back = LoRaD.load(tmp_path / "back.safetensors")
    assert same_factors(back, lorad)
    assert back.one_step == lorad.one_step
    assert back.metadata.architecture == lorad.metadata.architecture


def test_factors_have_the_authors_names(lorad, tmp_path):
    save_factors(lorad, tmp_path / "kduv.pth")
    names = set(torch.load(tmp_path / "kduv.pth", weights_only=True))
    layers = {name.rpartition(".")[0] for name in names}
    assert layers <= set(dict(unet(SMALL_LINEAR, "meta").named_modules()))
    assert names == {f"{layer}.theta_{which}" for layer in layers for which in "ab"}
    assert len(layers) == len(lorad.factors)


def test_what_factors_cannot_say_is_refused(lorad, tmp_path):
    other = LoRaD(lorad.factors, Metadata("unet-custom", 0.01, 999))
    with pytest.raises(ValueError, match="cannot say their schedule"):
        save_factors(other, tmp_path / "kduv.pth")
    with pytest.raises(ValueError, match="written as .safetensors or .pth"):
        save_factors(lorad, tmp_path / "kduv.zip")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_the_input_is_refused(lorad, tmp_path):
    lorad.save(tmp_path / "lorad.safetensors")
    before = (tmp_path / "lorad.safetensors").read_bytes()
    with pytest.raises(ValueError, match="would overwrite an input"):
        convert_file(tmp_path / "lorad.safetensors", tmp_path / "lorad.safetensors", "lorad", torch.float16)
    assert (tmp_path / "lorad.safetensors").read_bytes() == before


# Plain LoRA


def turned(state, lorad):
    module = unet(SMALL_LINEAR)
    module.load_state_dict(state)
    fuse(module, [(lorad, 1.0)])
    return dict(module.state_dict())


def test_a_lora_of_full_rank_is_the_change(state, lorad):
    lora = to_lora(Weights.of(state), [(lorad, 1.0)], rank=10_000, dtype=torch.float32)
    after = turned(state, lorad)
    for path, (up, down) in lora.factors.items():
        weight = state[f"{path}.weight"]
        assert up.shape[1] == down.shape[0] == lora.rank == 64  # what the largest layer needs
        assert torch.allclose(weight + up @ down, after[f"{path}.weight"], atol=1e-5)
    assert lora.error < 1e-6


def test_the_error_is_that_of_the_best_approximation(state, lorad):
    rank = 5
    lora = to_lora(Weights.of(state), [(lorad, 1.0)], rank, dtype=torch.float32)
    after = turned(state, lorad)
    missing = change = 0.0
    for path, (up, down) in lora.factors.items():
        delta = after[f"{path}.weight"].double() - state[f"{path}.weight"].double()
        energies = torch.linalg.svdvals(delta).square()
        assert up.shape == (delta.shape[0], rank) and down.shape == (rank, delta.shape[1])
        assert lora.errors[path].relative == pytest.approx((energies[rank:].sum() / energies.sum()).sqrt().item(), rel=1e-4)
        missing, change = missing + energies[rank:].sum().item(), change + energies.sum().item()
    assert lora.error == pytest.approx((missing / change) ** 0.5, rel=1e-4)
    assert 0.05 < lora.error < 1.0
    larger = to_lora(Weights.of(state), [(lorad, 1.0)], rank + 5, dtype=torch.float32)
    assert larger.error < lora.error


def test_any_layout_of_the_base_gives_the_same_lora(state, lorad):
    one = to_lora(Weights.of(state), [(lorad, 0.5)], 4)
    other = to_lora(Weights.of(ldm_state(state, SMALL_LINEAR)), [(lorad, 0.5)], 4)
    assert one.error == pytest.approx(other.error)
    assert one.factors.keys() == other.factors.keys()
    for path in one.factors:
        assert all(torch.equal(a, b) for a, b in zip(one.factors[path], other.factors[path], strict=True))


def test_the_file_has_the_names_and_facts_that_programs_look_for(state, lorad, tmp_path):
    lora = to_lora(Weights.of(state), [(lorad, 1.0)], 4)
    lora.save(tmp_path / "lora.safetensors")
    header = read_header(tmp_path / "lora.safetensors")
    assert {name.partition(".")[2] for name in header.places} == {"lora_down.weight", "lora_up.weight", "alpha"}
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert header.shapes[f"{key}.lora_down.weight"] == (4, 32)
    tensors = read_tensors(header)
    assert tensors[f"{key}.alpha"] == 4.0
    assert header.metadata["ss_network_module"] == "networks.lora"
    assert header.metadata["ss_network_dim"] == header.metadata["ss_network_alpha"] == "4"
    assert header.metadata["wadi.alpha_T_squared"] == "0.0047"
    assert "wadi.format" not in header.metadata
    with pytest.raises(ValueError, match="ordinary LoRA"):
        LoRaD.load(tmp_path / "lora.safetensors")


def test_pixart_gets_the_names_of_peft(tmp_path):
    lorad = random_lorad(pixart(SMALL_PIXART), rank=2)
    lora = to_lora(Weights.of(pixart_original(small_pixart_state())), [(lorad, 1.0)], 3)
    lora.save(tmp_path / "lora.safetensors")
    shapes = read_header(tmp_path / "lora.safetensors").shapes
    assert shapes["transformer.transformer_blocks.0.attn2.to_k.lora_A.weight"] == (3, 16)
    assert not any(name.endswith(".alpha") for name in shapes)


def test_what_makes_no_lora_is_refused(state, lorad):
    base = Weights.of(state)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        to_lora(base, [(lorad, 1.0)], 0)
    with pytest.raises(ValueError, match="nothing changes"):
        to_lora(base, [(lorad, 0.0)], 4)
    with pytest.raises(ValueError, match="from -100 to 100"):
        to_lora(base, [(lorad, float("nan"))], 4)
    with pytest.raises(ValueError, match="made for pixart-alpha"):
        to_lora(base, [(random_lorad(pixart(SMALL_PIXART)), 1.0)], 4)


def test_the_error_of_what_the_network_returns(state, lorad):
    module = unet(SMALL_LINEAR)
    module.load_state_dict(state)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    z, told = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)

    def predict() -> torch.Tensor:
        return module(z, 999, told).sample

    stack = [(lorad, 1.0)]
    exact = eps_error(module, stack, to_lora(Weights.of(state), stack, 64, torch.float32), predict)
    rough = eps_error(module, stack, to_lora(Weights.of(state), stack, 2, torch.float32), predict)
    assert max(exact) < 1e-3 < rough[0] < rough[1]
    assert same_bits(dict(module.state_dict()), before)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A small base as a folder, an adapter for it, and the LoRA of full rank that stands for it."""
    place = tmp_path_factory.mktemp("convert")
    folder, networks = write_base(place / "base")
    lorad = random_lorad(networks["unet"], spread=0.1)
    lorad.save(place / "lorad.safetensors", torch.float32)
    to_lora(Weights.open(folder), [(lorad, 1.0)], 64, torch.float32).save(place / "lora.safetensors")
    return place


def test_diffusers_loads_the_lora_and_draws_the_same(place):
    pytest.importorskip("peft")
    from wadi_core import OneStepPipeline

    pipe = OneStepPipeline.from_pretrained(place / "base", lorad=place / "lorad.safetensors", precision="exact")
    expected = pipe("a red circle", return_latents=True).latents
    pipe.set_lorad(None)
    bare = pipe("a red circle", return_latents=True).latents
    load_lora(pipe, place / "lora.safetensors")
    found = pipe("a red circle", return_latents=True).latents
    assert (found - expected).norm() < 1e-2 * (expected - bare).norm()


def load_lora(pipe, path: Path) -> None:
    """Through the method that users call, on a pipeline of diffusers' own around the same network."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    base = pipe.base
    StableDiffusionPipeline(
        base.vae,
        base.text_encoder,
        base.tokenizer,
        base.unet,
        DDIMScheduler(steps_offset=1, clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    ).load_lora_weights(str(path.parent), weight_name=path.name)


def test_the_names_are_those_that_diffusers_translates(place):
    """diffusers' own translation of sd-scripts' names finds every layer, with peft installed or not."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    tensors = read_tensors(read_header(place / "lora.safetensors"))
    translated, alphas = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    base = Weights.open(place / "base")
    ends = r"unet\.(.+?)(\.lora\.|\.lora_linear_layer\.|_lora\.)down\.weight"
    found = {re.fullmatch(ends, name)[1].replace(".processor", "") for name in translated if ".down." in name}
    assert {path.replace(".to_out", ".to_out.0") if path.endswith(".to_out") else path for path in found} == set(base.layers())
    assert set(alphas.values()) == {64.0}


# The command line


def test_convert_and_merge_from_the_command_line(place, tmp_path, capsys):
    from wadi_core.cli import main

    base, lorad = str(place / "base"), str(place / "lorad.safetensors")
    factors, back = str(tmp_path / "kduv.pth"), str(tmp_path / "back.safetensors")
    assert main(["convert", lorad, "-o", factors, "--to", "factors"]) == 0
    assert main(["convert", factors, "-o", back, "--to", "lorad", "--dtype", "fp32"]) == 0
    assert same_factors(LoRaD.load(back), LoRaD.load(lorad))
    capsys.readouterr()
    out = str(tmp_path / "lora.safetensors")
    assert main(["convert", lorad, "-o", out, "--to", "lora", "--base", base, "--rank", "4"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("rank 4: 48 layers")
    assert "of the change is missing" in shown[1]
    assert shown[-2].startswith("output of the network: off by ")
    assert shown[-1] == out
    merged = str(tmp_path / "merged.safetensors")
    assert main(["merge", "--base", base, "--lorad", f"{lorad}:0.5", "--lorad", lorad, "-o", merged]) == 0
    assert capsys.readouterr().out == f"unet-custom in diffusers layout: 48 layers rotated\n{merged}\n"
    with pytest.raises(SystemExit) as usage:
        main(["convert", lorad, "-o", out, "--to", "lora", "--base", base])
    assert usage.value.code == 2
    with pytest.raises(SystemExit) as usage:
        main(["convert", lorad, "-o", out, "--to", "lorad", "--rank", "4"])
    assert usage.value.code == 2


def test_a_network_without_its_other_parts_is_measured_in_weights_only(place, tmp_path, capsys):
    from wadi_core.cli import main

    alone = tmp_path / "unet.safetensors"
    source = Weights.open(place / "base")
    write_safetensors(alone, {name: source.tensor(name) for name in source.names})
    lorad, out = str(place / "lorad.safetensors"), str(tmp_path / "lora.safetensors")
    assert main(["convert", lorad, "-o", out, "--to", "lora", "--base", str(alone), "--rank", "2"]) == 0
    assert "output of the network: not measured (" in capsys.readouterr().out


def test_errors_of_the_commands_are_one_line(place, tmp_path, capsys):
    from wadi_core.cli import main

    base, lorad = str(place / "base"), str(place / "lorad.safetensors")
    for arguments, said in (
        (["merge", "--base", base, "--lorad", lorad, "-o", lorad], "would overwrite an input"),
        (["merge", "--base", base, "--lorad", "none", "-o", str(tmp_path / "o.safetensors")], "nothing to merge"),
        (["merge", "--base", lorad, "--lorad", lorad, "-o", str(tmp_path / "o.safetensors")], "a LoRaD adapter, not a network"),
        (["convert", str(place / "lora.safetensors"), "-o", str(tmp_path / "o.safetensors"), "--to", "lorad"], "ordinary LoRA"),
        (["convert", lorad, "-o", lorad, "--to", "lora", "--base", base, "--rank", "4"], "would overwrite an input"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("wadi: error: ") and said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
