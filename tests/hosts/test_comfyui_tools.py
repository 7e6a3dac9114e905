"""The toolbox nodes in a real ComfyUI, and what users see when something is wrong: one sentence, and a server that goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy_networks
import pytest
import torch
from comfy_graph import Graph, Node
from comfy_server import ComfyError, ComfyServer
from networks import random_lorad
from safetensors.torch import load_file, save_file

from wadi_core import LoRaD
from wadi_core.lorad import Metadata
from wadi_core.lorad.analysis import analyze
from wadi_core.lorad.checkpoint import read_header
from wadi_core.lorad.weights import Weights

BASE = "tools.safetensors"
RANK = 4


@pytest.fixture(scope="module")
def network(comfy_base: Path) -> torch.nn.Module:
    """A slice of Stable Diffusion 1.5 with an adapter."""
    made = comfy_networks.unet(comfy_networks.SLICE, seed=31)
    comfy_networks.diffusion_model(comfy_base / "models/diffusion_models" / BASE, made, comfy_networks.SLICE)
    random_lorad(made, RANK, seed=32).save(comfy_base / "models/lorad/tools.safetensors", torch.float32)
    return made


def load(graph: Graph, name: str = BASE) -> Node:
    return graph("UNETLoader", unet_name=name, weight_dtype="default")


def turned(graph: Graph, model: Node, name: str = "tools.safetensors", **more: Any) -> Node:
    return graph("WaDi_LoadLoRaD", model=model[0], **{"lorad_name": name, "strength": 1.0, "one_step": True, **more})


def extracted(graph: Graph, base: Node, student: Node, **more: Any) -> Node:
    settings = {"rank_from": "automatic", "rank": 256, "energy": 0.99, **more}
    return graph("WaDi_ExtractLoRaD", base=base[0], student=student[0], **settings)


# The toolbox


def test_extract_and_save_give_the_adapter_back(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    base = load(graph)
    student = turned(graph, base)
    found = extracted(graph, base, student)
    picture = graph("EmptyImage", width=640, height=320, batch_size=1, color=0xFF8000)
    saved = graph("WaDi_SaveLoRaD", lorad=found[0], filename="found/again", dtype="float32", thumbnail=picture[0])
    result = comfy.run(graph.prompt)
    assert any(event["type"] == "progress" and event["data"]["node"] == found.id for event in result.events)
    report = result.ui[found.id]["text"][0]
    assert f"{len(random_lorad(network).factors)} of rank {RANK}" in report and "no rotation" not in report
    path = comfy.base / "models/lorad/found/again.safetensors"
    assert result.ui[saved.id]["text"][0].startswith(str(Path("found/again.safetensors")))
    again, original = LoRaD.load(path), LoRaD.load(comfy.base / "models/lorad/tools.safetensors")
    assert again.one_step == original.one_step and again.metadata.thumbnail.startswith("data:image/jpeg;base64,")
    for key, (a, b) in original.factors.items():
        theta, other = a @ b, again.factors[key][0] @ again.factors[key][1]
        assert float((theta - other).norm() / theta.norm()) < 1e-4
    # It is offered at once, and its picture is where the front end looks for it.
    spec = comfy.get("/object_info/WaDi_LoadLoRaD")["WaDi_LoadLoRaD"]["input"]["required"]["lorad_name"]
    options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
    assert str(Path("found/again.safetensors")) in options
    said = comfy.get("/view_metadata/lorad?filename=found/again.safetensors")
    assert said["modelspec.thumbnail"] == again.metadata.thumbnail and said["wadi.architecture"] == "unet-custom"
    # A second time nothing is overwritten.
    graph.prompt[saved.id]["inputs"]["dtype"] = "float16"
    before = path.read_bytes()
    comfy.run(graph.prompt)
    assert path.read_bytes() == before and path.with_name("again-2.safetensors").is_file()


def test_extract_follows_rank_and_energy(comfy: ComfyServer, network: torch.nn.Module) -> None:
    for settings, words in (({"rank_from": "rank", "rank": 2}, "of rank 2"), ({"rank_from": "energy", "energy": 0.5}, "rank")):
        graph = Graph()
        base = load(graph)
        found = extracted(graph, base, turned(graph, base), **settings)
        inspected = graph("WaDi_Inspect", lorad=found[0])
        assert words in comfy.run(graph.prompt).ui[inspected.id]["text"][0]


def test_convert_writes_a_lora_that_the_stock_loader_takes(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    base = load(graph)
    opened = graph("WaDi_OpenLoRaD", lorad_name="tools.safetensors")
    full = 320  # the smaller side of every layer: nothing but rounding to half precision is lost
    settings = {"strength": 0.1, "rank": full, "filename": "converted"}
    converted = graph("WaDi_ConvertToLoRA", model=base[0], lorad=opened[0], **settings)
    report = comfy.run(graph.prompt).ui[converted.id]["text"][0]
    assert f"rank {full}" in report and "% of the change is missing" in report and report.endswith("converted.safetensors")
    graph = Graph()
    base = load(graph)
    added = graph("LoraLoaderModelOnly", model=base[0], lora_name="converted.safetensors", strength_model=1.0)
    compared = graph("WaDi_AnalyzeDirections", base=turned(graph, base, strength=0.1)[0], student=added[0])
    direct = graph("WaDi_AnalyzeDirections", base=base[0], student=added[0])
    said = comfy.run(graph.prompt).ui
    off, moved = (float(said[node.id]["text"][0].splitlines()[2].split()[1]) for node in (compared, direct))
    assert moved > 0.1 and off < 0.01 * moved


def test_inspect_tells_what_is_in_it_and_whether_it_fits(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    opened = graph("WaDi_OpenLoRaD", lorad_name="tools.safetensors")
    inspected = graph("WaDi_Inspect", lorad=opened[0], model=load(graph)[0])
    report = comfy.run(graph.prompt).ui[inspected.id]["text"][0]
    count = len(random_lorad(network).factors)
    for words in (
        "made for     unet-custom",
        f"{count}: {count} of rank {RANK}",
        "alpha_T^2 0.0047",
        f"{count} of {count} layers",
    ):
        assert words in report


def test_analyze_equals_the_core(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    base = load(graph)
    analyzed = graph("WaDi_AnalyzeDirections", base=base[0], student=turned(graph, base)[0])
    graph("Probe_DumpImage", image=analyzed[0], name="plot.safetensors")
    rows = comfy.run(graph.prompt).ui[analyzed.id]["text"][0].splitlines()
    plain = Weights.of({k: t.clone() for k, t in network.state_dict().items()})
    fused = random_lorad(network, RANK, seed=32).fuse_into(network)
    core = analyze(plain, Weights.of(network.state_dict()))
    fused.restore()
    assert float(rows[2].split()[1]) == pytest.approx(core.direction.mean, rel=1e-2)
    assert float(rows[1].split()[1]) < 1e-3  # a rotation keeps the norms
    image = load_file(comfy.base / "output/plot.safetensors")["image"]
    assert image.ndim == 4 and image.shape[3] == 3 and image.shape[2] > 1000 and 0.5 < float(image.mean()) < 1


def test_weights_in_float8_are_looked_at_as_their_values(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    half = graph("UNETLoader", unet_name=BASE, weight_dtype="fp8_e4m3fn")
    analyzed = graph("WaDi_AnalyzeDirections", base=load(graph)[0], student=half[0])
    rows = comfy.run(graph.prompt).ui[analyzed.id]["text"][0].splitlines()
    assert 1 < float(rows[2].split()[1]) < 5  # per cent: the rounding of float8


# What goes wrong


def wrong_kind(base: Path, network: torch.nn.Module) -> str:
    save_file(comfy_networks.random_lora(network), base / "models/lorad/a-lora.safetensors")
    return "a-lora.safetensors"


def wrong_architecture(base: Path, network: torch.nn.Module) -> str:
    lorad = random_lorad(network)
    LoRaD(lorad.factors, Metadata("sd21", 0.0047, 999)).save(base / "models/lorad/for-sd21.safetensors")
    return "for-sd21.safetensors"


def wrong_width(base: Path, network: torch.nn.Module) -> str:
    other = comfy_networks.unet({**comfy_networks.SLICE, "block_out_channels": (32, 32)})
    random_lorad(other).save(base / "models/lorad/narrow.safetensors")
    return "narrow.safetensors"


def cut_short(base: Path, network: torch.nn.Module) -> str:
    content = (base / "models/lorad/tools.safetensors").read_bytes()
    (base / "models/lorad/cut.safetensors").write_bytes(content[: len(content) // 2])
    return "cut.safetensors"


def changed_bits(base: Path, network: torch.nn.Module) -> str:
    content = bytearray((base / "models/lorad/tools.safetensors").read_bytes())
    content[-100] ^= 1
    (base / "models/lorad/changed.safetensors").write_bytes(content)
    return "changed.safetensors"


def complete_network(base: Path, network: torch.nn.Module) -> str:
    save_file(load_file(base / "models/diffusion_models" / BASE), base / "models/lorad/network.safetensors")
    return "network.safetensors"


def not_there(base: Path, network: torch.nn.Module) -> str:
    return "not-there.safetensors"


def outside(base: Path, network: torch.nn.Module) -> str:
    return "../../output/secret.safetensors"


MISTAKES = {
    wrong_kind: "an ordinary LoRA, not a LoRaD",
    wrong_architecture: "made for sd21",
    wrong_width: "does not fit this network",
    cut_short: "cut short",
    changed_bits: "damaged",
    complete_network: "a complete network, not an adapter",
    not_there: "no such file",
    outside: "no such file",
}


@pytest.mark.parametrize("mistake", list(MISTAKES), ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_one_sentence(
    comfy: ComfyServer, network: torch.nn.Module, mistake: Callable[[Path, torch.nn.Module], str]
) -> None:
    name = mistake(comfy.base, network)
    graph = Graph()
    loaded = turned(graph, load(graph), name)
    graph("Probe_DumpWeights", model=loaded[0], name="weights-in-use.safetensors")
    with pytest.raises(ComfyError) as failed:
        comfy.run(graph.prompt)
    said = str(failed.value)
    assert MISTAKES[mistake] in said and "\n" not in said and failed.value.node == loaded.id
    works(comfy)


def works(comfy: ComfyServer) -> None:
    """Fails if the server does not go on as if nothing had been."""
    graph = Graph()
    graph("Probe_DumpWeights", model=turned(graph, load(graph))[0], name="weights-in-use.safetensors")
    comfy.run(graph.prompt)


def test_lorads_of_different_schedules_are_refused_together(comfy: ComfyServer, network: torch.nn.Module) -> None:
    lorad = random_lorad(network, seed=40)
    other = LoRaD(lorad.factors, Metadata(lorad.metadata.architecture, 0.006, 999))
    other.save(comfy.base / "models/lorad/other-schedule.safetensors")
    graph = Graph()
    stacked = turned(graph, turned(graph, load(graph)), "other-schedule.safetensors")
    graph("Probe_DumpWeights", model=stacked[0], name="weights-in-use.safetensors")
    with pytest.raises(ComfyError, match="cannot be used together"):
        comfy.run(graph.prompt)


def test_a_one_step_network_takes_no_one_step_lorad(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    already = graph("WaDi_OneStepModel", model=load(graph)[0], alpha_T_squared=0.0047, timestep=999)
    graph("Probe_DumpWeights", model=turned(graph, already)[0], name="weights-in-use.safetensors")
    with pytest.raises(ComfyError, match="needs the multi-step base"):
        comfy.run(graph.prompt)


def test_a_stock_loader_refuses_what_does_not_fit(comfy: ComfyServer, network: torch.nn.Module) -> None:
    """Through Load LoRA the shapes are seen only when the weights are turned; the model is whole afterwards."""
    narrow = comfy.base / "models/lorad" / wrong_width(comfy.base, network)
    narrow.replace(comfy.base / "models/loras/narrow.safetensors")
    graph = Graph()
    model = graph("LoraLoaderModelOnly", model=load(graph)[0], lora_name="narrow.safetensors", strength_model=1.0)
    graph("Probe_DumpWeights", model=model[0], name="weights-in-use.safetensors")
    with pytest.raises(ComfyError, match="made for another network"):
        comfy.run(graph.prompt)
    graph = Graph()
    graph("Probe_DumpWeights", model=load(graph)[0], name="weights-in-use.safetensors")
    comfy.run(graph.prompt)
    found = load_file(comfy.base / "output/weights-in-use.safetensors")
    for name, tensor in load_file(comfy.base / "models/diffusion_models" / BASE).items():
        assert torch.equal(found[f"diffusion_model.{name}"], tensor)


def test_a_network_of_another_kind_is_named(comfy: ComfyServer, network: torch.nn.Module) -> None:
    state = {k: t for k, t in comfy_networks.pixart().state_dict().items() if k != "pos_embed.pos_embed"}
    save_file(state, comfy.base / "models/diffusion_models/other-kind.safetensors")
    graph = Graph()
    loaded = turned(graph, load(graph, "other-kind.safetensors"))
    graph("Probe_DumpWeights", model=loaded[0], name="weights-in-use.safetensors")
    with pytest.raises(ComfyError, match="made for unet-custom, this is pixart-alpha"):
        comfy.run(graph.prompt)


def test_sampling_without_noise_is_refused(comfy: ComfyServer, network: torch.nn.Module) -> None:
    save_file({"conditioning": torch.zeros(1, 77, 768)}, comfy.base / "input/tools-prompt.safetensors")
    graph = Graph()
    model = turned(graph, load(graph))
    positive = graph("Probe_Conditioning", name="tools-prompt.safetensors")
    start = graph("EmptyLatentImage", width=64, height=64, batch_size=1)
    settings = {"add_noise": "disable", "noise_seed": 1, "steps": 1, "cfg": 1.0, "start_at_step": 0, "end_at_step": 100}
    names = {"sampler_name": "wadi_one_step", "scheduler": "normal", "return_with_leftover_noise": "disable"}
    links = {"model": model[0], "positive": positive[0], "negative": positive[0], "latent_image": start[0]}
    sampled = graph("KSamplerAdvanced", **settings, **names, **links)
    graph("Probe_DumpLatent", latent=sampled[0], name="latent.safetensors")
    with pytest.raises(ComfyError, match="switch add_noise on"):
        comfy.run(graph.prompt)


@pytest.mark.parametrize("filename", ["../evil", "a/../../evil", "/evil", "C:\\evil", "", "..\\evil"])
@pytest.mark.parametrize("node", ["WaDi_SaveLoRaD", "WaDi_ConvertToLoRA"])
def test_files_stay_in_their_folders(comfy: ComfyServer, network: torch.nn.Module, node: str, filename: str) -> None:
    before = {path for path in comfy.base.rglob("*") if "evil" in path.name}
    graph = Graph()
    opened = graph("WaDi_OpenLoRaD", lorad_name="tools.safetensors")
    if node == "WaDi_SaveLoRaD":
        graph(node, lorad=opened[0], filename=filename, dtype="float16")
    else:
        graph(node, model=load(graph)[0], lorad=opened[0], strength=1.0, rank=1, filename=filename)
    with pytest.raises(ComfyError, match="is no name for a file"):
        comfy.run(graph.prompt)
    assert {path for path in comfy.base.rglob("*") if "evil" in path.name} == before


def test_extraction_can_be_interrupted(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    base = load(graph)
    found = extracted(graph, base, turned(graph, base, strength=0.9))
    graph("WaDi_SaveLoRaD", lorad=found[0], filename="never", dtype="float16")
    with pytest.raises(ComfyError, match="interrupted") as stopped:
        comfy.run(graph.prompt, interrupt_at=found.id)
    assert stopped.value.node == found.id
    assert not (comfy.base / "models/lorad/never.safetensors").exists()
    works(comfy)


def test_same_networks_have_nothing_to_extract(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    base = load(graph)
    graph("WaDi_Inspect", lorad=extracted(graph, base, base)[0])
    with pytest.raises(ComfyError, match="nothing to extract"):
        comfy.run(graph.prompt)


def test_converting_needs_the_bare_base(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    opened = graph("WaDi_OpenLoRaD", lorad_name="tools.safetensors")
    model = turned(graph, load(graph))
    graph("WaDi_ConvertToLoRA", model=model[0], lorad=opened[0], strength=1.0, rank=4, filename="never")
    with pytest.raises(ComfyError, match="connect the base"):
        comfy.run(graph.prompt)


def test_missing_weights_of_the_embedded_model_are_told(comfy: ComfyServer) -> None:
    weights = comfy.base / "custom_nodes/wadi/wadi_core/mini/unet/diffusion_pytorch_model.safetensors"
    away = weights.rename(weights.with_suffix(".away"))
    try:
        graph = Graph()
        graph("Probe_DumpWeights", model=graph("WaDi_EmbeddedModel")[0], name="weights-in-use.safetensors")
        with pytest.raises(ComfyError, match="this file of wadi-mini is missing"):
            comfy.restarted()
            comfy.run(graph.prompt)
    finally:
        away.rename(weights)
    assert read_header(weights).places
    works(comfy)
