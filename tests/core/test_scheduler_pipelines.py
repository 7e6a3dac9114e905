"""The one-step scheduler in further pipelines of diffusers: T2I-Adapter, AnimateDiff and PixArt-alpha, on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from PIL import Image
from pipeline_kit import count_calls, equal, largest_difference, weights_of
from pixart import write_pixart
from stock_pipelines import mini_parts, stock

from wadi_core import LoRaD, OneStep, OneStepPipeline, mini, pictures
from wadi_core.lorad import Metadata
from wadi_core.pipeline import noise
from wadi_core.scheduler import load_lorad, set_strengths, unload_lorad

pytestmark = pytest.mark.usefixtures("no_network")
PROMPT = "a red apple"


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return mini_parts()


@pytest.fixture(scope="module")
def ours() -> OneStepPipeline:
    return OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")


def test_t2i_adapter(parts: dict[str, Any], ours: OneStepPipeline) -> None:
    from diffusers import T2IAdapter

    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=3, channels=[96, 192, 192], num_res_blocks=1, downscale_factor=8)
    pipe = stock(parts, "StableDiffusionAdapterPipeline", adapter=adapter)
    load_lorad(pipe, mini.lorad_path())
    calls = count_calls(pipe.unet)
    sketch = Image.new("RGB", (128, 128), "white")
    asked = {"prompt": PROMPT, "image": sketch, "latents": noise([7], 128, 128)}
    plain = pipe(**asked, adapter_conditioning_scale=0.0).images[0]
    assert largest_difference(plain, ours(PROMPT, seed=7).images[0]) <= 1
    assert largest_difference(pipe(**asked, adapter_conditioning_scale=20.0).images[0], plain) > 10
    assert calls == [1, 1]


def test_animatediff_with_still_motion_modules_draws_our_picture_in_every_frame(
    parts: dict[str, Any], ours: OneStepPipeline
) -> None:
    from diffusers import MotionAdapter

    torch.manual_seed(0)
    layers = parts["unet"].config.layers_per_block
    motion = MotionAdapter(
        block_out_channels=(96, 192, 192), motion_layers_per_block=layers, motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=4, motion_norm_num_groups=32, use_motion_mid_block=False,
    )  # fmt: skip
    own = {name: ... for name in ("safety_checker", "feature_extractor", "requires_safety_checker")}
    pipe = stock(parts, "AnimateDiffPipeline", motion_adapter=motion, **own)
    before = weights_of(pipe.unet)
    assert str(load_lorad(pipe, mini.lorad_path())) == "81 of 81 layers, rank 48, wadi-mini"
    calls = count_calls(pipe.unet)
    z = noise([7, 8, 9], 128, 128).transpose(0, 1)[None]  # (1, 4, frames, h, w)
    asked = {"prompt": PROMPT, "num_frames": 3, "height": 128, "width": 128, "latents": z}
    for layer in projections(pipe.unet):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    frames = pipe(**asked).frames[0]
    assert calls == [1] and len(frames) == 3
    for frame, theirs in zip(frames, ours([PROMPT] * 3, seed=7).images, strict=True):
        assert largest_difference(frame, theirs) <= 1
    for layer in projections(pipe.unet):
        torch.nn.init.normal_(layer.weight, std=0.5)
    assert largest_difference(pipe(**asked).frames[0][0], frames[0]) > 10  # the modules take part
    unload_lorad(pipe)
    after = weights_of(pipe.unet)
    assert equal({n: t for n, t in before.items() if "motion" not in n}, {n: t for n, t in after.items() if "motion" not in n})


def projections(unet: Any) -> list[torch.nn.Linear]:
    return [layer for path, layer in unet.named_modules() if "motion_modules" in path and path.endswith(".proj_out")]


def test_pixart(tmp_path: Path) -> None:
    """Its guidance is on by default and decided inside the call."""
    from diffusers import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline.from_pretrained(write_pixart(tmp_path / "pixart"))
    pipe.set_progress_bar_config(disable=True)
    plain = networks.random_lorad(pipe.transformer)
    lorad = LoRaD(plain.factors, Metadata("pixart-alpha", 0.0047, 999))
    before, kind, own = weights_of(pipe.transformer), type(pipe), pipe.scheduler
    load_lorad(pipe, lorad)
    calls = count_calls(pipe.transformer)
    z = noise([7], 256, 256)
    asked = {"prompt": PROMPT, "latents": z, "clean_caption": False, "use_resolution_binning": False}
    made = pipe(**asked).images[0]
    assert calls == [1]

    seen: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    pipe(**asked, guidance_scale=4.5, num_inference_steps=20)
    assert calls == [1, 1] and int(seen[0]["timestep"]) == 999
    with torch.no_grad():
        eps = pipe.transformer(z, **{**seen[0], "return_dict": True}).sample
        x0 = OneStep().x0(z, eps)
        expected = pictures.to_pictures(pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample)[0]
    assert largest_difference(made, expected) <= 1
    set_strengths(pipe, {"lorad": 0.0})
    assert largest_difference(pipe(**asked).images[0], made) > 1
    unload_lorad(pipe)
    assert type(pipe) is kind and pipe.scheduler is own and equal(before, weights_of(pipe.transformer))
