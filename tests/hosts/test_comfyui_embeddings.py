"""Learned words and personal LoRaDs in a real ComfyUI server: the pictures that the core and diffusers draw."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import comfy_networks
import numpy as np
import pytest
import torch
from comfy_graph import Graph
from comfy_server import ROOT, ComfyServer
from safetensors.torch import load_file

from wadi_core import LoRaD, OneStepPipeline, mini

SEEDS = (7, 8)
WORDS = "a fox {} a red apple, on grass"
ALL_LAYERS, SOME_LAYERS = (f"wadi-mini-{name}.safetensors" for name in ("sks-hibiscus", "left-of"))


def folder_of(comfy: ComfyServer) -> Path:
    """wadi-mini as the server has it."""
    return comfy.base / "custom_nodes/wadi/wadi_core/mini"


def drawn(
    comfy: ComfyServer, words: str, styles: tuple[float, ...] = (), first: str = "one-step", style: str = ALL_LAYERS
) -> torch.Tensor:
    """Pictures (n, h, w, 3), 0 to 255, of the embedded model.

    Args:
        styles: strengths of an adapter that comes with the pack, once for each.
        first: which LoRaD comes first.
        style: the adapter's file.
    """
    graph = Graph()
    base = graph("WaDi_EmbeddedModel")
    chain: list[tuple[str, dict[str, Any]]] = [("WaDi_ApplyLoRaD", {"lorad": base[3], "strength": 1.0, "one_step": True})]
    for strength in styles:
        chain.append(("WaDi_LoadLoRaD", {"lorad_name": style, "strength": strength, "one_step": True}))
    model = base
    for kind, settings in chain if first == "one-step" else reversed(chain):
        model = graph(kind, model=model[0], **settings)
    positive = graph("CLIPTextEncode", clip=base[1], text=words)
    sizes = {"width": 128, "height": 128, "batch_size": len(SEEDS), "seed": SEEDS[0]}
    sampled = graph("WaDi_OneStepSampler", model=model[0], positive=positive[0], **sizes)
    decoded = graph("VAEDecode", samples=sampled[0], vae=base[2])
    graph("Probe_DumpImage", image=decoded[0], name="learned.safetensors")
    comfy.run(graph.prompt)
    return load_file(comfy.base / "output/learned.safetensors")["image"].mul(255).round()


def of_core(comfy: ComfyServer, words: str, lorad: Any = None) -> torch.Tensor:
    folder = folder_of(comfy)
    word = folder / mini.EMBEDDINGS / "left-of.safetensors"
    pipe = OneStepPipeline.from_pretrained(
        folder, lorad=lorad or folder / mini.LORAD, device="cpu", embeddings=word, precision="exact"
    )
    return torch.stack([torch.from_numpy(np.array(image)) for image in pipe(words, seeds=SEEDS).images]).float()


def farthest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@torch.no_grad()
def of_diffusers(folder: Path, words: str) -> torch.Tensor:
    """The same with diffusers' own reader of textual inversions, and none of the core's pipeline."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
    LoRaD.load(folder / mini.LORAD).fuse_into(unet)
    pipe = StableDiffusionPipeline(
        unet=unet, vae=AutoencoderKL.from_pretrained(folder / "vae").float(), safety_checker=None, feature_extractor=None,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder").float(), scheduler=DDIMScheduler(),
        tokenizer=CLIPTokenizer.from_pretrained(ROOT / "wadi_core/mini/tokenizer"), requires_safety_checker=False,
    )  # fmt: skip
    pipe.load_textual_inversion(folder / mini.EMBEDDINGS / "left-of.safetensors")
    told, _ = pipe.encode_prompt(words, "cpu", len(SEEDS), False)
    z = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    x0 = (z - (1 - 0.0047) ** 0.5 * unet(z, 999, encoder_hidden_states=told).sample) / 0.0047**0.5
    images = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample
    return images.add(1).mul(127.5).clamp(0, 255).round().permute(0, 2, 3, 1)


def test_a_learned_word_gives_one_picture_everywhere(comfy: ComfyServer) -> None:
    found = drawn(comfy, WORDS.format("embedding:left-of"))
    assert farthest(found, of_core(comfy, WORDS.format("<left-of>"))) <= 1
    assert farthest(found, of_diffusers(folder_of(comfy), WORDS.format("<left-of>"))) <= 1
    assert farthest(found, drawn(comfy, WORDS.format("and"))) > 2  # and it is another one than without the word


def test_a_users_own_word_comes_first(comfy: ComfyServer) -> None:
    own = comfy.base / "models/embeddings/left-of.safetensors"
    before = drawn(comfy, WORDS.format("embedding:left-of  "))
    comfy_networks.random_word("<left-of>", 128, vectors=1).save(own)
    try:
        assert farthest(drawn(comfy, WORDS.format("embedding:left-of   ")), before) > 2
    finally:
        own.unlink()


@pytest.mark.parametrize("style", [ALL_LAYERS, SOME_LAYERS])
def test_rotations_add_up_in_any_order_each_at_its_own_strength(comfy: ComfyServer, style: str) -> None:
    folder, plain = folder_of(comfy), WORDS.format("and")
    assert farthest(drawn(comfy, plain, (0.0,), style=style), drawn(comfy, plain)) == 0
    for strengths in ((0.5,), (1.0, -0.4)):
        orders = [drawn(comfy, plain, tuple(order), first, style)
                  for order in itertools.permutations(strengths) for first in ("one-step", "style")]  # fmt: skip
        stack = [folder / mini.LORAD, *((folder / mini.ADAPTERS / style, strength) for strength in strengths)]
        expected = of_core(comfy, plain, stack)
        assert max(farthest(found, expected) for found in orders) <= 1
    back = drawn(comfy, plain, (1.0, -1.0), style=style)
    assert farthest(back, drawn(comfy, plain)) <= 1  # what is turned there is turned back
