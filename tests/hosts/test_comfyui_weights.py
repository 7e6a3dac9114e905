"""Weights under ComfyUI's patching: the core's, whatever the way they are loaded, stacked, stored or saved."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import comfy_networks
import pytest
import torch
from comfy_graph import Graph, Node
from comfy_server import ComfyError, ComfyServer, environment, host_python
from networks import random_lorad
from safetensors.torch import load_file, save_file

from wadi_core import LoRaD
from wadi_core.lorad import Metadata
from wadi_core.lorad.layouts import detect
from wadi_core.lorad.merge import merge, merged_tensors
from wadi_core.lorad.quantised import dequantise, quantise
from wadi_core.lorad.rotation import rotate_
from wadi_core.lorad.weights import Weights
from wadi_core.pipeline import noise

BASE = "weights.safetensors"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def inside(comfyui_path: Path, comfy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was measured in ComfyUI's own Python."""
    output = tmp_path_factory.mktemp("inside") / "found.json"
    script = Path(__file__).with_name("comfy_inside.py")
    arguments = [host_python(), str(script), str(comfyui_path), str(comfy_base / "custom_nodes/wadi"), str(output)]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


WHOLE = [
    "float32",
    "strength",
    "two",
    "strength of the model",
    "rows of a fused weight",
    "function of the change",
    "under hooks",
]


@pytest.mark.parametrize("case", WHOLE)
def test_the_adapter_computes_the_rotation(inside: dict[str, Any], case: str) -> None:
    assert inside["errors"][case] < 5e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_low_vram_costs_rounding_and_no_more(inside: dict[str, Any], dtype: str) -> None:
    """Two adapters on a weight in half precision: two roundings of it, where one is unavoidable."""
    errors = inside["errors"]
    assert errors[f"low VRAM, torch.{dtype}"] < 2 * errors[f"rounding, torch.{dtype}"] + 1e-6


def test_dynamic_vram_rebuilds_the_adapter_from_its_two_arguments(inside: dict[str, Any]) -> None:
    if "rebuilt" not in inside:
        pytest.skip("this ComfyUI has no dynamic VRAM")
    assert inside["rebuilt"] == {"type": "LoRaDAdapter", "moved": True}
    assert inside["errors"]["dynamic VRAM"] < 1e-6


def test_what_cannot_be_right_is_refused_in_one_line(inside: dict[str, Any]) -> None:
    assert "bypass" in inside["bypass"] and "made for another network" in inside["other shape"]
    assert "\n" not in inside["bypass"] + inside["other shape"]


def test_it_is_registered_once_and_claims_its_own_keys_only(inside: dict[str, Any]) -> None:
    assert inside["registered"] == 1
    assert inside["claimed"] == {"layer": ["layer.lorad_a", "layer.lorad_b"]}


def test_the_embedded_model_can_be_loaded_twice(inside: dict[str, Any]) -> None:
    """ComfyUI asks a MODEL's loader for a second copy when hooks meet dynamic VRAM."""
    assert inside["embedded"] == {"kinds": 1, "model": True, "clip": True}


# In the server


@pytest.fixture(scope="module")
def network(comfy_base: Path) -> torch.nn.Module:
    """A slice of Stable Diffusion 1.5, two LoRaDs and a LoRA for it."""
    made = comfy_networks.unet(comfy_networks.SLICE, seed=11)
    models = comfy_base / "models"
    comfy_networks.diffusion_model(models / "diffusion_models" / BASE, made, comfy_networks.SLICE)
    random_lorad(made, seed=21).save(models / "lorad/one.safetensors", torch.float32)
    for scale in ("one", "sigma"):
        lorad = random_lorad(made, seed=21)
        start = {"alpha_T_squared": 0.1378, "timestep": 625, "input_scale": scale}
        started = LoRaD(lorad.factors, Metadata(**{**vars(lorad.metadata), **start}))
        started.save(models / f"lorad/start-{scale}.safetensors", torch.float32)
    random_lorad(made, seed=22, one_step=False).save(models / "lorad/two.safetensors", torch.float32)
    random_lorad(made, seed=21).save(models / "loras/as-lora.safetensors", torch.float32)
    save_file(comfy_networks.random_lora(made), models / "loras/lora.safetensors")
    torch.manual_seed(4)
    save_file({"conditioning": torch.randn(1, 77, 768)}, comfy_base / "input/weights-prompt.safetensors")
    return made


def load(graph: Graph, dtype: str = "default", name: str = BASE) -> Node:
    return graph("UNETLoader", unet_name=name, weight_dtype=dtype)


def turn(graph: Graph, model: Node, name: str, strength: float = 1.0) -> Node:
    return graph("WaDi_LoadLoRaD", model=model[0], lorad_name=name, strength=strength, one_step=True)


def add(graph: Graph, model: Node, strength: float = 0.8, name: str = "lora.safetensors") -> Node:
    return graph("LoraLoaderModelOnly", model=model[0], lora_name=name, strength_model=strength)


def weights_of(comfy: ComfyServer, graph: Graph, model: Node) -> State:
    """The weights of a MODEL as it computes with them."""
    graph("Probe_DumpWeights", model=model[0], name="weights-in-use.safetensors")
    comfy.run(graph.prompt)
    return load_file(comfy.base / "output/weights-in-use.safetensors")


def base_state(base: Path) -> State:
    return {f"diffusion_model.{name}": tensor for name, tensor in load_file(base / "models/diffusion_models" / BASE).items()}


def expected(base: Path, *steps: tuple[str, float]) -> State:
    """The base's weights after adapters, one after another as the graph has them: the core's rotation, or a plain sum."""
    state = {name: tensor.double() for name, tensor in base_state(base).items()}
    places = detect({name: tuple(tensor.shape) for name, tensor in state.items()}).layers()
    network = {path: state[place.name] for path, place in places.items()}
    for name, strength in steps:
        if name == "lora":
            lora = load_file(base / "models/loras/lora.safetensors")
            for path, weight in network.items():
                weight += strength * comfy_networks.lora_delta(lora, path).double()
            continue
        lorad = LoRaD.load(base / f"models/lorad/{name}.safetensors")
        paths = lorad.matched({f"{path}.weight": tuple(weight.shape) for path, weight in network.items()}).paths
        for key, (a, b) in lorad.factors.items():
            rotate_(network[paths[key]], [(a.double(), b.double(), strength)])
    return state


def same(found: State, wanted: State, start: State, tolerance: float = 1e-5) -> None:
    """Fails where a weight's error exceeds a part of the change."""
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        change = float((weight - start[name].double()).norm())
        off = float((found[name].double() - weight).norm())
        assert off <= tolerance * change or off == 0.0, f"{name}: {off} of {change}"


ORDERS = {
    "one": [("one", 1.0)],
    "weak": [("one", 0.35)],
    "LoRaD, LoRA": [("one", 1.0), ("lora", 0.8)],
    "LoRA, LoRaD": [("lora", 0.8), ("one", 1.0)],
    "two LoRaDs": [("one", 1.0), ("two", -0.5)],
    "LoRaD, LoRA, LoRaD": [("one", 1.0), ("lora", 0.8), ("two", 0.7)],
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_stacks_equal_the_core(comfy: ComfyServer, network: torch.nn.Module, order: str) -> None:
    graph = Graph()
    model = load(graph)
    for name, strength in ORDERS[order]:
        model = add(graph, model, strength) if name == "lora" else turn(graph, model, f"{name}.safetensors", strength)
    same(weights_of(comfy, graph, model), expected(comfy.base, *ORDERS[order]), base_state(comfy.base))


def test_two_lorads_add_their_angles_in_any_order(comfy: ComfyServer, network: torch.nn.Module) -> None:
    found = []
    for order in (("one", "two"), ("two", "one")):
        graph = Graph()
        model = load(graph)
        for name in order:
            model = turn(graph, model, f"{name}.safetensors")
        found.append(weights_of(comfy, graph, model))
    wanted = {name: tensor.double() for name, tensor in found[1].items()}
    same(found[0], wanted, base_state(comfy.base))


def test_a_lora_before_the_lorad_is_told(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model = turn(graph, add(graph, load(graph)), "one.safetensors")
    graph("Probe_DumpWeights", model=model[0], name="weights-in-use.safetensors")
    assert "put the LoRaD first" in comfy.run(graph.prompt).ui[model.id]["text"][0]


def test_strength_0_and_taking_the_node_away_give_the_bits_back(comfy: ComfyServer, network: torch.nn.Module) -> None:
    start = base_state(comfy.base)
    graph = Graph()
    turned = weights_of(comfy, graph, turn(graph, load(graph), "one.safetensors"))
    assert any(not torch.equal(turned[name], tensor) for name, tensor in start.items())
    for strength in (0.0, None):
        graph = Graph()
        model = load(graph)
        if strength is not None:
            model = turn(graph, model, "one.safetensors", strength)
        found = weights_of(comfy, graph, model)
        assert found.keys() == start.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in start.items())


def test_stock_lora_loader_and_hooks_draw_the_same(comfy: ComfyServer, network: torch.nn.Module) -> None:
    """Load LoRaD, Load LoRA and Create Hook LoRA with the same file, sampled at the same schedule."""
    latents = {}
    for way in ("WaDi", "stock", "hook"):
        graph = Graph()
        model = load(graph)
        positive = graph("Probe_Conditioning", name="weights-prompt.safetensors")
        if way == "WaDi":
            model = turn(graph, model, "one.safetensors", 0.8)
        elif way == "stock":
            model = add(graph, model, 0.8, "as-lora.safetensors")
        else:
            hooks = graph("CreateHookLoraModelOnly", lora_name="as-lora.safetensors", strength_model=0.8)
            area = {"strength": 1.0, "set_cond_area": "default"}
            positive = graph("ConditioningSetProperties", cond_NEW=positive[0], hooks=hooks[0], **area)
        if way != "WaDi":
            model = graph("WaDi_OneStepModel", model=model[0], alpha_T_squared=0.0047, timestep=999)
        sizes = {"width": 64, "height": 64, "batch_size": 1, "seed": 5}
        sampled = graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], **sizes)
        graph("Probe_DumpLatent", latent=sampled[0], name="latent.safetensors")
        comfy.run(graph.prompt)
        latents[way] = load_file(comfy.base / "output/latent.safetensors")["samples"]
    lorad = LoRaD.load(comfy.base / "models/lorad/one.safetensors")
    lorad.apply_to(network, 0.8)
    told = load_file(comfy.base / "input/weights-prompt.safetensors")["conditioning"]
    with torch.no_grad():
        z = noise([5], 64, 64)
        wanted = lorad.one_step.x0(z, network(z, 999, encoder_hidden_states=told).sample) / comfy_networks.SD15_VAE_SCALE
    lorad.remove(network)
    for way, found in latents.items():
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4, way


@pytest.mark.parametrize("scale", ["one", "sigma"])
@pytest.mark.parametrize("sampler", ["WaDi", "wadi_one_step", "euler"])
def test_a_start_below_the_last_timestep(comfy: ComfyServer, network: torch.nn.Module, scale: str, sampler: str) -> None:
    graph = Graph()
    model = turn(graph, load(graph), f"start-{scale}.safetensors")
    positive = graph("Probe_Conditioning", name="weights-prompt.safetensors")
    if sampler == "WaDi":
        sizes = {"width": 64, "height": 64, "batch_size": 1, "seed": 5}
        sampled = graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], **sizes)
    else:
        empty = graph("EmptyLatentImage", width=64, height=64, batch_size=1)
        given = {"seed": 5, "steps": 1, "cfg": 1.0, "sampler_name": sampler, "scheduler": "normal", "denoise": 1.0}
        ends = {"positive": positive[0], "negative": positive[0], "latent_image": empty[0]}
        sampled = graph("KSampler", model=model[0], **ends, **given)
    graph("Probe_DumpLatent", latent=sampled[0], name="latent.safetensors")
    comfy.run(graph.prompt)
    found = load_file(comfy.base / "output/latent.safetensors")["samples"]
    lorad = LoRaD.load(comfy.base / f"models/lorad/start-{scale}.safetensors")
    lorad.apply_to(network)
    told, z = load_file(comfy.base / "input/weights-prompt.safetensors")["conditioning"], noise([5], 64, 64)
    alpha, sigma = 0.1378**0.5, (1 - 0.1378) ** 0.5
    x = sigma * z if scale == "sigma" else z
    with torch.no_grad():
        wanted = (x - sigma * network(x, 625, encoder_hidden_states=told).sample) / alpha / comfy_networks.SD15_VAE_SCALE
    lorad.remove(network)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_bypass_loader_is_refused(comfy: ComfyServer, network: torch.nn.Module) -> None:
    if "LoraLoaderBypassModelOnly" not in comfy.get("/object_info"):
        pytest.skip("this ComfyUI has no bypass loader")
    graph = Graph()
    bypassed = graph("LoraLoaderBypassModelOnly", model=load(graph)[0], lora_name="as-lora.safetensors", strength_model=1.0)
    positive = graph("Probe_Conditioning", name="weights-prompt.safetensors")
    sizes = {"width": 64, "height": 64, "batch_size": 1, "seed": 5}
    sampled = graph("WaDi_OneStepSampler", model=bypassed[0], positive=positive[0], **sizes)
    graph("Probe_DumpLatent", latent=sampled[0], name="latent.safetensors")
    with pytest.raises(ComfyError, match="cannot be bypassed"):
        comfy.run(graph.prompt)


def test_fp8_costs_its_rounding_and_no_more(comfy: ComfyServer, network: torch.nn.Module) -> None:
    """Weights stored in float8: turned in float32, rounded once, by chance and not to the nearest as ComfyUI does."""
    graph = Graph()
    found = weights_of(comfy, graph, turn(graph, load(graph, "fp8_e4m3fn"), "one.safetensors"))
    state = base_state(comfy.base)
    stored = {name: tensor.to(torch.float8_e4m3fn).float() for name, tensor in state.items()}
    lorad = LoRaD.load(comfy.base / "models/lorad/one.safetensors")
    changed = dict(merged_tensors(Weights.of(stored), [(lorad, 1.0)]))
    off = bound = size = 0.0
    for name, exact in changed.items():
        assert found[name].dtype == torch.float8_e4m3fn
        off += float((found[name].float() - exact).square().sum())
        bound += float((exact.to(torch.float8_e4m3fn).float() - exact).square().sum())
        size += float(exact.square().sum())
    assert (off / size) ** 0.5 < 0.05
    assert off < 4 * bound  # rounding by chance has twice the variance of rounding to the nearest, or a little more


def test_quantised_weights_are_turned_as_their_values(comfy: ComfyServer, network: torch.nn.Module) -> None:
    """float8 codes with a scale beside them, as quantised checkpoints have them."""
    plain = load_file(comfy.base / "models/diffusion_models" / BASE)
    names = {place.name for place in detect({name: tuple(t.shape) for name, t in plain.items()}).layers().values()}
    file, values = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in plain.items():
        file[name] = tensor
        if name in names:
            codes, scale = quantise(tensor, (tensor.abs().max() / 448.0).reshape(()), torch.float8_e4m3fn)
            file |= {name: codes, name.removesuffix("weight") + "scale_weight": scale}
            values[f"diffusion_model.{name}"] = dequantise(codes, scale)
    save_file(file, comfy.base / "models/diffusion_models/quantised.safetensors")
    graph = Graph()
    found = weights_of(comfy, graph, turn(graph, load(graph, name="quantised.safetensors"), "one.safetensors"))
    state = {**{f"diffusion_model.{name}": tensor for name, tensor in plain.items()}, **values}
    lorad = LoRaD.load(comfy.base / "models/lorad/one.safetensors")
    off = size = bound = 0.0
    for name, exact in merged_tensors(Weights.of(state), [(lorad, 1.0)]):
        codes, scale = quantise(exact, (exact.abs().max() / 448.0).reshape(()), torch.float8_e4m3fn)
        off += float((found[name].float() - exact).square().sum())
        bound += float((dequantise(codes, scale) - exact).square().sum())
        size += float(exact.square().sum())
    assert (off / size) ** 0.5 < 0.05 and off < 4 * bound


def test_model_save_equals_merge(comfy: ComfyServer, network: torch.nn.Module, tmp_path: Path) -> None:
    graph = Graph()
    model = turn(graph, load(graph), "one.safetensors")
    graph("ModelSave", model=model[0], filename_prefix="saved/turned")
    comfy.run(graph.prompt)
    saved = load_file(next((comfy.base / "output/saved").glob("turned*.safetensors")))
    models = comfy.base / "models"
    merge(models / "diffusion_models" / BASE, [(models / "lorad/one.safetensors", 1.0)], tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    saved = {name.removeprefix("model.diffusion_model."): t for name, t in saved.items() if "diffusion_model." in name}
    assert saved.keys() == merged.keys()
    for name, tensor in merged.items():
        assert torch.allclose(saved[name].float(), tensor, rtol=0, atol=1e-7), name
