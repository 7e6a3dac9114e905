"""ControlNets and larger pictures in a real ComfyUI server: what the core draws, with ComfyUI's own nodes around ours."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy_networks
import comfy_slice
import control_networks
import numpy as np
import pytest
import torch
from comfy_graph import Graph, Node
from comfy_server import ComfyError, ComfyServer, host_python
from comfy_slice import SEED, SIZE, TOLERANCE, calls, conditioning, error, latent_of, with_lorad
from PIL import Image
from safetensors.torch import load_file, save_file

from wadi_core import LoRaD, OneStepPipeline, highres, mini, preprocess
from wadi_core.control import Steered, Steering
from wadi_core.pipeline import noise

NATIVE = 32  # pixels that the slice is said to know
SCALE = 0.8
METHODS = ("redilate", "shrink")
SIZES = ((64, 64), (72, 104))  # width and height: twice as large, and by no whole number


@pytest.fixture(scope="module")
def network(comfy_base: Path) -> torch.nn.Module:
    """The slice with its adapter on, as the core uses it."""
    made = comfy_slice.prepare(comfy_base)
    LoRaD.load(comfy_base / "models/lorad/slice.safetensors").apply_to(made)
    return made


@pytest.fixture(scope="module")
def control(comfy_base: Path, network: torch.nn.Module) -> torch.nn.Module:
    """A ControlNet for the slice, which the server has too, and control maps of the sizes that are drawn."""
    made = control_networks.random_controlnet(comfy_networks.unet(comfy_networks.SLICE))
    save_file(comfy_slice.controlnet_state(made), comfy_base / "models/controlnet/control.safetensors")
    for width, height in {*SIZES, (SIZE, SIZE)}:
        hint(width, height).save(comfy_base / f"input/hint-{width}x{height}.png")
    return made


def hint(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(10).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def steered(graph: Graph, positive: Node, image: str, net: Node | None = None) -> Node:
    """A prompt with a ControlNet, by ComfyUI's own nodes."""
    loaded = net or graph("ControlNetLoader", control_net_name="control.safetensors")
    picture = graph("LoadImage", image=image)
    settings = {"strength": SCALE, "start_percent": 0.0, "end_percent": 1.0}
    links = {"positive": positive[0], "negative": positive[0], "control_net": loaded[0], "image": picture[0]}
    return graph("ControlNetApplyAdvanced", **links, **settings)


def in_comfyui(comfy: ComfyServer, size: tuple[int, int], method: str | None, with_control: bool) -> torch.Tensor:
    """A latent of the server's; counts that the network was called once."""
    graph = Graph()
    model, positive = with_lorad(graph)
    width, height = size
    if method:
        model = graph("WaDi_HighResolution", model=model[0], method=method, native_size=NATIVE)
    if with_control:
        positive = steered(graph, positive, f"hint-{width}x{height}.png")
    sizes = {"width": width, "height": height, "batch_size": 1, "seed": SEED}
    sampled = graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], **sizes)
    found = latent_of(comfy, graph, sampled[0])
    assert [call["timesteps"] for call in calls(comfy)] == [[999.0]]
    return found


@torch.no_grad()
def in_the_core(
    comfy: ComfyServer, network: torch.nn.Module, size: tuple[int, int], method: str | None, controls: Sequence[torch.nn.Module]
) -> torch.Tensor:
    width, height = size
    maps = torch.from_numpy(np.array(hint(width, height))).permute(2, 0, 1)[None].float() / 255
    steered_unet = Steered(network, [Steering(one, maps, SCALE) for one in controls])
    larger = highres.factors(width, height, (NATIVE, NATIVE)) if method else (1.0, 1.0)
    z = noise([SEED], width, height)
    with highres.attach([network, *controls], larger, method or METHODS[0]):
        eps = steered_unet(z, 999, conditioning(comfy.base)).sample
    schedule = LoRaD.load(comfy.base / "models/lorad/slice.safetensors").one_step
    return schedule.x0(z, eps) / comfy_networks.SD15_VAE_SCALE


def test_controlnet_steers_the_one_step_as_in_the_core(
    comfy: ComfyServer, network: torch.nn.Module, control: torch.nn.Module
) -> None:
    size = (SIZE, SIZE)
    found = in_comfyui(comfy, size, None, with_control=True)
    assert error(found, in_the_core(comfy, network, size, None, [control])) < TOLERANCE
    assert error(found, in_the_core(comfy, network, size, None, [])) > 100 * TOLERANCE


@pytest.mark.parametrize("with_control", [False, True], ids=["alone", "controlled"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_larger_pictures_are_the_cores(
    comfy: ComfyServer,
    network: torch.nn.Module,
    control: torch.nn.Module,
    method: str,
    size: tuple[int, int],
    with_control: bool,
) -> None:
    controls = [control] if with_control else []
    found = in_comfyui(comfy, size, method, with_control)
    assert error(found, in_the_core(comfy, network, size, method, controls)) < TOLERANCE
    assert error(found, in_the_core(comfy, network, size, None, controls)) > 10 * TOLERANCE


def test_at_native_size_and_without_the_node_nothing_is_changed(
    comfy: ComfyServer, network: torch.nn.Module, control: torch.nn.Module
) -> None:
    size = (SIZE, SIZE)
    before = in_comfyui(comfy, size, None, with_control=True)
    in_comfyui(comfy, size, "redilate", with_control=True)
    assert torch.equal(in_comfyui(comfy, size, None, with_control=True), before)
    graph = Graph()
    model, positive = with_lorad(graph)
    model = graph("WaDi_HighResolution", model=model[0], method="shrink", native_size=SIZE)
    sizes = {"width": SIZE, "height": SIZE, "batch_size": 1, "seed": SEED}
    sampled = graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], **sizes)
    assert error(latent_of(comfy, graph, sampled[0]), in_the_core(comfy, network, size, None, [])) < TOLERANCE


def test_embedded_model_and_its_controlnet_draw_what_the_core_draws(comfy: ComfyServer) -> None:
    """At its own size and at twice that, the node knowing how large its pictures are."""
    folder = comfy.base / "custom_nodes/wadi/wadi_core/mini"
    pipe = OneStepPipeline.from_pretrained(folder, lorad=folder / mini.LORAD, control=folder / mini.CONTROL, device="cpu")
    words = "a red apple"
    for side in (128, 256):
        hint(side, side).save(comfy.base / f"input/mini-{side}.png")
        graph = Graph()
        base = graph("WaDi_EmbeddedModel")
        turned = graph("WaDi_ApplyLoRaD", model=base[0], lorad=base[3], strength=1.0, one_step=True)
        larger = graph("WaDi_HighResolution", model=turned[0], method="shrink", native_size=0)
        told = graph("CLIPTextEncode", clip=base[1], text=words)
        told = steered(graph, told, f"mini-{side}.png", graph("WaDi_EmbeddedControlNet"))
        sizes = {"width": side, "height": side, "batch_size": 1, "seed": 7}
        sampled = graph("WaDi_OneStepSampler", model=larger[0], positive=told[0], **sizes)
        decoded = graph("VAEDecode", samples=sampled[0], vae=base[2])
        graph("Probe_DumpImage", image=decoded[0], name="steered.safetensors")
        comfy.run(graph.prompt)
        found = load_file(comfy.base / "output/steered.safetensors")["image"][0].mul(255).round()
        wanted = {"width": side, "height": side, "hires": "shrink" if side > 128 else None}
        picture = pipe(words, seeds=[7], control_image=hint(side, side), control_scale=SCALE, **wanted).images[0]
        assert float((found - torch.from_numpy(np.array(picture)).float()).abs().max()) <= 2


def control_map(graph: Graph, kind: str, **settings: int) -> Node:
    picture = graph("LoadImage", image=f"hint-{SIZE}x{SIZE}.png")
    settings = {"low": 100, "high": 200, "shuffle_seed": 0, **settings}
    made = graph("WaDi_ControlPreprocessor", image=picture[0], kind=kind, **settings)
    graph("Probe_DumpImage", image=made[0], name="map.safetensors")
    return made


@pytest.mark.parametrize("kind", preprocess.PLAIN)
def test_control_maps_are_the_cores(comfy: ComfyServer, control: torch.nn.Module, kind: str) -> None:
    """Whatever packages this ComfyUI has: these kinds need none."""
    graph = Graph()
    control_map(graph, kind)
    comfy.run(graph.prompt)
    found = load_file(comfy.base / "output/map.safetensors")["image"][0].mul(255).round()
    expected = torch.from_numpy(np.array(preprocess.run(hint(SIZE, SIZE), kind))).float()
    assert float((found - expected).abs().max()) <= 1


def test_the_default_kind_needs_nothing(comfy: ComfyServer) -> None:
    spec = comfy.get("/object_info/WaDi_ControlPreprocessor")["WaDi_ControlPreprocessor"]["input"]["required"]["kind"]
    assert spec[1]["default"] in preprocess.PLAIN


def has_package() -> bool:
    return not subprocess.run([host_python(), "-c", "import controlnet_aux"], capture_output=True, check=False).returncode


def test_weights_are_found_where_comfyuis_settings_say(
    comfyui_path: Path, comfy: ComfyServer, control: torch.nn.Module, tmp_path: Path
) -> None:
    """In a folder of ``extra_model_paths.yaml``; what is missing is told for ComfyUI's own Python."""

    def refused(server: ComfyServer) -> str:
        graph = Graph()
        control_map(graph, "softedge")
        with pytest.raises(ComfyError) as failed:
            server.run(graph.prompt)
        message = str(failed.value)
        assert "\n" not in message and str(server.base) not in message and str(tmp_path) not in message
        return message

    message = refused(comfy)
    assert "ControlNetHED.pth from lllyasviel/Annotators on Hugging Face in models/preprocessors" in message
    assert ("the package controlnet-aux: python -m pip install controlnet-aux, with the Python" in message) != has_package()
    assert "need nothing more: canny, invert, shuffle" in message

    (tmp_path / "annotators").mkdir()
    torch.save([1], tmp_path / "annotators/ControlNetHED.pth")  # no weights, which is found out when they are read
    (tmp_path / "extra.yaml").write_text(f"wadi:\n  base_path: {tmp_path}\n  preprocessors: annotators\n")
    options = ("--extra-model-paths-config", str(tmp_path / "extra.yaml"))
    other = ComfyServer(comfyui_path, host_python(), comfy.base, options)
    other.start()
    try:
        message = refused(other)
    finally:
        other.stop()
    assert "ControlNetHED.pth from" not in message
    assert ("of controlnet_aux failed" if has_package() else "the package controlnet-aux") in message


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("depth", {}, "dpt_hybrid-midas-501f0c75.pt from lllyasviel/Annotators"),
    ("canny", {"low": 300, "high": 200}, "thresholds from 0 to 1000"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_made_is_said_in_one_line(
    comfy: ComfyServer, control: torch.nn.Module, kind: str, settings: dict[str, Any], message: str
) -> None:
    graph = Graph()
    control_map(graph, kind, **settings)
    with pytest.raises(ComfyError, match=message) as failed:
        comfy.run(graph.prompt)
    assert "\n" not in str(failed.value)


def test_a_picture_that_is_too_large_is_refused(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    model = graph("WaDi_HighResolution", model=model[0], method="shrink", native_size=8)
    sizes = {"width": SIZE, "height": SIZE, "batch_size": 1, "seed": SEED}
    sampled = graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], **sizes)
    graph("Probe_DumpLatent", latent=sampled[0], name="latent.safetensors")
    with pytest.raises(ComfyError, match="is too large for this network"):
        comfy.run(graph.prompt)
