"""LoRaD as a method of peft: the same network as LoRaD.apply_to, and everything that peft does with adapters."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorad_networks
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import load_peft_weights
from peft_networks import drawn, layers, mlp, random_config, small_unet, tiny_llama, two_adapters
from torch import Tensor, nn

from wadi_core.lorad import LoRaD, Metadata
from wadi_core.lorad.layers import student_layers
from wadi_core.lorad.rotation import angles, rotate
from wadi_core.peft import LoRaDConfig, LoRaDLayer, LoRaDType, add_lorad, from_peft, to_peft

ROOT = Path(__file__).resolve().parents[2]
STUDENT = Metadata("unet-custom", 0.0047, 999, title="a student", license="MIT", extra={"author": "someone"})


def by_formula(weight: Tensor, layer: LoRaDLayer, strengths: dict[str, float]) -> Tensor:
    """The weight turned by the sum of the angles, with the plain formula."""
    parts = [angles(layer.lorad_a[n], layer.lorad_b[n], s) for n, s in strengths.items() if n in layer.lorad_a]
    return rotate(weight, torch.stack(parts).sum(0))


def test_importing_again_changes_nothing_but_three_entries() -> None:
    code = """
from peft import mapping, tuners
from peft.utils import PeftType
import importlib
tables = [mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING, mapping.PEFT_TYPE_TO_PREFIX_MAPPING]
before, members, mixed = [dict(table) for table in tables], list(PeftType), dict(mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
import wadi_core.peft as ours
importlib.reload(ours)
entries = [ours.LoRaDConfig, ours.LoRaDModel, "lorad_"]
assert [{k: v for k, v in t.items() if k not in b} for t, b in zip(tables, before)] == [{"LORAD": e} for e in entries]
assert all(table[k] is b[k] for table, b in zip(tables, before) for k in b)
assert list(PeftType) == members and mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING == mixed
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    configs: dict[Any, Any] = {**PEFT_TYPE_TO_CONFIG_MAPPING}
    assert configs[LoRaDType.LORAD] is configs["LORAD"] is LoRaDConfig
    assert LoRaDType.LORAD.value == "LORAD"  # what transformers asks for


def test_an_older_peft_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, "_get_adapter_state_dict")
    spec = importlib.util.spec_from_file_location("wadi_core.a_second_peft", ROOT / "wadi_core" / "peft.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"needs peft 0\.21 or newer, this is [\d.]+: update peft$"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# Conversion


@pytest.mark.parametrize("ranks", [(3,), (1, 4)], ids=["one rank", "ranks of their own"])
def test_round_trip_equals_apply_to(ranks: tuple[int, ...], tmp_path: Path) -> None:
    unet = small_unet()
    parts = [lorad_networks.random_adapter(unet, rank, STUDENT, seed=rank).factors for rank in ranks]
    lorad = LoRaD({key: parts[i % len(parts)][key] for i, key in enumerate(parts[0])}, STUDENT)
    bare = drawn(unet)
    lorad.apply_to(unet)
    expected = drawn(unet)
    lorad.remove(unet)
    assert (expected - bare).abs().max() > 1e-3

    lorad.save(tmp_path / "a.safetensors", torch.float32)
    to_peft(tmp_path / "a.safetensors", tmp_path / "folder", unet)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = PeftModel.from_pretrained(unet, str(tmp_path / "folder"))
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    torch.testing.assert_close(drawn(model), expected, rtol=0, atol=1e-6)

    back = from_peft(tmp_path / "folder")
    assert back.metadata == STUDENT
    assert back.factors.keys() == lorad.factors.keys()
    assert all(torch.equal(x, y) for key in back.factors for x, y in zip(back.factors[key], lorad.factors[key], strict=True))
    assert torch.equal(drawn(model.unload()), bare)


def test_pixart_round_trip_by_the_shapes_of_its_tensors(tmp_path: Path) -> None:
    network = lorad_networks.pixart(lorad_networks.SMALL_PIXART)
    lorad = lorad_networks.random_adapter(network)
    to_peft(lorad, tmp_path, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})
    model = PeftModel.from_pretrained(network, str(tmp_path))
    assert len(layers(model)) == len(lorad.factors) == len(student_layers(model.unload()))
    back = from_peft(tmp_path)
    assert back.metadata.architecture == "pixart-alpha" and back.factors.keys() == lorad.factors.keys()


def test_what_peft_trained_becomes_a_lorad(tmp_path: Path) -> None:
    """Without metadata of ours, and of a few layers only."""
    unet = small_unet()
    model = get_peft_model(unet, LoRaDConfig(r=2, target_modules=["to_q", "to_v"], init_weights=False))
    expected = drawn(model)
    model.save_pretrained(str(tmp_path))
    unet = model.unload()
    lorad = from_peft(tmp_path, Metadata("unet-custom", title="mine"))
    assert lorad.metadata.title == "mine" and len(lorad.factors) == len(model.targeted_module_names)
    lorad.apply_to(unet)
    torch.testing.assert_close(drawn(unet), expected, rtol=0, atol=1e-6)


def test_a_unet_of_diffusers_trains_saves_and_takes_several_adapters(tmp_path: Path) -> None:
    unet = small_unet()
    bare = drawn(unet)
    unet.add_adapter(LoRaDConfig(r=2, target_modules=student_layers(unet), init_weights=False), "first")
    first = drawn(unet)
    unet.save_lora_adapter(tmp_path / "saved", "first")
    style = lorad_networks.random_adapter(small_unet(), 3)
    add_lorad(unet, style, "style")
    unet.delete_adapters("first")
    add_lorad(unet, tmp_path / "saved", "again")
    assert torch.equal(drawn(unet), first)

    unet.set_adapters(["again", "style"], [0.5, -0.25])
    both = drawn(unet)
    other = small_unet()
    from_peft(tmp_path / "saved").apply_to(other, 0.5, "again")
    style.apply_to(other, -0.25, "style")
    torch.testing.assert_close(both, drawn(other), rtol=0, atol=1e-6)

    unet.set_adapters(["again", "style"], [0.0, 0.0])
    assert torch.equal(drawn(unet), bare)
    unet.set_adapters(["again", "style"], [0.5, -0.25])
    unet.fuse_lora()
    torch.testing.assert_close(drawn(unet), both, rtol=0, atol=1e-5)
    unet.unfuse_lora()
    assert torch.equal(drawn(unet), both)
    unet.disable_adapters()
    assert torch.equal(drawn(unet), bare)
    unet.enable_adapters()
    assert torch.equal(drawn(unet), both)
    unet.unload_lora()
    assert torch.equal(drawn(unet), bare) and not layers(unet)


# Layers


def test_a_new_adapter_turns_nothing() -> None:
    base = mlp()
    x = torch.randn(3, 8)
    expected = base(x)
    model = get_peft_model(base, random_config(init_weights=True))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    assert all(not layer.lorad_a["default"].any() and layer.lorad_b["default"].any() for layer in layers(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_strength_zero_disabling_and_unmerging_are_exact(dtype: torch.dtype) -> None:
    base = mlp(dtype=dtype)
    before = lorad_networks.weights(base)
    x = torch.randn(3, 8, dtype=dtype)
    expected = base(x)
    model = two_adapters(dtype)
    model.base_model.set_adapter(["one", "two"])
    turned = model(x)
    assert not torch.equal(turned, expected)
    for layer in layers(model):
        layer.set_scale("one", 0.0)
        layer.set_scale("two", 0)
    assert torch.equal(model(x), expected)
    for layer in layers(model):
        layer.set_scale("one", 1.0)
        layer.set_scale("two", 1.0)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.merge_adapter()
    assert torch.equal(model(x), turned)
    model.unmerge_adapter()
    assert torch.equal(model(x), turned)
    assert lorad_networks.same_bits(lorad_networks.weights(model.unload()), before)


def test_several_adapters_add_their_angles_and_one_after_the_other_is_merged_with_one_rounding() -> None:
    model = two_adapters(torch.bfloat16)
    model.base_model.set_adapter(["one", "two"])
    layer = layers(model)[-1]
    layer.scale_layer(0.5)
    layer.set_scale("two", -0.7)
    weight = layer.weight.detach().clone()
    expected = by_formula(weight, layer, {"one": 0.5, "two": -0.7})
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, layer.bias))
    layer.merge(adapter_names=["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        layer.merge()
    assert torch.equal(layer.weight, expected) and layer.merged_adapters == ["one", "two"]
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    layer.unscale_layer()
    assert layer.scaling == {"one": 1.0, "two": 1.0}
    layer.scale_layer(0.25)
    layer.unscale_layer(0.25)
    assert layer.scaling == {"one": 1.0, "two": 1.0}


def test_safe_merge_refuses_and_changes_nothing() -> None:
    model = two_adapters()
    layer = layers(model)[0]
    weight = layer.weight.detach().clone()
    layer.lorad_a["one"].data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter one seems"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, weight) and not layer.merged
    layer.merge()
    assert not layer.weight.isfinite().all()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_deleted_adapters_are_gone() -> None:
    model = two_adapters()
    x = torch.randn(3, 8)
    alone = model(x)
    model.base_model.set_adapter(["one", "two"])
    assert not torch.equal(model(x), alone)
    model.delete_adapter("two")
    assert all(list(layer.lorad_a) == list(layer.scaling) == list(layer.r) == ["one"] for layer in layers(model))
    assert torch.equal(model(x), alone)
    with pytest.raises(ValueError, match="two"):
        model.delete_adapter("two")


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to(dtype=torch.float16)])
def test_angles_stay_in_float32(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(get_peft_model(mlp(), random_config(), autocast_adapter_dtype=False))
    layer = layers(model)[0]
    assert layer.weight.dtype != torch.float32
    assert layer.lorad_a["default"].dtype == layer.lorad_b["default"].dtype == torch.float32
    assert model(torch.randn(3, 8, dtype=layer.weight.dtype)).dtype == layer.weight.dtype


@pytest.mark.parametrize("low_memory", [False, True])
def test_saved_and_loaded(low_memory: bool, tmp_path: Path) -> None:
    model = get_peft_model(mlp(dtype=torch.bfloat16), random_config(modules_to_save=["2"], target_modules=["0"]))
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    expected = model(x)
    model.save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORAD" and settings["r"] == 2
    assert isinstance(PeftConfig.from_pretrained(str(tmp_path)), LoRaDConfig)
    loaded = PeftModel.from_pretrained(mlp(dtype=torch.bfloat16), str(tmp_path), low_cpu_mem_usage=low_memory)
    assert torch.equal(loaded(x), expected)
    loaded.load_adapter(str(tmp_path), adapter_name="second", low_cpu_mem_usage=low_memory)
    loaded.set_adapter("second")
    assert torch.equal(loaded(x), expected)
    assert {factor.dtype for layer in layers(loaded) for factor in layer.lorad_a.values()} == {torch.float32}


# Training


def test_gradients_equal_plain_autograd_and_a_step_moves_the_factors_alone() -> None:
    model = get_peft_model(mlp(), random_config())
    layer, x = layers(model)[0], torch.randn(5, 8, requires_grad=True)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    a, b = (table["default"] for table in (layer.lorad_a, layer.lorad_b))
    layer.set_scale("default", 0.7)
    (layer(x) ** 2).sum().backward()
    copies = [t.detach().clone().requires_grad_() for t in (a, b, x)]
    theta = angles(copies[0], copies[1], 0.7)
    (nn.functional.linear(copies[2], rotate(weight, theta), bias) ** 2).sum().backward()
    for mine, plain in zip((a, b, x), copies, strict=True):
        torch.testing.assert_close(mine.grad, plain.grad)

    before = lorad_networks.weights(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.zero_grad()
    model(x.detach()).square().sum().backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lorad_" in name} and len(moved) == 4


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = get_peft_model(tiny_llama(), LoRaDConfig(r=2, task_type="CAUSAL_LM", init_weights=False)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        tokens = torch.arange(3, 19).reshape(2, 8)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 8  # q_proj and v_proj of two blocks, two factors each
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_small_language_model(tmp_path: Path) -> None:
    tokens = torch.arange(3, 11)[None]
    base = tiny_llama()
    expected = base(tokens).logits
    model = get_peft_model(base, LoRaDConfig(r=2, target_modules="all-linear", init_weights=False))
    turned = model(tokens).logits
    assert len(layers(model)) == 14 and not torch.equal(turned, expected)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), str(tmp_path))(tokens).logits, turned)

    plain = tiny_llama()  # without a PeftModel around it, as transformers does it
    inject_adapter_in_model(LoRaDConfig.from_pretrained(str(tmp_path)), plain)
    set_peft_model_state_dict(plain, load_peft_weights(str(tmp_path), device="cpu"))
    assert torch.equal(plain(tokens).logits, turned)
    merged = model.merge_and_unload()
    assert torch.equal(merged(tokens).logits, turned) and not layers(merged)
    with pytest.raises(ValueError, match="is no layer of a network that LoRaD knows"):
        from_peft(tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "rank r of a LoRaD has to be a whole number from 1 on, not 0"),
        ({"r": 2.5}, "not 2.5"),
        ({"r": True}, "not True"),
        ({"rank_pattern": {"0": -1}}, "not -1"),
        ({"bias": "all"}, "trains no biases"),
        ({"target_modules": "0", "layers_to_transform": [0]}, "as a list of names"),
        ({"layers_pattern": "layers"}, "without layers_to_transform"),
        ({"task_type": "PAINTING"}, "Invalid task type"),
    ],
)
def test_settings_that_no_adapter_can_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        random_config(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(7, 4), "0: 7 inputs do not make pairs"),
        (nn.Conv2d(4, 4, 1), "torch.nn.Linear layers only, this is a Conv2d"),
        (nn.Embedding(4, 4), "this is a Embedding"),
    ],
)
def test_layers_that_cannot_be_turned(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(nn.Sequential(layer), random_config(target_modules=["0"]))


def test_a_network_with_a_live_lorad_is_refused() -> None:
    unet = small_unet()
    lorad_networks.random_adapter(unet).apply_to(unet)
    with pytest.raises(ValueError, match=r"to_q: this layer carries a LoRaD of LoRaD.apply_to"):
        unet.add_adapter(LoRaDConfig(target_modules=["to_q"]))


def test_folders_that_hold_no_lorad(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="there is no such file"):
        from_peft(tmp_path)
    unet = small_unet()
    to_peft(lorad_networks.random_adapter(unet), tmp_path, unet)
    settings = tmp_path / "adapter_config.json"
    good = json.loads(settings.read_text())
    for bad, message in (
        ('{"peft_type": "LORA"}', "a peft adapter of the type 'LORA'"),
        ("{", "this is not a JSON file"),
        (json.dumps({**good, "metadata": {"wadi.timestep": "soon"}}), "wadi.timestep is 'soon'"),
        (json.dumps({**good, "metadata": ["x"]}), "no table of texts"),
    ):
        settings.write_text(bad)
        with pytest.raises(ValueError, match=message) as caught:
            from_peft(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="does not fit this network"):
        to_peft(lorad_networks.random_adapter(lorad_networks.pixart(lorad_networks.SMALL_PIXART)), tmp_path / "no", unet)
    assert not (tmp_path / "no").exists()
