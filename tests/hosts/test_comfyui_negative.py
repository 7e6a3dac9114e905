"""Negative prompts in a real ComfyUI server: one call of the network, and what the core draws."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import comfy_networks
import comfy_slice
import numpy as np
import pytest
import torch
from comfy_graph import Graph, Node
from comfy_server import ComfyError, ComfyServer
from comfy_slice import SEED, SIZE, TOLERANCE, calls, conditioning, error, latent_of, with_lorad
from safetensors.torch import load_file, save_file

from wadi_core import LoRaD, OneStepPipeline, guidance, mini
from wadi_core.negative import DEFAULT, PRESETS, preset
from wadi_core.pipeline import noise

TEXTS = {"one": 77, "other": 154}  # tokens of the negative texts


@pytest.fixture(scope="module")
def network(comfy_base: Path) -> torch.nn.Module:
    """The slice with its adapter on, as the core uses it, and negative texts that the server has too."""
    made = comfy_slice.prepare(comfy_base)
    shutil.copy(comfy_base / "models/lorad/slice.safetensors", comfy_base / "models/loras/slice-as-lora.safetensors")
    LoRaD.load(comfy_base / "models/lorad/slice.safetensors").apply_to(made)
    for seed, (name, tokens) in enumerate(TEXTS.items(), 20):
        told = torch.randn(1, tokens, 768, generator=torch.Generator().manual_seed(seed))
        save_file({"conditioning": told}, comfy_base / f"input/{name}.safetensors")
    return made


def text(comfy: ComfyServer, name: str) -> torch.Tensor:
    return load_file(comfy.base / f"input/{name}.safetensors")["conditioning"]


def negative(graph: Graph, model: Node, told: Node, method: str = DEFAULT, scale: float | None = None) -> Node:
    scale = preset(method).scale if scale is None else scale
    return graph("WaDi_NegativePrompt", model=model[0], negative=told[0], scale=scale, method=method)


def sampled(graph: Graph, model: Node, positive: Node, count: int = 1, **more: Any) -> Node:
    sizes = {"width": SIZE, "height": SIZE, "batch_size": count, "seed": SEED}
    return graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], **sizes, **more)


@torch.no_grad()
def in_the_core(
    comfy: ComfyServer,
    network: torch.nn.Module,
    unwanted: torch.Tensor | None,
    method: str,
    count: int = 1,
    scale: float | None = None,
) -> torch.Tensor:
    z = noise(range(SEED, SEED + count), SIZE, SIZE)
    how = preset(method, 0.0 if unwanted is None else scale)
    with guidance.attach(network, torch.zeros(1, 1, 768) if unwanted is None else unwanted, how):
        eps = network(z, 999, encoder_hidden_states=conditioning(comfy.base).expand(count, -1, -1)).sample
    schedule = LoRaD.load(comfy.base / "models/lorad/slice.safetensors").one_step
    return schedule.x0(z, eps) / comfy_networks.SD15_VAE_SCALE


@pytest.mark.parametrize("method", PRESETS)
def test_the_latents_are_the_cores_from_one_call(comfy: ComfyServer, network: torch.nn.Module, method: str) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    told = graph("Probe_Conditioning", name="one.safetensors")
    found = latent_of(comfy, graph, sampled(graph, negative(graph, model, told, method), positive, count=2)[0])
    assert [call["timesteps"] for call in calls(comfy)] == [[999.0, 999.0]]
    expected = in_the_core(comfy, network, text(comfy, "one"), method, count=2)
    assert error(found, expected) < TOLERANCE
    assert error(found, in_the_core(comfy, network, None, method, count=2)) > 5 * TOLERANCE


def test_several_texts_are_attended_to_together(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    told = [graph("Probe_Conditioning", name=f"{name}.safetensors") for name in TEXTS]
    both = graph("ConditioningCombine", conditioning_1=told[0][0], conditioning_2=told[1][0])
    found = latent_of(comfy, graph, sampled(graph, negative(graph, model, both), positive)[0])
    unwanted = torch.cat([text(comfy, name) for name in TEXTS], dim=1)
    assert error(found, in_the_core(comfy, network, unwanted, DEFAULT)) < TOLERANCE


def test_two_nodes_add_up(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    told = [graph("Probe_Conditioning", name=f"{name}.safetensors") for name in TEXTS]
    twice = negative(graph, negative(graph, model, told[0]), told[1], "nasa")
    found = latent_of(comfy, graph, sampled(graph, twice, positive)[0])
    with guidance.attach(network, text(comfy, "one"), preset()):
        expected = in_the_core(comfy, network, text(comfy, "other"), "nasa")
    assert error(found, expected) < TOLERANCE
    assert len(calls(comfy)) == 1


def test_the_samplers_input_is_the_node_and_without_it_nothing_changes(comfy: ComfyServer, network: torch.nn.Module) -> None:
    def drawn(node: bool = False, slot: bool = False, scale: float | None = None) -> torch.Tensor:
        graph = Graph()
        model, positive = with_lorad(graph)
        told = graph("Probe_Conditioning", name="one.safetensors")
        model = negative(graph, model, told, scale=scale) if node else model
        return latent_of(comfy, graph, sampled(graph, model, positive, **({"negative": told[0]} if slot else {}))[0])

    plain = drawn()
    assert error(plain, in_the_core(comfy, network, None, DEFAULT)) < TOLERANCE
    assert torch.equal(drawn(node=True, scale=0.0), plain)
    steered = drawn(node=True)
    assert torch.equal(drawn(slot=True), steered) and not torch.equal(steered, plain)
    assert torch.equal(drawn(), plain)  # nothing is left on the network


def test_with_cfg_only_the_prompts_rows_are_steered(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    one, other = (graph("Probe_Conditioning", name=f"{name}.safetensors") for name in TEXTS)
    steered = negative(graph, model, one)
    empty = graph("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1)
    settings = {"seed": SEED, "steps": 1, "cfg": 2.0, "sampler_name": "wadi_one_step", "scheduler": "simple", "denoise": 1.0}
    links = {"model": steered[0], "positive": positive[0], "negative": other[0], "latent_image": empty[0]}
    found = latent_of(comfy, graph, graph("KSampler", **settings, **links)[0])
    assert sum(len(call["timesteps"]) for call in calls(comfy)) == 2
    wanted = in_the_core(comfy, network, text(comfy, "one"), DEFAULT)
    schedule = LoRaD.load(comfy.base / "models/lorad/slice.safetensors").one_step
    z = noise([SEED], SIZE, SIZE)
    with torch.no_grad():
        plain = (
            schedule.x0(z, network(z, 999, encoder_hidden_states=text(comfy, "other")).sample) / comfy_networks.SD15_VAE_SCALE
        )
    assert error(found, plain + 2.0 * (wanted - plain)) < TOLERANCE


def test_keys_and_values_come_from_the_weights_that_a_hook_sets(comfy: ComfyServer, network: torch.nn.Module) -> None:
    """A LoRaD that is on for one conditioning alone, as ComfyUI's hooks do it: its negative text goes through it too."""
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    exact = graph("WaDi_OneStepModel", model=base[0], alpha_T_squared=0.0047, timestep=999)
    told = graph("Probe_Conditioning", name="one.safetensors")
    steered = negative(graph, exact, told)
    hook = graph("CreateHookLoraModelOnly", lora_name="slice-as-lora.safetensors", strength_model=1.0)
    positive = graph("Probe_Conditioning", name="prompt.safetensors")
    hooked = graph("ConditioningSetProperties", cond_NEW=positive[0], hooks=hook[0], strength=1.0, set_cond_area="default")
    found = latent_of(comfy, graph, sampled(graph, steered, hooked)[0])
    assert error(found, in_the_core(comfy, network, text(comfy, "one"), DEFAULT)) < TOLERANCE


def test_other_networks_are_refused_in_one_sentence(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    told = graph("Probe_Conditioning", name="one.safetensors")
    steered = negative(graph, model, told, scale=99.0)
    graph("Probe_DumpLatent", latent=sampled(graph, steered, positive)[0], name="latent.safetensors")
    with pytest.raises(ComfyError, match="scale"):
        comfy.run(graph.prompt)


def test_the_embedded_model_draws_what_the_core_draws(comfy: ComfyServer) -> None:
    folder = comfy.base / "custom_nodes/wadi/wadi_core/mini"
    pipe = OneStepPipeline.from_pretrained(folder, lorad=folder / mini.LORAD, device="cpu", precision="exact")
    graph = Graph()
    base = graph("WaDi_EmbeddedModel")
    turned = graph("WaDi_ApplyLoRaD", model=base[0], lorad=base[3], strength=1.0, one_step=True)
    told, unwanted = (graph("CLIPTextEncode", clip=base[1], text=words) for words in ("a cat and a bicycle", "a bicycle"))
    counted = graph("Probe_Count", model=negative(graph, turned, unwanted)[0], name="calls.json")
    sizes = {"width": 128, "height": 128, "batch_size": 2, "seed": 7}
    made = graph("WaDi_OneStepSampler", model=counted[0], positive=told[0], **sizes)
    decoded = graph("VAEDecode", samples=made[0], vae=base[2])
    graph("Probe_DumpImage", image=decoded[0], name="negative.safetensors")
    comfy.run(graph.prompt)
    found = load_file(comfy.base / "output/negative.safetensors")["image"].mul(255).round()
    pictures = pipe("a cat and a bicycle", seeds=[7, 8], negative_prompt="a bicycle").images
    expected = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).float()
    assert float((found - expected).abs().max()) <= 2
    assert [len(call["timesteps"]) for call in calls(comfy)] == [2]
