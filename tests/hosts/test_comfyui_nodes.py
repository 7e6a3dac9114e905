"""The pack's nodes for several prompts, files, strengths and parts of pictures in a real ComfyUI."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import comfy_networks
import comfy_slice
import pytest
import torch
from comfy_graph import Graph
from comfy_server import ComfyError, ComfyServer
from comfy_slice import (
    SEED,
    SIZE,
    TOLERANCE,
    calls,
    codes,
    conditioning,
    error,
    latent_of,
    mini_model,
    one_step,
    sampled,
    with_lorad,
)
from networks import random_lorad
from PIL import Image
from safetensors.torch import load_file, save_file

from wadi_core import LoRaD, mini
from wadi_core.pipeline import noise

LINES = ("a red apple", "a bicycle", " ".join(["a green tree and a house"] * 30))  # the last is longer than 77 tokens


@pytest.fixture(scope="module")
def network(comfy_base: Path) -> torch.nn.Module:
    """The slice, and a second adapter for it that is no student."""
    made = comfy_slice.prepare(comfy_base)
    random_lorad(made, rank=2, seed=5, one_step=False).save(comfy_base / "models/lorad/personal.safetensors", torch.float32)
    return made


# Several prompts


def test_a_batch_of_prompts_is_one_call_and_each_picture_is_that_of_its_line(comfy: ComfyServer) -> None:
    graph = Graph()
    base, model = mini_model(graph)
    batch = graph("WaDi_PromptBatch", clip=base[1], text="\n \n".join(LINES))
    together = latent_of(comfy, graph, sampled(graph, model, batch[0], batch_size=batch[1])[0])
    assert [call["shape"] for call in calls(comfy)] == [[3, 4, 16, 16]]
    for index, line in enumerate(LINES):
        graph = Graph()
        base, model = mini_model(graph)
        told = graph("CLIPTextEncode", clip=base[1], text=line)
        alone = latent_of(comfy, graph, sampled(graph, model, told[0], seed=SEED + index)[0])
        assert error(together[index : index + 1], alone) < 1e-3


def test_a_batch_of_prompts_for_the_stock_sampler(comfy: ComfyServer) -> None:
    """The count makes the empty latents fit."""
    graph = Graph()
    base, model = mini_model(graph)
    batch = graph("WaDi_PromptBatch", clip=base[1], text="a red apple\na bicycle")
    empty = graph("EmptyLatentImage", width=128, height=128, batch_size=batch[1])
    names = {"sampler_name": "wadi_one_step", "scheduler": "normal", "steps": 1, "cfg": 1.0, "denoise": 1.0, "seed": SEED}
    links = {"positive": batch[0], "negative": batch[0], "latent_image": empty[0]}
    found = latent_of(comfy, graph, graph("KSampler", model=model[0], **names, **links)[0])
    assert found.shape[0] == 2 and error(found[:1], found[1:]) > 0.1


def test_prompts_without_a_picture_are_told(comfy: ComfyServer) -> None:
    graph = Graph()
    base, model = mini_model(graph)
    batch = graph("WaDi_PromptBatch", clip=base[1], text="a red apple\na bicycle")
    assert codes(comfy, graph, sampled(graph, model, batch[0])) == ["warn_prompts"]
    graph = Graph()
    base, model = mini_model(graph)
    nothing = graph("WaDi_PromptBatch", clip=base[1], text=" \n\n")
    graph("Probe_DumpLatent", latent=sampled(graph, model, nothing[0])[0], name="latent.safetensors")
    with pytest.raises(ComfyError, match="write one a line"):
        comfy.run(graph.prompt)


# Several files


def test_a_stack_is_its_files_one_after_the_other(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    rows: dict[str, Any] = {"lorad_3": "slice.safetensors", "strength_3": 0.7}  # switched off
    rows |= {"lorad_1": "slice.safetensors", "strength_1": 1.0, "lorad_4": "personal.safetensors", "strength_4": 0.5}
    rows |= {f"on_{row}": row != 3 for row in range(1, 5)} | {"lorad_2": "none", "strength_2": 2.0}
    stack = graph("WaDi_LoRaDStack", model=base[0], one_step=True, **rows)
    graph("Probe_DumpWeights", model=stack[0], name="stack.safetensors")
    said = comfy.run(graph.prompt).ui[stack.id]
    assert [fact["strength"] for fact in said["wadi"]] == [1.0, 0.5] and "wadi_notices" not in said

    graph = Graph()
    model = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    for name, strength in (("slice", 1.0), ("personal", 0.5)):
        settings = {"lorad_name": f"{name}.safetensors", "strength": strength, "one_step": True}
        model = graph("WaDi_LoadLoRaD", model=model[0], **settings)
    graph("Probe_DumpWeights", model=model[0], name="chain.safetensors")
    comfy.run(graph.prompt)
    one, other = (load_file(comfy.base / f"output/{name}.safetensors") for name in ("stack", "chain"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_stack_with_a_file_that_is_not_there_is_refused_at_once(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    rows = {f"lorad_{row}": "none" for row in range(1, 5)} | {f"strength_{row}": 1.0 for row in range(1, 5)}
    rows |= {f"on_{row}": True for row in range(1, 5)} | {"lorad_2": "../nothing.safetensors"}
    stack = graph("WaDi_LoRaDStack", model=base[0], one_step=True, **rows)
    graph("Probe_DumpWeights", model=stack[0], name="stack.safetensors")
    with pytest.raises(ComfyError, match="no such file in models/lorad"):
        comfy.run(graph.prompt)


def test_names_of_the_embedded_model_are_known(comfy: ComfyServer) -> None:
    """Its files lie in the pack, and its LoRaDs are offered."""
    spec = comfy.get("/object_info/WaDi_LoRaDStack")["WaDi_LoRaDStack"]["input"]["required"]["lorad_1"]
    options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
    own = sorted(path.name for path in (mini.FOLDER / mini.ADAPTERS).glob("*.safetensors"))
    assert options[0] == "none" and set(own) <= set(options)


# Strengths and seeds


def test_a_grid_has_a_row_for_each_strength_from_one_call(comfy: ComfyServer) -> None:
    graph = Graph()
    base = graph("WaDi_EmbeddedModel")
    counted = graph("Probe_Count", model=base[0], name="calls.json")
    told = graph("CLIPTextEncode", clip=base[1], text="a red apple")
    grid = graph(
        "WaDi_StrengthSeedGrid",
        **{"model": counted[0], "positive": told[0], "vae": base[2], "lorad": base[3]},
        **{"strengths": "0; 0.5, 1", "width": 0, "height": 0, "seeds": 2, "seed": SEED},
    )
    graph("Probe_DumpImage", image=grid[1], name="images.safetensors")
    graph("SaveImage", images=grid[0], filename_prefix="grid")
    shown = comfy.run(graph.prompt).ui
    assert [call["shape"] for call in calls(comfy)] == [[2, 4, 16, 16]] * 3
    images = load_file(comfy.base / "output/images.safetensors")["image"]
    assert images.shape == (6, 128, 128, 3)
    name = next(output["images"][0]["filename"] for output in shown.values() if output.get("images"))
    with Image.open(io.BytesIO(comfy.bytes_of(f"/view?filename={name}&type=output"))) as sheet:
        assert sheet.width > 2 * 128 and sheet.height > 3 * (128 + 12)  # labels under the pictures

    graph = Graph()
    base, model = mini_model(graph)
    told = graph("CLIPTextEncode", clip=base[1], text="a red apple")
    made = sampled(graph, model, told[0], seed=SEED + 1)
    decoded = graph("VAEDecode", samples=made[0], vae=base[2])
    graph("Probe_DumpImage", image=decoded[0], name="alone.safetensors")
    comfy.run(graph.prompt)
    alone = load_file(comfy.base / "output/alone.safetensors")["image"][0]
    assert float((images[5] - alone).abs().max()) < 1e-3
    assert float((images[0] - images[4]).abs().mean()) > 0.02


@pytest.mark.parametrize("strengths", ["", "one", "1, 9", "nan", " ,".join(["1"] * 17)])
def test_strengths_that_are_none_are_told(comfy: ComfyServer, strengths: str) -> None:
    graph = Graph()
    base = graph("WaDi_EmbeddedModel")
    told = graph("CLIPTextEncode", clip=base[1], text="a red apple")
    links = {"model": base[0], "positive": told[0], "vae": base[2], "lorad": base[3]}
    sizes = {"strengths": strengths, "width": 0, "height": 0, "seeds": 1, "seed": 0}
    grid = graph("WaDi_StrengthSeedGrid", **links, **sizes)
    graph("Probe_DumpImage", image=grid[0], name="grid.safetensors")
    with pytest.raises(ComfyError, match="strengths are 1 to 16 numbers from -4 to 4"):
        comfy.run(graph.prompt)


def test_the_stock_loader_has_a_tiny_decoder(comfy: ComfyServer, network: torch.nn.Module) -> None:
    """TAESD's two files are all that it needs."""
    (comfy.base / "models/vae_approx").mkdir(exist_ok=True)
    whole = comfy_networks.taesd()
    for part in ("taesd_encoder", "taesd_decoder"):
        own = {name.removeprefix(f"{part}."): tensor for name, tensor in whole.items() if name.startswith(part)}
        save_file(own, comfy.base / f"models/vae_approx/{part}.safetensors")
    graph = Graph()
    model, positive = with_lorad(graph)
    vae = graph("VAELoader", vae_name="taesd")
    made = sampled(graph, model, positive[0], width=SIZE, height=SIZE)
    decoded = graph("VAEDecode", samples=made[0], vae=vae[0])
    graph("Probe_DumpImage", image=decoded[0], name="tiny.safetensors")
    comfy.run(graph.prompt)
    image = load_file(comfy.base / "output/tiny.safetensors")["image"]
    assert image.shape == (1, SIZE, SIZE, 3) and image.isfinite().all()


# A part of a picture


def test_a_mask_keeps_the_rest_to_the_bit(comfy: ComfyServer, network: torch.nn.Module) -> None:
    def made(masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
        graph = Graph()
        model, positive = with_lorad(graph)
        first = sampled(graph, model, positive[0], seed=1, width=SIZE, height=SIZE)
        graph("Probe_DumpLatent", latent=first[0], name="kept.safetensors")
        black = graph("SolidMask", value=0.0, width=SIZE, height=SIZE)
        white = graph("SolidMask", value=1.0, width=SIZE // 2, height=SIZE)
        mask = graph("MaskComposite", destination=black[0], source=white[0], x=SIZE // 2, y=0, operation="add")
        if masked:
            more: dict[str, Any] = {"latent": first[0], "mask": mask[0]}
        else:
            noted = graph("SetLatentNoiseMask", samples=first[0], mask=mask[0])
            more = {"latent": noted[0]}
        found = latent_of(comfy, graph, sampled(graph, model, positive[0], batch_size=2, **more)[0])
        return found, load_file(comfy.base / "output/kept.safetensors")["samples"]

    half = SIZE // 16
    found, kept = made(masked=True)
    assert found.shape == (2, 4, SIZE // 8, SIZE // 8)
    assert torch.equal(found[..., :half], kept[..., :half].expand(2, -1, -1, -1))
    assert error(found[:1, :, :, half:], kept[..., half:]) > 0.1 and error(found[:1], found[1:]) > 0.1
    by_latent, _ = made(masked=False)
    assert torch.equal(by_latent, found)


def test_a_mask_of_white_alone_is_a_new_picture(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    first = sampled(graph, model, positive[0], seed=1, width=SIZE, height=SIZE)
    mask = graph("SolidMask", value=1.0, width=SIZE, height=SIZE)
    found = latent_of(comfy, graph, sampled(graph, model, positive[0], latent=first[0], mask=mask[0])[0])
    lorad = LoRaD.load(comfy.base / "models/lorad/slice.safetensors")
    lorad.apply_to(network)
    expected = one_step(network, noise([SEED], SIZE, SIZE), conditioning(comfy.base), lorad.one_step)
    lorad.remove(network)
    assert error(found, expected / comfy_networks.SD15_VAE_SCALE) < TOLERANCE


def test_what_a_latent_is_for_is_told(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    first = sampled(graph, model, positive[0], seed=1, width=SIZE, height=SIZE)
    assert "note_latent" in codes(comfy, graph, sampled(graph, model, positive[0], latent=first[0]))
    graph = Graph()
    model, positive = with_lorad(graph)
    mask = graph("SolidMask", value=1.0, width=SIZE, height=SIZE)
    graph("Probe_DumpLatent", latent=sampled(graph, model, positive[0], mask=mask[0])[0], name="latent.safetensors")
    with pytest.raises(ComfyError, match="a mask keeps parts of a latent, and there is none"):
        comfy.run(graph.prompt)
