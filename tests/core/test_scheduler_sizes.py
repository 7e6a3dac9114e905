"""Stock pipelines and ours, the same random networks in both: small ones always, those of SD1.5's full size on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from control_networks import random_controlnet
from PIL import Image
from pipeline_kit import count_calls, equal, largest_difference, weights_of
from stock_pipelines import stock

from wadi_core import OneStepPipeline
from wadi_core import base as bases
from wadi_core.base import Base
from wadi_core.control import ControlNet
from wadi_core.lorad import LoRaD
from wadi_core.pipeline import noise
from wadi_core.scheduler import OneStepScheduler, load_lorad, unload_lorad

pytestmark = pytest.mark.usefixtures("no_network")
PROMPT = "a red apple"
SIZES = ["small", pytest.param("full", marks=pytest.mark.full)]


@dataclass
class Pair:
    """Our pipeline with the bare base, the same parts for stock pipelines (no copies: 3.4 GB), and an adapter."""

    ours: OneStepPipeline
    parts: dict[str, Any]
    lorad: LoRaD


def make_pair(place: Path, size: str) -> Pair:
    changes = networks.small_settings("sd15") if size == "small" else {}
    folder = networks.write_settings(place / "base", "sd15", changes)
    made = {part: network.eval().requires_grad_(False) for part, network in networks.make_networks(folder).items()}
    tokenizer, pad = bases._load_tokenizer(folder / "tokenizer")
    base = Base("random", "sd15", tokenizer=tokenizer, pad=pad, prediction_type="epsilon", one_step=None, **made)
    lorad = networks.random_lorad(made["unet"])
    control = ControlNet("random", random_controlnet(made["unet"]).eval().requires_grad_(False))
    ours = OneStepPipeline(base, torch.device("cpu"), torch.float32, control=[control])
    parts: dict[str, Any] = {**made, "tokenizer": tokenizer, "scheduler": OneStepScheduler(alpha_T_squared=0.5)}
    return Pair(ours, parts | {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}, lorad)


@pytest.mark.parametrize("size", SIZES)
def test_stock_pipelines_are_ours(size: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, size)
    width, height = pair.ours.native_size
    edges, everything = Image.new("RGB", (width, height), "white"), Image.new("L", (width, height), 255)
    asked: dict[str, dict[str, Any]] = {
        "StableDiffusionPipeline": {},
        "StableDiffusionControlNetPipeline": {"image": edges, "controlnet_conditioning_scale": 0.7},
        "StableDiffusionInpaintPipeline": {"image": edges, "mask_image": everything, "width": width, "height": height},
    }
    drawn = {}
    for kind, more in asked.items():
        extra = {"controlnet": pair.ours.control[0].network} if "ControlNet" in kind else {}
        pipe = stock(pair.parts, kind, copied=False, **extra)
        load_lorad(pipe, pair.lorad)
        drawn[kind] = pipe(PROMPT, latents=noise([7], width, height), **more).images[0]
        unload_lorad(pipe)

    before = weights_of(pair.ours.unet) if size == "small" else {}
    calls = count_calls(pair.ours.unet)
    pair.ours.set_lorad(pair.lorad)
    plain = pair.ours(PROMPT, seed=7, control_image=edges, control_scale=0.0).images[0]
    steered = pair.ours(PROMPT, seed=7, control_image=edges, control_scale=0.7).images[0]
    assert calls == [1, 1] and largest_difference(plain, steered) > 1
    assert largest_difference(drawn["StableDiffusionPipeline"], plain) <= 1
    assert largest_difference(drawn["StableDiffusionInpaintPipeline"], plain) <= 1
    assert largest_difference(drawn["StableDiffusionControlNetPipeline"], steered) <= 1
    pair.ours.set_lorad(None)
    assert size == "full" or equal(before, weights_of(pair.ours.unet))
