"""Bases that other people's tools write: what would draw noise or nothing is refused by name, the rest is understood."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import make_networks, small_settings, states
from pipeline_kit import Kit, make_kit
from torch import Tensor

from wadi_core import OneStepPipeline, configs
from wadi_core.lorad.checkpoint import read_header, read_tensors, write_safetensors
from wadi_core.lorad.merge import merge

pytestmark = pytest.mark.usefixtures("no_network")

State = dict[str, Tensor]

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
LAYER = UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def content(sd15: Kit) -> State:
    return read_tensors(read_header(sd15.single_file))


def broken(name: str, value: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        tensor = state[name].clone()
        tensor.view(-1)[-1] = value
        return {**state, name: tensor}

    return change


def linears(change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    """Another form of every linear weight of the U-Net."""
    return lambda state: {k: change(t) if k.startswith(UNET) and t.ndim == 2 else t for k, t in state.items()}


def codes(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda t: (t / (t.abs().max() / torch.finfo(dtype).max)).to(dtype)


def with_scale(state: State) -> State:
    """Float8 codes with a scale beside each, and what ComfyUI's files say besides."""
    found = {**state, UNET + "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name in [name for name, t in state.items() if name.startswith(UNET) and t.ndim == 2]:
        scale = state[name].abs().max() / 448
        found |= {name: (state[name] / scale).to(torch.float8_e4m3fn), name.replace(".weight", ".scale_weight"): scale}
    return found


def more(**tensors: Tensor) -> Callable[[State], State]:
    return lambda state: {**state, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


def entry(channels: int) -> Callable[[State], State]:
    name = UNET + "input_blocks.0.0.weight"
    return lambda state: {**state, name: torch.zeros(state[name].shape[0], channels, 3, 3)}


def named(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.zeros(shape)}


ONE = torch.zeros(1)
NONE = torch.empty(0)

REFUSED_FILES = {
    "NaN in a linear layer": (broken(LAYER, float("nan")), {}, "attn1.to_q.weight holds NaN or Inf"),
    "Inf in a linear layer": (broken(LAYER, float("inf")), {}, "attn1.to_q.weight holds NaN or Inf"),
    "NaN in a bias": (broken(UNET + "out.2.bias", float("nan")), {}, "out.2.bias holds NaN or Inf"),
    "-Inf in the autoencoder": (broken(VAE + "decoder.conv_out.bias", -float("inf")), {}, "conv_out.bias holds NaN or Inf"),
    "NaN in the text encoder": (
        broken(TEXT + "text_model.final_layer_norm.weight", float("nan")), {}, "final_layer_norm.weight holds NaN or Inf",
    ),
    "NaN in float16": (
        lambda s: {k: t.half() for k, t in broken(LAYER, float("nan"))(s).items()}, {}, "to_q.weight holds NaN",
    ),
    "NaN in bfloat16": (
        lambda s: {k: t.bfloat16() for k, t in broken(LAYER, float("nan"))(s).items()}, {}, "to_q.weight holds NaN",
    ),
    "NaN in float8": (
        lambda s: {**s, LAYER: broken(LAYER, float("nan"))(s)[LAYER].to(torch.float8_e4m3fn)}, {}, "to_q.weight holds NaN",
    ),
    "int8 without a scale": (linears(lambda t: t.mul(127).to(torch.int8)), {}, "is stored as int8"),
    "uint8": (linears(lambda t: t.mul(127).abs().to(torch.uint8)), {}, "is stored as uint8"),
    "int32": (linears(lambda t: t.mul(127).to(torch.int32)), {}, "is stored as int32"),
    "bool": (linears(lambda t: t > 0), {}, "is stored as bool"),
    "e4m3 codes without a scale": (linears(codes(torch.float8_e4m3fn)), {}, "float8_e4m3fn codes without their scale"),
    "e5m2 codes without a scale": (linears(codes(torch.float8_e5m2)), {}, "float8_e5m2 codes without their scale"),
    "bitsandbytes": (named(LAYER + ".absmax", 4), {}, "absmax"),
    "LCM": (named(UNET + "time_embed.cond_proj.weight", 32, 256), {}, "latent consistency model"),
    "SDXL or unCLIP": (named(UNET + "label_emb.0.0.weight", 4, 4), {}, "Stable Diffusion XL"),
    "edm_mean": (more(edm_mean=ONE), {}, "EDM"),
    "edm_vpred": (more(edm_vpred__sigma_max=ONE), {}, "EDM"),
    "ztsnr": (more(v_pred=NONE, ztsnr=NONE), {}, "zero terminal SNR"),
    "ss_zero_terminal_snr": (more(), {"ss_zero_terminal_snr": "True"}, "zero terminal SNR"),
    "modelspec says sample": (more(), {"modelspec.prediction_type": "sample"}, "predicts sample"),
    "a mark against the metadata": (more(v_pred=NONE), {"modelspec.prediction_type": "epsilon"}, "contradicts itself"),
    "upscaler": (named("low_scale_model.sqrt_alphas_cumprod", 4), {}, "x4 upscaler"),
    "video": (named(UNET + "input_blocks.1.1.time_stack.0.weight", 4), {}, "a video network"),
    "GLIGEN": (named(UNET + "position_net.linears.0.weight", 4, 4), {}, "GLIGEN"),
    "a ControlNet beside it": (named("control_model.input_hint_block.0.weight", 4), {}, "a ControlNet"),
    "an adapter beside it": (named("lora_unet_x.alpha"), {}, "lora_unet_x.alpha has no place"),
    "an unknown part": (named("refiner.weight", 2), {}, "refiner.weight has no place"),
    "an unknown layer of the U-Net": (named(UNET + "gate.weight", 2, 2), {}, "gate.weight has no place"),
    "an unknown layer of the autoencoder": (named(VAE + "quantize.embedding.weight", 2, 2), {}, "quantize.embedding.weight"),
    "another text encoder's layer": (named(TEXT + "text_model.adapter.weight", 2, 2), {}, "adapter.weight has no place"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_FILES)
def test_a_single_file_that_would_draw_noise_is_refused_by_name(kind: str, sd15: Kit, content: State, tmp_path: Path) -> None:
    change, metadata, message = REFUSED_FILES[kind]
    write_safetensors(tmp_path / "strange.safetensors", change(content), metadata)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        OneStepPipeline.from_pretrained(
            tmp_path / "strange.safetensors", sd15.lorad, config=sd15.folder, device="cpu", precision="exact"
        )
    assert "\n" not in str(caught.value) and "strange.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("channels", "message"), [(5, "depth"), (7, "upscaler"), (8, "InstructPix2Pix"), (9, "inpainting"), (12, "of another kind")]
)
def test_another_number_of_input_channels_is_called_what_it_is(
    channels: int, message: str, content: State, tmp_path: Path
) -> None:
    write_safetensors(tmp_path / "strange.safetensors", entry(channels)(content))
    with pytest.raises(ValueError, match=message):
        OneStepPipeline.from_pretrained(tmp_path / "strange.safetensors", device="cpu", precision="exact")


HARMLESS = {
    "averages of training": named("model_ema.diffusion_modelout2bias", 4),
    "counters and the optimizer": more(global_step=ONE, optimizer__state__0=ONE, model_ema__decay=ONE),
    "tables of the schedule": more(alphas_cumprod=torch.zeros(1000), betas=torch.zeros(1000), posterior_variance=ONE),
    "sgm's sigmas": more(denoiser__sigmas=torch.zeros(1000)),
    "a safety checker": named("safety_checker.vision_model.weight", 4, 4),
    "the loss of the autoencoder": named(VAE + "loss.discriminator.main.0.weight", 4),
    "the half of CLIP that looks": named(TEXT + "vision_model.embeddings.class_embedding", 4),
    "CLIP's projection": more(**{TEXT.replace(".", "__") + "text_projection__weight": torch.zeros(4, 4)}),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_says_nothing_of_pictures_is_left_out(kind: str, sd15: Kit, content: State, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "more.safetensors", HARMLESS[kind](content))
    made = OneStepPipeline.from_pretrained(
        tmp_path / "more.safetensors", sd15.lorad, config=sd15.folder, device="cpu", precision="exact"
    )
    expected = sd15.load("file").base
    for part in ("unet", "vae", "text_encoder"):
        theirs, ours = getattr(expected, part).state_dict(), getattr(made.base, part).state_dict()
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize(
    ("form", "change"),
    [("plain float8", linears(lambda t: t.to(torch.float8_e4m3fn))), ("with its scale", with_scale)],
)
def test_float8_is_read_as_its_values(
    form: str, change: Callable[[State], State], sd15: Kit, content: State, tmp_path: Path
) -> None:
    write_safetensors(tmp_path / "small.safetensors", change(content))
    unet = OneStepPipeline.from_pretrained(
        tmp_path / "small.safetensors", [], config=sd15.folder, device="cpu", precision="exact"
    ).base.unet
    weights, exact = unet.state_dict(), sd15.load("file", lorad=[]).base.unet.state_dict()
    for name, tensor in exact.items():
        assert (weights[name] - tensor).abs().max() <= 0.07 * tensor.abs().max(), (form, name)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [({"v_pred": NONE}, {}), ({}, {"modelspec.prediction_type": "v"}), ({}, {"modelspec.predict_key": "v"})],
    ids=["mark", "modelspec", "predict_key"],
)
def test_a_single_file_that_predicts_v_is_understood(
    tensors: State, metadata: dict[str, str], sd15: Kit, content: State, tmp_path: Path
) -> None:
    file = tmp_path / "velocity.safetensors"
    write_safetensors(file, {**content, **tensors}, metadata)
    bare = OneStepPipeline.from_pretrained(
        file, [], config=sd15.folder, device="cpu", alpha_T_squared=0.0047, precision="exact"
    )
    assert bare.one_step.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="predicts v_prediction by its own settings, and the one-step weights are for epsilon"):
        OneStepPipeline.from_pretrained(file, sd15.lorad, config=sd15.folder, device="cpu", precision="exact")
    with pytest.raises(ValueError, match="predicts v_prediction, and the LoRaD is for epsilon"):
        merge(file, [(sd15.lorad, 1.0)], tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()


def settings(part: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps({**configs.read(path), **values}))

    return change


def pipeline_class(name: str) -> Callable[[Path], None]:
    return lambda folder: Path(folder / "model_index.json").write_text(json.dumps({"_class_name": name})) and None


def pickled(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        state = read_tensors(read_header(file))
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        torch.save({**state, name: change(state[name])}, file.with_suffix(".bin"))
        file.unlink()

    return write


REFUSED_FOLDERS = {
    "zero terminal SNR": (settings("scheduler", rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    "predicts the sample": (settings("scheduler", prediction_type="sample"), "predicts sample"),
    "a linear schedule": (settings("scheduler", beta_schedule="linear"), "another schedule"),
    "a cosine schedule": (settings("scheduler", beta_schedule="squaredcos_cap_v2"), "another schedule"),
    "an unknown schedule": (settings("scheduler", beta_schedule="sigmoid?"), "no noise schedule can be made"),
    "other ends of the schedule": (settings("scheduler", beta_end=0.02), "another schedule"),
    "betas of its own": (settings("scheduler", trained_betas=[0.001] * 1000), "another schedule"),
    "100 timesteps": (settings("scheduler", num_train_timesteps=100), "1000 timesteps"),
    "flow matching": (settings("scheduler", _class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatchEuler"),
    "EDM": (settings("scheduler", _class_name="EDMEulerScheduler"), "EDMEulerScheduler"),
    "LCM": (settings("unet", time_cond_proj_dim=256), "latent consistency model"),
    "class embedding": (settings("unet", class_embed_type="projection"), "class embedding"),
    "classes": (settings("unet", num_class_embeds=1000), "upscaler"),
    "SDXL's U-Net": (settings("unet", addition_embed_type="text_time"), "Stable Diffusion XL"),
    "image prompt": (settings("unet", encoder_hid_dim_type="ip_image_proj"), "IP-Adapter"),
    "pickled NaN": (pickled(lambda t: t / 0), "attn1.to_q.weight holds NaN or Inf"),
    "pickled complex": (pickled(lambda t: t.to(torch.complex64)), "stored as complex64"),
    "pickled int8": (pickled(lambda t: t.to(torch.int8)), "stored as int8"),
    **{
        name: (pipeline_class(name), what)
        for name, what in {
            "StableUnCLIPImg2ImgPipeline": "unCLIP",
            "StableDiffusionLDM3DPipeline": "LDM3D",
            "StableDiffusionUpscalePipeline": "upscaler",
            "StableDiffusionLatentUpscalePipeline": "upscaler",
            "StableVideoDiffusionPipeline": "a video network",
            "StableDiffusionXLPipeline": "Stable Diffusion XL",
            "StableDiffusionXLImg2ImgPipeline": "refiner",
            "StableDiffusion3Pipeline": "Stable Diffusion 3",
            "FluxPipeline": "Flux",
            "PixArtSigmaPipeline": "PixArt-sigma",
            "PixArtAlphaPipeline": "PixArt-alpha",
            "StableDiffusionInstructPix2PixPipeline": "InstructPix2Pix",
            "AudioLDMPipeline": "sound",
            "StableAudioPipeline": "sound",
            "LatentConsistencyModelPipeline": "latent consistency",
            "StableDiffusionDepth2ImgPipeline": "depth",
            "KandinskyV22Pipeline": "Kandinsky",
            "AnimateDiffPipeline": "video",
            "NewThingPipeline": "another kind of model",
        }.items()
    },
}


@pytest.mark.parametrize("kind", REFUSED_FOLDERS)
def test_a_folder_of_another_kind_is_called_what_it_is(kind: str, sd15: Kit, tmp_path: Path) -> None:
    change, message = REFUSED_FOLDERS[kind]
    folder = Path(shutil.copytree(sd15.folder, tmp_path / "strange"))
    change(folder)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        OneStepPipeline.from_pretrained(folder, sd15.lorad, device="cpu", precision="exact")
    assert "\n" not in str(caught.value) and "strange" in str(caught.value)


def test_an_autoencoder_with_depth_is_refused(tmp_path: Path) -> None:
    """As LDM3D has it, whose U-Net is Stable Diffusion's."""
    changes = small_settings("sd15")
    changes["vae"] = {**changes["vae"], "in_channels": 6, "out_channels": 6}
    kit = make_kit(tmp_path, "sd15", changes)
    with pytest.raises(ValueError, match="pictures of 6 channels"):
        kit.load()


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_how_a_scheduler_spaces_its_steps_does_not_matter_in_one(spacing: str, sd15: Kit, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd15.folder, tmp_path / "spaced"))
    settings("scheduler", timestep_spacing=spacing)(folder)
    pipe = OneStepPipeline.from_pretrained(folder, sd15.lorad, device="cpu", precision="exact")
    assert pipe("a cat", seed=1).images[0].tobytes() == sd15.load()("a cat", seed=1).images[0].tobytes()


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_picture_that_is_not_finite_is_an_error(part: str, sd15: Kit) -> None:
    pipe = sd15.load()
    layer = pipe.base.unet.conv_out if part == "unet" else pipe.base.vae.decoder.conv_out
    layer.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        pipe("a cat")


def test_numbers_too_large_for_half_precision_are_told_before_anything_is_drawn(sd15: Kit, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd15.folder, tmp_path / "large"))
    weights = states(make_networks(folder))["unet"]
    weights["conv_out.bias"] = weights["conv_out.bias"] + 1e5
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", weights)
    with pytest.raises(ValueError, match="conv_out.bias is too large for float16"):
        OneStepPipeline.from_pretrained(folder, sd15.lorad, device="cpu", dtype="fp16")
    assert OneStepPipeline.from_pretrained(folder, sd15.lorad, device="cpu", dtype="fp32").adapters
