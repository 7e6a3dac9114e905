"""The scheduler of diffusers: stock pipelines draw in one call what our own pipeline draws, and give everything back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from PIL import Image
from pipeline_kit import count_calls, equal, largest_difference, make_kit, weights_of
from stock_pipelines import mini_parts, stock
from torch import Tensor

from wadi_core import LoRaD, OneStep, OneStepPipeline, mini
from wadi_core.pipeline import noise
from wadi_core.scheduler import (
    OneStepScheduler,
    fuse_lorad,
    hotswap_lorad,
    load_lorad,
    make_many_step,
    make_one_step,
    set_strengths,
    unload_lorad,
)

pytestmark = pytest.mark.usefixtures("no_network")
PROMPT, SEED = "a red apple", 7


@pytest.fixture(scope="module")
def ours() -> OneStepPipeline:
    return OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return mini_parts()


def z(seed: int = SEED) -> Tensor:
    return noise([seed], 128, 128)


def test_text_to_image_is_ours(parts: dict[str, Any], ours: OneStepPipeline) -> None:
    pipe = stock(parts)
    before, scheduler, kind = weights_of(pipe.unet), pipe.scheduler, type(pipe)
    match = load_lorad(pipe, mini.lorad_path())
    calls = count_calls(pipe.unet)
    assert str(match).startswith("81 of 81 layers")
    made = pipe(PROMPT, latents=z()).images[0]  # neither steps nor guidance are given
    assert calls == [1]
    assert largest_difference(made, ours(PROMPT, seed=SEED).images[0]) <= 1

    unload_lorad(pipe)
    assert (type(pipe), pipe.scheduler) == (kind, scheduler) and equal(before, weights_of(pipe.unet))


def test_a_batch_and_any_number_of_steps_are_one_call(parts: dict[str, Any]) -> None:
    pipe = stock(parts)
    load_lorad(pipe, mini.lorad_path())
    calls = count_calls(pipe.unet)
    one = pipe(PROMPT, latents=z(), num_inference_steps=1, guidance_scale=1.0, output_type="np").images
    both = pipe(
        [PROMPT, "a cat"],
        latents=torch.cat([z(), z(8)]),
        num_inference_steps=30,
        guidance_scale=9.0,
        output_type="np",
    ).images
    assert calls == [1, 2]
    assert abs(both[0] - one[0]).max() < 1e-3


def test_control_is_ours(parts: dict[str, Any]) -> None:
    from diffusers import ControlNetModel

    ours = OneStepPipeline.from_pretrained("mini", device="cpu", control="mini", precision="exact")

    edges = Image.new("RGB", (128, 128))
    edges.paste("white", (40, 40, 44, 90))
    edges.paste("white", (40, 86, 90, 90))
    pipe = stock(parts, "StableDiffusionControlNetPipeline", controlnet=ControlNetModel.from_pretrained(mini.control_path()))
    load_lorad(pipe, mini.lorad_path())
    made = pipe(PROMPT, image=edges, latents=z(), controlnet_conditioning_scale=0.8).images[0]
    theirs = ours(PROMPT, seed=SEED, control_image=edges, control_scale=0.8).images[0]
    assert largest_difference(made, theirs) <= 1
    assert largest_difference(made, ours(PROMPT, seed=SEED, control_image=edges, control_scale=0.0).images[0]) > 20


def test_inpainting_keeps_what_is_outside_the_mask(parts: dict[str, Any], ours: OneStepPipeline) -> None:
    pipe = stock(parts, "StableDiffusionInpaintPipeline")
    load_lorad(pipe, mini.lorad_path())
    picture = ours("a cat", seed=1).images[0]
    everything, half = Image.new("L", (128, 128), 255), Image.new("L", (128, 128))
    half.paste(255, (0, 0, 64, 128))
    made = pipe(PROMPT, image=picture, mask_image=everything, latents=z(), width=128, height=128).images[0]
    assert largest_difference(made, ours(PROMPT, seed=SEED).images[0]) <= 1
    calls = count_calls(pipe.unet)
    made = pipe(PROMPT, image=picture, mask_image=half, latents=z(), width=128, height=128).images[0]
    assert calls == [1]
    right = (80, 0, 128, 128)
    through_vae = pipe(PROMPT, image=picture, mask_image=Image.new("L", (128, 128)), latents=z(), width=128, height=128)
    assert largest_difference(made.crop(right), through_vae.images[0].crop(right)) < 40
    assert largest_difference(made.crop((0, 0, 48, 128)), picture.crop((0, 0, 48, 128))) > 60


def test_guidance_that_is_on_all_the_same_is_told(parts: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    pipe = stock(parts, scheduler=OneStepScheduler())  # set by hand, without make_one_step
    pipe(PROMPT, latents=z(), guidance_scale=1.0)
    assert not caplog.records
    pipe(PROMPT, latents=z())
    assert [record.getMessage() for record in caplog.records] == [
        "this pipeline uses guidance, which spoils one step and doubles its time: give guidance_scale=1.0"
    ]


def test_the_bases_own_schedule_is_kept_for_other_schedulers(parts: dict[str, Any]) -> None:
    from diffusers import DDIMScheduler

    own = DDIMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, set_alpha_to_one=False)
    pipe = stock(parts, scheduler=own)
    make_one_step(pipe, OneStep(0.02, 998))
    assert (pipe.scheduler.config.alpha_T_squared, pipe.scheduler.config.timestep) == (0.02, 998)
    again = DDIMScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(again.alphas_cumprod, own.alphas_cumprod) and not again.config.set_alpha_to_one


def test_a_step_in_the_middle_is_refused(parts: dict[str, Any], ours: OneStepPipeline) -> None:
    pipe = stock(parts, "StableDiffusionImg2ImgPipeline")
    load_lorad(pipe, mini.lorad_path())
    with pytest.raises(ValueError, match=r"give strength=1\.0"):
        pipe(PROMPT, image=ours("a cat", seed=1).images[0], strength=0.5)


def test_ip_adapters_work_in_one_step(parts: dict[str, Any]) -> None:
    """Random weights: what counts is that the picture follows the embedding, in one call, with the LoRaD live."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    pipe = stock(parts)
    load_lorad(pipe, mini.lorad_path())
    width = pipe.unet.config.cross_attention_dim
    torch.manual_seed(0)
    state = {"image_proj": {}, "ip_adapter": {}}
    state["image_proj"]["proj.weight"] = torch.randn(4 * width, 32) * 0.1
    state["image_proj"]["proj.bias"] = torch.zeros(4 * width)
    state["image_proj"]["norm.weight"], state["image_proj"]["norm.bias"] = torch.ones(width), torch.zeros(width)
    key = 1
    for name, processor in pipe.unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            module = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for one in ("to_k_ip", "to_v_ip"):
                state["ip_adapter"][f"{key}.{one}.weight"] = torch.randn(module.to_k.out_features, width) * 0.1
        key += 2 if name.endswith("attn2.processor") else 0
        del processor
    pipe.unet._load_ip_adapter_weights([state])
    assert any(isinstance(one, IPAdapterAttnProcessor2_0) for one in pipe.unet.attn_processors.values())
    pipe.set_ip_adapter_scale(1.0)
    pictures = []
    for value in (0.0, 3.0):
        embeds = [torch.full((1, 1, 32), value)]
        pictures.append(pipe(PROMPT, latents=z(), ip_adapter_image_embeds=embeds).images[0])
    assert largest_difference(*pictures) > 5


def test_saved_networks_hold_the_bases_tensors_alone(parts: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    pipe = stock(parts)
    before = weights_of(pipe.unet)
    load_lorad(pipe, mini.lorad_path())
    pipe.save_pretrained(tmp_path)
    assert equal(before, weights_of(UNet2DConditionModel.from_pretrained(tmp_path / "unet")))
    assert isinstance(StableDiffusionPipeline.from_pretrained(tmp_path).scheduler, OneStepScheduler)
    pipe.unet.load_state_dict(before)  # strictly: the live adapter is no part of it


def test_strengths_scale_the_angles_and_zero_is_the_base(parts: dict[str, Any]) -> None:
    pipe = stock(parts)
    make_one_step(pipe)
    bare = pipe(PROMPT, latents=z(), output_type="np").images
    load_lorad(pipe, mini.lorad_path(), "student", strength=0.0)
    assert (pipe(PROMPT, latents=z(), output_type="np").images == bare).all()
    set_strengths(pipe, {"student": 0.5})
    half = pipe(PROMPT, latents=z(), output_type="np").images
    load_lorad(pipe, mini.lorad_path(), "other", strength=0.25)
    set_strengths(pipe, {"student": 0.25})
    assert abs(pipe(PROMPT, latents=z(), output_type="np").images - half).max() < 1e-3
    with pytest.raises(ValueError, match=r"no LoRaD named 'third'.*student, other"):
        set_strengths(pipe, {"third": 1.0})


def test_fused_is_live_and_comes_back(parts: dict[str, Any]) -> None:
    pipe = stock(parts)
    before = weights_of(pipe.unet)
    load_lorad(pipe, mini.lorad_path(), strength=0.8)
    live = pipe(PROMPT, latents=z(), output_type="np").images
    fused = fuse_lorad(pipe)
    assert abs(pipe(PROMPT, latents=z(), output_type="np").images - live).max() < 1e-3
    assert not equal(before, weights_of(pipe.unet))
    fused.restore()
    assert equal(before, weights_of(pipe.unet))
    make_many_step(pipe)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


def test_hotswap_compiles_nothing_anew(tmp_path: Path) -> None:
    kit = make_kit(tmp_path, "sd15")
    unet = networks.make_networks(kit.folder)["unet"].eval()
    first = LoRaD.load(kit.lorad)
    smaller = networks.random_lorad(unet, rank=2)
    smaller.metadata = first.metadata
    pipe = type("Holder", (), {"unet": unet, "scheduler": None})()
    load_lorad(pipe, first)
    compiles: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiles.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(unet, backend=backend)
    given = (torch.randn(1, 4, 8, 8), torch.tensor(999), torch.randn(1, 77, unet.config.cross_attention_dim))
    with torch.no_grad():
        one = compiled(*given).sample
        count = len(compiles)
        hotswap_lorad(pipe, smaller)
        two = compiled(*given).sample
        assert len(compiles) == count > 0
        unload_lorad(pipe)
        load_lorad(pipe, smaller)
        torch.testing.assert_close(two, unet(*given).sample, rtol=0, atol=1e-5)
        assert (one - two).abs().max() > 1e-4
    with pytest.raises(ValueError, match="a larger rank"):
        hotswap_lorad(pipe, first)


@pytest.mark.parametrize(
    "options, x, output, expected",
    [
        ({}, 1.0, 0.5, (1.0 - (1 - 0.0047) ** 0.5 * 0.5) / 0.0047**0.5),
        ({"prediction_type": "v_prediction"}, 1.0, 0.5, 0.0047**0.5 - (1 - 0.0047) ** 0.5 * 0.5),
        ({"prediction_type": "sample"}, 1.0, 0.5, 0.5),
        ({"prediction_type": "flow"}, 1.0, 0.25, 0.75),
        ({"timestep": 399, "alpha_T_squared": 0.4261}, 1.0, 0.5, (1.0 - (1 - 0.4261) ** 0.5 * 0.5) / 0.4261**0.5),
        (
            {"timestep": 625, "alpha_T_squared": 0.1378, "input_scale": "sigma"},
            1.0,
            0.5,
            ((1 - 0.1378) ** 0.5 - (1 - 0.1378) ** 0.5 * 0.5) / 0.1378**0.5,
        ),
    ],
    ids=["wadi", "v", "lightning", "flow", "dmd2", "sid-lsg"],
)
def test_every_parametrisation(options: dict[str, Any], x: float, output: float, expected: float) -> None:
    scheduler = OneStepScheduler(**options)
    scheduler.set_timesteps(50)
    sample = torch.full((1, 4, 2, 2), x)
    scale = (1 - 0.1378) ** 0.5 if options.get("input_scale") else 1.0
    assert scheduler.timesteps.tolist() == [options.get("timestep", 999)]
    torch.testing.assert_close(scheduler.scale_model_input(sample), sample * scale)
    made = scheduler.step(torch.full_like(sample, output), 999, sample).prev_sample
    torch.testing.assert_close(made, torch.full_like(sample, expected))
    again = OneStepScheduler.from_config(scheduler.config)
    assert dict(again.config) == dict(scheduler.config)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"prediction_type": "score"}, "prediction_type"),
        ({"input_scale": "two"}, "input_scale"),
        ({"alpha_T_squared": 1.5}, "alpha_T"),
        ({"timestep": 1000}, "timestep"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        OneStepScheduler(**options)


def test_schedules_that_differ_are_refused_together(parts: dict[str, Any]) -> None:
    pipe = stock(parts)
    load_lorad(pipe, mini.lorad_path())
    other = LoRaD.load(mini.lorad_path())
    other.metadata = type(other.metadata)(other.metadata.architecture, 0.1, 625)
    assert other.one_step == OneStep(0.1, 625)
    with pytest.raises(ValueError, match="another one-step schedule"):
        load_lorad(pipe, other, "other")
