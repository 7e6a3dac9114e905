"""Stable Diffusion 1.5 at its full size, with random weights, in a real ComfyUI: 10 GB of memory, 5 GB on the disk."""

from __future__ import annotations

from pathlib import Path

import comfy_networks
import pytest
import torch
from comfy_graph import Graph, Node
from comfy_server import ComfyError, ComfyServer
from networks import random_lorad
from safetensors.torch import load_file, save_file

from wadi_core import LoRaD, OneStep
from wadi_core.lorad import Metadata
from wadi_core.pipeline import noise

pytestmark = pytest.mark.full

SEED = 99
SIZE = 64
LAYERS = 182


@pytest.fixture(scope="module")
def expected(comfy_base: Path) -> torch.Tensor:
    """The latent that the core makes; the files for ComfyUI to make it of are written on the way.

    A checkpoint in half precision, an adapter in three guises, and the released form: merged, in diffusers' names. The
    network is gone again when the server needs its memory.
    """
    network = comfy_networks.unet(comfy_networks.SD15).half()
    models = comfy_base / "models"
    comfy_networks.checkpoint(models / "checkpoints/full.safetensors", network, comfy_networks.SD15)
    network.float()
    lorad = random_lorad(network, rank=8, spread=0.1)
    lorad.save(models / "lorad/full.safetensors", torch.float32)
    lorad.save(models / "loras/full.safetensors", torch.float32)
    LoRaD(lorad.factors, Metadata("sd21", 0.0047, 999)).save(models / "lorad/other.safetensors")
    torch.manual_seed(4)
    told = torch.randn(1, 77, 768)
    save_file({"conditioning": told}, comfy_base / "input/full.safetensors")
    lorad.fuse_into(network, keep_backup=False)
    z = noise([SEED], SIZE, SIZE)
    with torch.no_grad():
        latent = OneStep().x0(z, network(z, 999, encoder_hidden_states=told).sample)
    save_file(dict(network.half().state_dict()), models / "diffusion_models/released.safetensors")
    return latent / comfy_networks.SD15_VAE_SCALE


def sampled(comfy: ComfyServer, graph: Graph, model: Node) -> tuple[torch.Tensor, dict]:
    positive = graph("Probe_Conditioning", name="full.safetensors")
    sizes = {"width": SIZE, "height": SIZE, "batch_size": 1, "seed": SEED}
    latent = graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], **sizes)
    graph("Probe_DumpLatent", latent=latent[0], name="full-latent.safetensors")
    said = comfy.run(graph.prompt).ui
    return load_file(comfy.base / "output/full-latent.safetensors")["samples"], said


def loaded(graph: Graph, base: Node, name: str) -> Node:
    return graph("WaDi_LoadLoRaD", model=base[0], lorad_name=name, strength=1.0, one_step=True)


def test_all_layers_are_turned_exactly(expected: torch.Tensor, comfy: ComfyServer) -> None:
    graph = Graph()
    model = loaded(graph, graph("CheckpointLoaderSimple", ckpt_name="full.safetensors"), "full.safetensors")
    found, said = sampled(comfy, graph, model)
    assert said[model.id]["text"][0].startswith(f"{LAYERS} of {LAYERS} layers, rank 8, sd15")
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_stock_lora_loader_finds_all_layers(expected: torch.Tensor, comfy: ComfyServer) -> None:
    graph = Graph()
    base = graph("CheckpointLoaderSimple", ckpt_name="full.safetensors")
    added = graph("LoraLoaderModelOnly", model=base[0], lora_name="full.safetensors", strength_model=1.0)
    model = graph("WaDi_OneStepModel", model=added[0], alpha_T_squared=0.0047, timestep=999)
    found, _ = sampled(comfy, graph, model)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_released_network_in_diffusers_layout(expected: torch.Tensor, comfy: ComfyServer) -> None:
    """A complete network, its weights rounded to half precision after they were turned."""
    graph = Graph()
    base = graph("UNETLoader", unet_name="released.safetensors", weight_dtype="default")
    model = graph("WaDi_OneStepModel", model=base[0], alpha_T_squared=0.0047, timestep=999)
    found, _ = sampled(comfy, graph, model)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_an_adapter_for_another_network_is_refused_by_name(expected: torch.Tensor, comfy: ComfyServer) -> None:
    graph = Graph()
    model = loaded(graph, graph("CheckpointLoaderSimple", ckpt_name="full.safetensors"), "other.safetensors")
    with pytest.raises(ComfyError, match="it is made for sd21, this is sd15"):
        sampled(comfy, graph, model)
