"""The pack in a real ComfyUI server: its nodes are there, sample exactly, and its workflows run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_facts
import comfy_networks
import comfy_slice
import numpy as np
import pytest
import torch
from comfy_graph import Graph, to_api
from comfy_server import ROOT, ComfyServer
from comfy_slice import SEED, SIZE, TOLERANCE, calls, conditioning, error, latent_of, one_step, with_lorad
from control_networks import random_controlnet
from networks import random_lorad
from PIL import Image
from safetensors.torch import load_file, save_file

from wadi_core import LoRaD, OneStep, cli
from wadi_core.mini import LORAD
from wadi_core.pipeline import noise

NODES = {
    *("WaDi_LoadLoRaD", "WaDi_OpenLoRaD", "WaDi_ApplyLoRaD", "WaDi_EmbeddedModel", "WaDi_EmbeddedControlNet"),
    *("WaDi_OneStepModel", "WaDi_OneStepSampler", "WaDi_OneStepCustomSampling", "WaDi_LoRaDStack", "WaDi_PromptBatch"),
    *("WaDi_HighResolution", "WaDi_NegativePrompt", "WaDi_StrengthSeedGrid"),
    *("WaDi_ExtractLoRaD", "WaDi_SaveLoRaD", "WaDi_ConvertToLoRA", "WaDi_Inspect", "WaDi_AnalyzeDirections"),
    "WaDi_ControlPreprocessor",
}


@pytest.fixture(scope="module")
def network(comfy_base: Path) -> torch.nn.Module:
    """A slice of Stable Diffusion 1.5, which the server has too, with an adapter and a prompt."""
    return comfy_slice.prepare(comfy_base)


@pytest.fixture(scope="module")
def expected(network: torch.nn.Module, comfy_base: Path) -> torch.Tensor:
    """What the core makes of the noise of SEED and SEED + 1 with the adapter, as ComfyUI keeps latents."""
    lorad = LoRaD.load(comfy_base / "models/lorad/slice.safetensors")
    lorad.apply_to(network)
    latent = one_step(network, noise([SEED, SEED + 1], SIZE, SIZE), conditioning(comfy_base), lorad.one_step)
    lorad.remove(network)
    return latent / comfy_networks.SD15_VAE_SCALE


# The nodes


def test_all_nodes_are_there_with_their_words(comfy: ComfyServer) -> None:
    info = comfy.get("/object_info")
    assert {name for name in info if name.startswith("WaDi_")} == NODES
    for name in NODES:
        node = info[name]
        assert node["category"].startswith("WaDi/") and node["description"] and node["display_name"]
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert all(spec[1].get("tooltip") for spec in inputs.values()), name
        assert all(node.get("output_tooltips", [])), name


def test_the_sampler_is_in_the_stock_lists_once(comfy: ComfyServer) -> None:
    info = comfy.get("/object_info")
    for node in ("KSampler", "KSamplerAdvanced", "KSamplerSelect"):
        spec = info[node]["input"]["required"]["sampler_name"]
        options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
        assert options.count("wadi_one_step") == 1


def test_loras_that_are_none_of_ours_are_not_offered(comfy: ComfyServer, network: torch.nn.Module) -> None:
    save_file(comfy_networks.random_lora(network), comfy.base / "models/loras/plain.safetensors")
    random_lorad(network).save(comfy.base / "models/loras/among-loras.safetensors")
    spec = comfy.get("/object_info/WaDi_LoadLoRaD")["WaDi_LoadLoRaD"]["input"]["required"]["lorad_name"]
    options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
    assert {"slice.safetensors", "among-loras.safetensors"} <= set(options) and "plain.safetensors" not in options


# One step


def test_one_step_sampler_equals_the_core(comfy: ComfyServer, expected: torch.Tensor) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    sizes = {"width": SIZE, "height": SIZE, "batch_size": 2, "seed": SEED}
    sampled = graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], **sizes)
    assert error(latent_of(comfy, graph, sampled[0]), expected) < TOLERANCE
    assert calls(comfy) == [{"timesteps": [999.0, 999.0], "shape": [2, 4, SIZE // 8, SIZE // 8]}]


SETTINGS = [
    {"steps": 1, "cfg": 1.0, "scheduler": "normal", "denoise": 1.0},
    {"steps": 20, "cfg": 1.0, "scheduler": "karras", "denoise": 0.4},
    {"steps": 7, "cfg": 1.0, "scheduler": "ddim_uniform", "denoise": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: f"{settings['steps']}-{settings['scheduler']}")
@pytest.mark.parametrize("latent", ["empty", "full"])
def test_stock_sampler_makes_one_exact_call_whatever_is_set(
    comfy: ComfyServer, expected: torch.Tensor, settings: dict[str, Any], latent: str
) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    start = graph("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1)
    if latent == "full":
        start = graph(
            "WaDi_OneStepSampler", model=model[0], positive=positive[0], width=SIZE, height=SIZE, batch_size=1, seed=1
        )
    sampled = graph(
        "KSampler",
        model=model[0],
        seed=SEED,
        sampler_name="wadi_one_step",
        positive=positive[0],
        negative=positive[0],
        latent_image=start[0],
        **settings,
    )
    assert error(latent_of(comfy, graph, sampled[0]), expected[:1]) < TOLERANCE
    assert [call["timesteps"] for call in calls(comfy)] == [[999.0]] * (1 + (latent == "full"))


def test_stock_euler_with_one_step_is_exact_too(comfy: ComfyServer, expected: torch.Tensor) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    start = graph("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1)
    links = {"positive": positive[0], "negative": positive[0], "latent_image": start[0]}
    names = {"sampler_name": "euler", "scheduler": "normal"}
    sampled = graph("KSampler", model=model[0], seed=SEED, steps=1, cfg=1.0, denoise=1.0, **names, **links)
    assert error(latent_of(comfy, graph, sampled[0]), expected[:1]) < TOLERANCE
    assert len(calls(comfy)) == 1


def test_custom_sampling_equals_the_core(comfy: ComfyServer, expected: torch.Tensor) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    parts = graph("WaDi_OneStepCustomSampling", model=model[0])
    start = graph("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1)
    guider = graph("BasicGuider", model=model[0], conditioning=positive[0])
    random = graph("RandomNoise", noise_seed=SEED)
    links = {"noise": random[0], "guider": guider[0], "sampler": parts[0], "sigmas": parts[1], "latent_image": start[0]}
    sampled = graph("SamplerCustomAdvanced", **links)
    assert error(latent_of(comfy, graph, sampled[0]), expected[:1]) < TOLERANCE
    assert [call["timesteps"] for call in calls(comfy)] == [[999.0]]


def test_a_noise_mask_keeps_what_it_covers(comfy: ComfyServer, expected: torch.Tensor) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    start = graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], width=SIZE, height=SIZE, batch_size=1, seed=1)
    mask = graph("SolidMask", value=0.0, width=SIZE, height=SIZE)
    masked = graph("SetLatentNoiseMask", samples=start[0], mask=mask[0])
    names = {"sampler_name": "wadi_one_step", "scheduler": "normal", "steps": 1, "cfg": 1.0, "denoise": 1.0}
    links = {"positive": positive[0], "negative": positive[0], "latent_image": masked[0]}
    sampled = graph("KSampler", model=model[0], seed=SEED, **names, **links)
    graph("Probe_DumpLatent", latent=start[0], name="kept.safetensors")
    found = latent_of(comfy, graph, sampled[0])
    assert error(found, load_file(comfy.base / "output/kept.safetensors")["samples"]) < TOLERANCE


def test_a_merged_network_needs_one_step_model_only(comfy: ComfyServer, network: torch.nn.Module) -> None:
    schedule = OneStep(0.006, 900)
    told = conditioning(comfy.base)
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    model = graph("WaDi_OneStepModel", model=base[0], alpha_T_squared=0.006, timestep=900)
    counted = graph("Probe_Count", model=model[0], name="calls.json")
    positive = graph("Probe_Conditioning", name="prompt.safetensors")
    sizes = {"width": SIZE, "height": SIZE, "batch_size": 1, "seed": SEED}
    sampled = graph("WaDi_OneStepSampler", model=counted[0], positive=positive[0], **sizes)
    found = latent_of(comfy, graph, sampled[0])
    reference = one_step(network, noise([SEED], SIZE, SIZE), told, schedule) / comfy_networks.SD15_VAE_SCALE
    assert error(found, reference) < TOLERANCE
    assert [call["timesteps"] for call in calls(comfy)] == [[900.0]]


def test_without_one_step_weights_the_sampler_says_so(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model, positive = with_lorad(graph, one_step=False)
    sizes = {"width": SIZE, "height": SIZE, "batch_size": 1, "seed": SEED}
    sampled = graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], **sizes)
    graph("Probe_DumpLatent", latent=sampled[0], name="latent.safetensors")
    said = comfy.run(graph.prompt).ui
    notice = said[sampled.id]["wadi_notices"][0]
    assert notice["code"] == "warn_no_weights" and notice["text"] == said[sampled.id]["text"][0]
    assert said["2"]["wadi"][0]["one_step"] is False


def test_the_loader_reports_in_one_line(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model, _ = with_lorad(graph, strength=0.75)
    graph("Probe_DumpWeights", model=model[0], name="weights.safetensors")
    said = comfy.run(graph.prompt).ui["2"]
    count = len(random_lorad(network).factors)
    assert said["text"] == [
        f"{count} of {count} layers, rank 4, unet-custom, strength 0.75, one step at t = 999, alpha_T^2 = 0.0047"
    ]
    facts = said["wadi"][0]
    assert (facts["layers"], facts["of"], facts["rank"], facts["one_step"]) == (count, count, 4, True)


# The embedded model


def test_embedded_model_draws_what_command_line_and_diffusers_draw(comfy: ComfyServer, tmp_path: Path) -> None:
    """The same noise, the same words: the same pictures within 1/255 of every pixel."""
    words = "a red apple and a bicycle"
    graph = Graph()
    mini = graph("WaDi_EmbeddedModel")
    turned = graph("WaDi_ApplyLoRaD", model=mini[0], lorad=mini[3], strength=1.0, one_step=True)
    positive = graph("CLIPTextEncode", clip=mini[1], text=words)
    sizes = {"width": 128, "height": 128, "batch_size": 2, "seed": 7}
    sampled = graph("WaDi_OneStepSampler", model=turned[0], positive=positive[0], **sizes)
    decoded = graph("VAEDecode", samples=sampled[0], vae=mini[2])
    graph("Probe_DumpImage", image=decoded[0], name="mini.safetensors")
    comfy.run(graph.prompt)
    found = load_file(comfy.base / "output/mini.safetensors")["image"].mul(255).round()

    folder = comfy.base / "custom_nodes/wadi/wadi_core/mini"
    lorad = folder / LORAD
    (tmp_path / "prompts.txt").write_text(f"{words}\n{words}\n")
    command = ["generate", "--base", str(folder), "--lorad", str(lorad), "--prompts", str(tmp_path / "prompts.txt")]
    command += ["--precision", "exact"]
    assert cli.main([*command, "--seed", "7", "--device", "cpu", "-o", str(tmp_path / "drawn.png")]) == 0
    files = sorted(tmp_path.glob("drawn*.png"))
    of_command_line = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in files]).float()
    assert of_command_line.std() > 1  # not one colour
    assert float((found - of_command_line).abs().max()) <= 1
    assert float((found - of_diffusers(folder, lorad, words, (7, 8))).abs().max()) <= 1


@torch.no_grad()
def of_diffusers(folder: Path, lorad: Path, words: str, seeds: tuple[int, ...]) -> torch.Tensor:
    """Pictures (n, h, w, 3), 0 to 255, of the libraries' own classes and the formula, none of the core's pipeline."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    LoRaD.load(lorad).fuse_into(unet)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "wadi_core/mini/tokenizer")
    ids = tokenizer(words, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    told = CLIPTextModel.from_pretrained(folder / "text_encoder").float()(ids)[0].expand(len(seeds), -1, -1)
    z = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    eps = unet(z, 999, encoder_hidden_states=told).sample
    x0 = (z - (1 - 0.0047) ** 0.5 * eps) / 0.0047**0.5
    images = vae.decode(x0 / vae.config.scaling_factor).sample
    return images.add(1).mul(127.5).clamp(0, 255).round().permute(0, 2, 3, 1)


def test_what_was_saved_of_the_embedded_model_loads_again(comfy: ComfyServer) -> None:
    """A network of its widths is known to ComfyUI's own loaders while the pack is there."""
    graph = Graph()
    mini = graph("WaDi_EmbeddedModel")
    turned = graph("WaDi_ApplyLoRaD", model=mini[0], lorad=mini[3], strength=1.0, one_step=True)
    graph("ModelSave", model=turned[0], filename_prefix="mini")
    comfy.run(graph.prompt)
    saved = next((comfy.base / "output").glob("mini_*.safetensors"))
    saved.rename(comfy.base / "models/diffusion_models/saved-mini.safetensors")
    latents = []
    for name in ("embedded", "saved"):
        graph = Graph()
        mini = graph("WaDi_EmbeddedModel")
        model = graph("WaDi_ApplyLoRaD", model=mini[0], lorad=mini[3], strength=1.0, one_step=True)
        if name == "saved":
            loaded = graph("UNETLoader", unet_name="saved-mini.safetensors", weight_dtype="default")
            model = graph("WaDi_OneStepModel", model=loaded[0], alpha_T_squared=0.0047, timestep=999)
        positive = graph("CLIPTextEncode", clip=mini[1], text="a red apple")
        sizes = {"width": 128, "height": 128, "batch_size": 1, "seed": 7}
        sampled = graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], **sizes)
        latents.append(latent_of(comfy, graph, sampled[0]))
    assert error(latents[1], latents[0]) < 1e-3


# PixArt


def test_pixart_alpha_256_equals_the_core(comfy: ComfyServer) -> None:
    network = comfy_networks.pixart()
    state = {name: tensor for name, tensor in network.state_dict().items() if name != "pos_embed.pos_embed"}
    save_file(state, comfy.base / "models/diffusion_models/pixart.safetensors")
    lorad = comfy_networks.pixart_lorad(network)
    lorad.save(comfy.base / "models/lorad/pixart.safetensors", torch.float32)
    torch.manual_seed(8)
    told = torch.randn(1, 150, 4096)  # more tokens than PixArt takes
    save_file({"conditioning": told}, comfy.base / "input/pixart.safetensors")
    with torch.no_grad():
        z = noise([SEED], 256, 256)
        sizes = {"resolution": None, "aspect_ratio": None}
        ask = {"encoder_hidden_states": told[:, :120], "added_cond_kwargs": sizes}
        bare = OneStep().x0(z, network(z, timestep=torch.tensor([999]), **ask).sample)
        lorad.apply_to(network)
        turned = OneStep().x0(z, network(z, timestep=torch.tensor([999]), **ask).sample)
    for adapter, reference in (("WaDi_LoadLoRaD", turned), ("WaDi_OneStepModel", bare)):
        graph = Graph()
        base = graph("UNETLoader", unet_name="pixart.safetensors", weight_dtype="default")
        settings = {"alpha_T_squared": 0.0047, "timestep": 999}
        if adapter == "WaDi_LoadLoRaD":
            settings = {"lorad_name": "pixart.safetensors", "strength": 1.0, "one_step": True}
        model = graph(adapter, model=base[0], **settings)
        for _ in range(2):  # what other nodes do: a MODEL is cloned with each patch
            model = graph("ModelComputeDtype", model=model[0], dtype="fp32")
        counted = graph("Probe_Count", model=model[0], name="calls.json")
        positive = graph("Probe_Conditioning", name="pixart.safetensors")
        sizes = {"width": 256, "height": 256, "batch_size": 1, "seed": SEED}
        sampled = graph("WaDi_OneStepSampler", model=counted[0], positive=positive[0], **sizes)
        found = latent_of(comfy, graph, sampled[0])
        assert error(found, reference / comfy_networks.SD15_VAE_SCALE) < TOLERANCE
        assert [call["timesteps"] for call in calls(comfy)] == [[999.0]]


# Workflows


@pytest.fixture(scope="module")
def models(comfy_base: Path, network: torch.nn.Module) -> Iterator[None]:
    """Files of the names that the workflows ask for, small and random."""
    models = comfy_base / "models"
    comfy_networks.checkpoint(models / "checkpoints/v1-5-pruned-emaonly-fp16.safetensors", network, comfy_networks.SLICE)
    lorad = random_lorad(network)
    lorad.save(models / "lorad/wadi-sd15-one-step.safetensors")
    random_lorad(network, rank=2, seed=5, one_step=False).save(models / "lorad/personal.safetensors")
    comfy_networks.random_word("<R>", 768).save(models / "embeddings/relation.safetensors")
    save_file(comfy_networks.random_lora(network), models / "loras/your-style-lora.safetensors")
    controlnet = comfy_slice.controlnet_state(random_controlnet(network))
    save_file(controlnet, models / "controlnet/control_v11p_sd15_canny_fp16.safetensors")
    Image.new("RGB", (200, 150), "white").save(comfy_base / "input/example.png")
    fused = lorad.fuse_into(network)
    comfy_networks.diffusion_model(models / "diffusion_models/rotated_unet-sdv1-5.safetensors", network, comfy_networks.SLICE)
    fused.restore()
    for there, here in SAME.items():  # what matters is which file goes where
        shutil.copyfile(models / there, models / here)
    transformer = comfy_networks.pixart()
    state = {name: tensor for name, tensor in transformer.state_dict().items() if name != "pos_embed.pos_embed"}
    save_file(state, models / "diffusion_models/rotated_transformer.safetensors")
    save_file(comfy_networks.taesd(), models / "vae/vae-ft-mse-840000-ema-pruned.safetensors")
    save_file({"conditioning": torch.randn(1, 30, 4096)}, comfy_base / "input/t5.safetensors")
    return


WORKFLOWS = sorted(path.name for path in (ROOT / "workflows").glob("*.json"))
NO_DOWNLOAD = "(no download)"
SAME = {
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": "checkpoints/v2-1_512-ema-pruned.safetensors",
    "diffusion_models/rotated_unet-sdv1-5.safetensors": "diffusion_models/rotated_unet-sdv2-1.safetensors",
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_runs(comfy: ComfyServer, models: None, name: str) -> None:
    workflow = json.loads((ROOT / "workflows" / name).read_text())
    prompt = to_api(workflow, comfy.get("/object_info"))
    for key, node in list(prompt.items()):
        if node["class_type"] == "WebcamCapture":  # the front end puts a picture from the camera there
            node["inputs"]["image"] = "example.png"
        if "width" in node["inputs"] and NO_DOWNLOAD not in name:
            small = 256 if "PixArt" in name else 128
            node["inputs"] |= {side: small for side in ("width", "height")}
            node["inputs"] |= {"batch_size": 1} if "batch_size" in node["inputs"] else {}
        if node["class_type"] == "WaDi_HighResolution" and NO_DOWNLOAD not in name:
            node["inputs"]["native_size"] = 64
        if node["class_type"] == "CLIPLoader":  # T5-XXL is 9.5 GB: its output comes out of a file instead
            encoder = next(k for k, n in prompt.items() if n["class_type"] == "CLIPTextEncode")
            prompt[encoder] = {"class_type": "Probe_Conditioning", "inputs": {"name": "t5.safetensors"}}
            del prompt[key]
    pictures = [image for output in comfy.run(prompt).ui.values() for image in output.get("images", [])]
    assert pictures
    for image in pictures:
        query = f"filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
        assert comfy.bytes_of(f"/view?{query}").startswith(b"\x89PNG")


@pytest.mark.parametrize("name", comfy_facts.subgraphs())
def test_blueprint_runs(comfy: ComfyServer, models: None, name: str) -> None:
    """As it runs in a graph of its own, with its own settings, but small pictures."""
    inside = comfy_facts.subgraphs()[name]
    graph = {**inside, "links": [[link[key] for key in comfy_facts.LINK] for link in inside["links"]]}
    outside = {link[0] for link in graph["links"] if link[1] < 0}
    for node in graph["nodes"]:
        for slot in node["inputs"]:
            slot["link"] = None if slot["link"] in outside else slot["link"]
    prompt = to_api(graph, comfy.get("/object_info"))
    for node in prompt.values():
        small = {"width": 128, "height": 128, "native_size": 64}
        node["inputs"] |= {key: value for key, value in small.items() if key in node["inputs"]}
        if node["class_type"] == "ControlNetApplyAdvanced":
            node["inputs"]["image"] = ["map", 0]
            prompt |= {
                "map": {"class_type": "EmptyImage", "inputs": {"width": 128, "height": 128, "batch_size": 1, "color": 0}}
            }
            break
    for _, start, output, end, _, kind in graph["links"]:
        if end < 0 and kind == "IMAGE":
            prompt["shown"] = {"class_type": "PreviewImage", "inputs": {"images": [str(start), output]}}
    shown = comfy.run(prompt).ui
    assert shown["shown"]["images"] if "shown" in prompt else any("text" in one for one in shown.values())
