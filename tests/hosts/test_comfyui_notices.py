"""What the pack's nodes tell besides their results in a real ComfyUI: notices, counts, files; and ComfyUI's own training."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import comfy_slice
import pytest
import torch
from comfy_graph import Graph, Node
from comfy_server import ComfyError, ComfyServer
from comfy_slice import SIZE, codes, mini_model, sampled, with_lorad
from networks import random_lorad
from safetensors.torch import load_file, save_file

from wadi_core import LoRaD


@pytest.fixture(scope="module")
def network(comfy_base: Path) -> torch.nn.Module:
    """The slice of a network that the server has too."""
    return comfy_slice.prepare(comfy_base)


# What would go wrong without a word


@pytest.mark.parametrize(
    ("size", "enlarged", "expected"),
    [
        ((0, 0), False, []),
        ((128, 128), False, []),
        ((512, 512), False, ["warn_size_large"]),
        ((128, 192), False, ["warn_size_large"]),
        ((64, 64), False, ["warn_size"]),
        ((256, 256), True, []),
    ],
)
def test_sizes_that_fall_apart_are_told(comfy: ComfyServer, size: tuple[int, int], enlarged: bool, expected: list[str]) -> None:
    graph = Graph()
    base, model = mini_model(graph)
    if enlarged:
        model = graph("WaDi_HighResolution", model=model[0], method="shrink", native_size=0)
    told = graph("CLIPTextEncode", clip=base[1], text="a red apple")
    made = sampled(graph, model, told[0], width=size[0], height=size[1])
    assert codes(comfy, graph, made) == expected
    shape = load_file(comfy.base / "output/latent.safetensors")["samples"].shape
    assert shape[-1] == (size[0] or 128) // 8


@pytest.mark.parametrize(
    ("strengths", "same", "expected"),
    [
        ((1.0, 1.0), True, ["warn_same_lorad"]),
        ((1.0, 1.0), False, ["warn_second_one_step"]),
        ((0.5, 0.5), False, []),
    ],
)
def test_one_step_files_that_add_up_to_too_much_are_told(
    comfy: ComfyServer, network: torch.nn.Module, strengths: tuple[float, float], same: bool, expected: list[str]
) -> None:
    other = random_lorad(network, seed=9)
    other.save(comfy.base / "models/lorad/other.safetensors", torch.float32)
    copied = comfy.base / "models/lorad/copied.safetensors"
    copied.write_bytes((comfy.base / "models/lorad/slice.safetensors").read_bytes())
    graph = Graph()
    model = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    for name, strength in zip(("slice", "copied" if same else "other"), strengths, strict=True):
        settings = {"lorad_name": f"{name}.safetensors", "strength": strength, "one_step": True}
        model = graph("WaDi_LoadLoRaD", model=model[0], **settings)
    positive = graph("Probe_Conditioning", name="prompt.safetensors")
    made = sampled(graph, model, positive[0], width=SIZE, height=SIZE)
    assert codes(comfy, graph, model, made[0]) == expected


def test_the_stock_loader_brings_one_step_weights_too(comfy: ComfyServer, network: torch.nn.Module) -> None:
    random_lorad(network).save(comfy.base / "models/loras/student.safetensors", torch.float32)
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    model = graph("LoraLoaderModelOnly", model=base[0], lora_name="student.safetensors", strength_model=1.0)
    positive = graph("Probe_Conditioning", name="prompt.safetensors")
    found = codes(comfy, graph, sampled(graph, model, positive[0], width=512, height=512))
    assert found == ["note_schedule"]


def test_the_network_is_counted_and_not_the_file(comfy: ComfyServer, network: torch.nn.Module) -> None:
    whole = random_lorad(network)
    fewer = LoRaD(dict(list(whole.factors.items())[:-4]), whole.metadata)
    fewer.save(comfy.base / "models/lorad/fewer.safetensors")
    graph = Graph()
    model, _ = with_lorad(graph, lorad_name="fewer.safetensors")
    graph("Probe_DumpWeights", model=model[0], name="weights.safetensors")
    said = comfy.run(graph.prompt).ui["2"]
    count = len(whole.factors)
    assert said["text"][0].startswith(f"{count - 4} of {count} layers")
    assert (said["wadi"][0]["layers"], said["wadi"][0]["of"]) == (count - 4, count)


# Files


def test_a_damaged_file_is_told_by_its_name_alone(comfy: ComfyServer, network: torch.nn.Module) -> None:
    folder = comfy.base / "models/lorad"
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep/broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 no header")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, folder / "plain.safetensors")
    for name in ("deep/broken.safetensors", "plain.safetensors"):
        graph = Graph()
        model, _ = with_lorad(graph, lorad_name=name)
        graph("Probe_DumpWeights", model=model[0], name="weights.safetensors")
        with pytest.raises(ComfyError, match=name) as failed:
            comfy.run(graph.prompt)
        assert str(comfy.base) not in str(failed.value)


def test_metadata_are_those_of_the_file_as_it_is(comfy: ComfyServer, network: torch.nn.Module) -> None:
    address = comfy.url("/wadi/lorad?name=changing.safetensors")
    path = comfy.base / "models/lorad/changing.safetensors"

    def ask(**headers: str) -> tuple[int, dict[str, str], bytes]:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as failed:
            return failed.code, dict(failed.headers), failed.read()

    assert ask()[0] == 404
    random_lorad(network, rank=4).save(path)
    status, headers, content = ask()
    assert status == 200 and b'"ss_network_dim": "4"' in content and str(comfy.base).encode() not in content
    assert ask(**{"If-None-Match": headers["ETag"]})[0] == 304
    random_lorad(network, rank=2).save(path)
    status, _, content = ask(**{"If-None-Match": headers["ETag"]})
    assert status == 200 and b'"ss_network_dim": "2"' in content
    address = comfy.url("/wadi/lorad?name=../../input/prompt.safetensors")
    assert ask()[0] == 404
    path.write_bytes(b"no header")
    address = comfy.url("/wadi/lorad?name=changing.safetensors")
    status, _, content = ask()
    assert status == 422 and str(comfy.base).encode() not in content


# Training by ComfyUI's own node


def stock(comfy: ComfyServer, graph: Graph, node: str, **settings: Any) -> Node:
    """A node of ComfyUI's own that has more inputs in newer versions: these keep their defaults."""
    declared = comfy.get(f"/object_info/{node}")[node]["input"]["required"]
    defaults = {name: spec[1]["default"] for name, spec in declared.items() if len(spec) > 1 and "default" in spec[1]}
    return graph(node, **(defaults | settings))


def trained(comfy: ComfyServer, graph: Graph, base: Node, **more: Any) -> tuple[Any, Any]:
    """Train LoRA with this pack's algorithm; its LoRA and its number of steps."""
    told = graph("Probe_Conditioning", name="prompt.safetensors")
    latent = sampled(graph, base, told[0], width=SIZE, height=SIZE)
    settings = {"steps": 3, "learning_rate": 0.01, "rank": 2, "seed": 1, "training_dtype": "fp32", "lora_dtype": "fp32"}
    settings |= {"algorithm": "LoRaD", "gradient_checkpointing": False, "existing_lora": "[None]", **more}
    node = stock(comfy, graph, "TrainLoraNode", model=base[0], latents=latent[0], positive=told[0], **settings)
    first = comfy.get("/object_info/TrainLoraNode")["TrainLoraNode"]["output"].index("LORA_MODEL")
    return node[first], node[first + 2]


def test_comfyuis_own_training_trains_angles(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    graph("Probe_DumpWeights", model=base[0], name="base.safetensors")
    lora, steps = trained(comfy, graph, base)
    turned = stock(comfy, graph, "LoraModelLoader", model=base[0], lora=lora, strength_model=1.0)
    graph("Probe_DumpWeights", model=turned[0], name="turned.safetensors")
    saver = "SaveLoRA" if "SaveLoRA" in comfy.get("/object_info") else "SaveLoRANode"  # as older versions call it
    graph(saver, lora=lora, prefix="loras/angles", steps=steps)
    comfy.run(graph.prompt)
    before, after = (load_file(comfy.base / f"output/{name}.safetensors") for name in ("base", "turned"))
    pairs = [key for key, weight in before.items() if weight.ndim == 2]
    changed = [key for key in pairs if float((after[key] - before[key]).norm() / before[key].norm()) > 1e-3]
    assert len(changed) > 0.8 * len(pairs)
    for key, weight in before.items():
        if weight.ndim == 2:  # turned, and no longer or shorter than before
            norms = (one.unflatten(1, (-1, 2)).norm(dim=2) for one in (weight, after[key]))
            assert torch.allclose(*norms, rtol=1e-4, atol=1e-6)
        elif weight.ndim == 4:
            assert torch.equal(weight, after[key])

    saved = next((comfy.base / "output/loras").glob("angles_3_steps_*.safetensors"))
    file = saved.replace(comfy.base / "models/loras" / saved.name)
    assert {name.rpartition(".")[2] for name in load_file(file)} == {"lorad_a", "lorad_b", "diff", "diff_b"}
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    loaded = graph("LoraLoaderModelOnly", model=base[0], lora_name=file.name, strength_model=1.0)
    graph("Probe_DumpWeights", model=loaded[0], name="loaded.safetensors")
    more, _ = trained(comfy, graph, base, existing_lora=file.name)
    further = stock(comfy, graph, "LoraModelLoader", model=base[0], lora=more, strength_model=1.0)
    graph("Probe_DumpWeights", model=further[0], name="further.safetensors")
    comfy.run(graph.prompt)
    loaded, further = (load_file(comfy.base / f"output/{name}.safetensors") for name in ("loaded", "further"))
    assert all(torch.equal(loaded[key], after[key]) for key in after)
    assert any(float((further[key] - after[key]).norm()) > 1e-4 for key in changed)


def test_a_file_of_comfyuis_own_training_is_for_its_own_loader(comfy: ComfyServer, network: torch.nn.Module) -> None:
    layers = {f"diffusion_model.{name}": torch.zeros(2, 2) for name in ("x.lorad_a", "x.lorad_b", "x.diff_b")}
    save_file(layers, comfy.base / "models/loras/trained.safetensors")
    graph = Graph()
    model, _ = with_lorad(graph, lorad_name="trained.safetensors")
    graph("Probe_DumpWeights", model=model[0], name="weights.safetensors")
    with pytest.raises(ComfyError, match="use ComfyUI's Load LoRA for it"):
        comfy.run(graph.prompt)
