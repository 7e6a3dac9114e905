"""A slice of Stable Diffusion 1.5 in a ComfyUI server and in the core, and graphs that sample it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy_networks
import control_networks
import torch
from comfy_graph import Graph, Node
from comfy_server import ComfyServer
from networks import random_lorad
from safetensors.torch import load_file, save_file

from wadi_core import OneStep

SEED = 1234
SIZE = 64
TOLERANCE = 1e-4


def prepare(base: Path) -> torch.nn.Module:
    """Write the slice, an adapter for it and a prompt into a server's folders; returns the slice."""
    made = comfy_networks.unet(comfy_networks.SLICE)
    comfy_networks.diffusion_model(base / "models/diffusion_models/slice.safetensors", made, comfy_networks.SLICE)
    random_lorad(made).save(base / "models/lorad/slice.safetensors", torch.float32)
    torch.manual_seed(4)
    save_file({"conditioning": torch.randn(1, 77, 768)}, base / "input/prompt.safetensors")
    return made


def controlnet_state(made: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A ControlNet of the slice in the names of its authors, as most files have them."""
    names = {name: control_networks.ldm_name(name, comfy_networks.SLICE) for name in made.state_dict()}
    return {names[name]: tensor.contiguous() for name, tensor in made.state_dict().items()}


def conditioning(base: Path) -> torch.Tensor:
    return load_file(base / "input/prompt.safetensors")["conditioning"]


@torch.no_grad()
def one_step(network: torch.nn.Module, z: torch.Tensor, told: torch.Tensor, schedule: OneStep) -> torch.Tensor:
    prediction = network(z, schedule.timestep, encoder_hidden_states=told.expand(len(z), -1, -1)).sample
    return schedule.x0(z, prediction)


def with_lorad(graph: Graph, **more: Any) -> tuple[Node, Node]:
    """The slice with its adapter and its calls counted, and the prompt."""
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    settings = {"lorad_name": "slice.safetensors", "strength": 1.0, "one_step": True, **more}
    turned = graph("WaDi_LoadLoRaD", model=base[0], **settings)
    counted = graph("Probe_Count", model=turned[0], name="calls.json")
    return counted, graph("Probe_Conditioning", name="prompt.safetensors")


def latent_of(comfy: ComfyServer, graph: Graph, latent: list[Any]) -> torch.Tensor:
    graph("Probe_DumpLatent", latent=latent, name="latent.safetensors")
    comfy.run(graph.prompt)
    return load_file(comfy.base / "output/latent.safetensors")["samples"]


def calls(comfy: ComfyServer) -> list[dict[str, Any]]:
    return json.loads((comfy.base / "output/calls.json").read_text())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def mini_model(graph: Graph, strength: float = 1.0) -> tuple[Node, Node]:
    base = graph("WaDi_EmbeddedModel")
    turned = graph("WaDi_ApplyLoRaD", model=base[0], lorad=base[3], strength=strength, one_step=True)
    counted = graph("Probe_Count", model=turned[0], name="calls.json")
    return base, counted


def sampled(graph: Graph, model: Node, positive: Any, **more: Any) -> Node:
    settings = {"width": 0, "height": 0, "batch_size": 1, "seed": SEED, **more}
    return graph("WaDi_OneStepSampler", model=model[0], positive=positive, **settings)


def codes(comfy: ComfyServer, graph: Graph, node: Node, latent: Any = None) -> list[str]:
    """The notices of a node; each is among its lines too."""
    graph("Probe_DumpLatent", latent=latent or node[0], name="latent.safetensors")
    said = comfy.run(graph.prompt).ui.get(node.id, {})
    notices = said.get("wadi_notices", [])
    assert all(one["text"] in said["text"] for one in notices)
    return [one["code"] for one in notices]
