"""The pipeline: every kind of base, one network call, the formula, seeds, adapters, prompts, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from wadi_core import LoRaD, OneStep, OneStepPipeline, configs, pictures
from wadi_core import base as bases
from wadi_core.lorad import Metadata
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.lorad.layers import adapter_key, student_layers
from wadi_core.lorad.rotation import rotate
from wadi_core.pipeline import noise
from wadi_core.settings import Settings

PROMPTS = ["a red apple", "a cat and a bicycle", "a frog on top of a pizza!", "", "two owls"]


@dataclass
class Kit:
    """One small base in every form, and a one-step adapter for it."""

    architecture: str
    folder: Path
    single_file: Path
    lorad: Path

    def load(self, form: str = "folder", **options: object) -> OneStepPipeline:
        base = self.folder if form == "folder" else self.single_file
        options = {"lorad": self.lorad, "device": "cpu", "config": self.folder if form != "folder" else None, **options}
        return OneStepPipeline.from_pretrained(base, **options)


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kit"), request.param)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("sd15"), "sd15")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def make_kit(place: Path, architecture: str, changes: dict | None = None, dtype: torch.dtype = torch.float32) -> Kit:
    folder = networks.write_settings(place / "base", architecture, changes or networks.small_settings(architecture))
    made = networks.make_networks(folder)
    weights = networks.states({part: network.to(dtype) for part, network in made.items()})
    networks.write_folder(folder, weights)
    single_file = networks.write_single_file(place / "base.safetensors", weights, folder)
    networks.random_lorad(made["unet"]).save(place / "one-step.safetensors")
    return Kit(architecture, folder, single_file, place / "one-step.safetensors")


def count_calls(network: nn.Module) -> list[int]:
    """A list that grows by the batch size at each call of a network."""
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    return sizes


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    """Of any channel of any pixel, from 0 to 255."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


# What it computes


def test_the_picture_is_what_the_formula_says_of_diffusers_own_networks(kit: Kit) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(kit.folder / "unet")
    vae = AutoencoderKL.from_pretrained(kit.folder / "vae")
    text_encoder = CLIPTextModel.from_pretrained(kit.folder / "text_encoder")
    lorad = LoRaD.load(kit.lorad)
    with torch.no_grad():
        for path in student_layers(unet):
            theta_a, theta_b = lorad.factors[adapter_key(path, "unet-custom")]
            layer = unet.get_submodule(path)
            layer.weight.copy_(rotate(layer.weight, theta_a.float() @ theta_b.float()))
        pad = {"sd15": 49407, "sd21": 0}[kit.architecture]
        ids = torch.tensor([[49406, 320, 736, 3055, 49407] + [pad] * 72])  # "a red apple"
        z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
        eps = unet(z, 999, encoder_hidden_states=text_encoder(ids).last_hidden_state).sample
        x0 = (z - math.sqrt(1 - 0.0047) * eps) / math.sqrt(0.0047)
        expected = pictures.to_pictures(vae.decode(x0 / 0.18215).sample)[0]
    made = kit.load()("a red apple", seed=7, return_latents=True)
    torch.testing.assert_close(made.latents, x0, rtol=0, atol=2e-4)
    assert largest_difference(made.images[0], expected) <= 1


def test_folder_and_single_file_are_the_same_network(kit: Kit) -> None:
    folder, single_file = kit.load("folder"), kit.load("file")
    for part in bases.PARTS:
        assert equal(weights_of(getattr(folder.base, part)), weights_of(getattr(single_file.base, part)))
    assert folder.base.architecture == single_file.base.architecture == "unet-custom"
    made = [pipe(PROMPTS[:2], seed=3) for pipe in (folder, single_file)]
    assert [image.tobytes() for image in made[0].images] == [image.tobytes() for image in made[1].images]


def test_open_clip_weights_mean_what_open_clip_computes(tmp_path: Path) -> None:
    """Against OpenCLIP's text tower written with torch's own attention; its last block must not be used."""
    kit = make_kit(tmp_path, "sd21")
    from safetensors.torch import load_file

    prefix = bases.LDM_OPEN_CLIP
    w = {name.removeprefix(prefix): tensor for name, tensor in load_file(kit.single_file).items() if name.startswith(prefix)}
    ids = torch.randint(0, 49408, (2, 77))
    x = w["token_embedding.weight"][ids] + w["positional_embedding"]
    mask = torch.full((77, 77), -torch.inf).triu(1)
    for block in range(2):
        p = f"transformer.resblocks.{block}."
        attention = nn.MultiheadAttention(32, 2, batch_first=True)
        attention.load_state_dict({name: w[p + "attn." + name] for name in attention.state_dict()})
        y = nn.functional.layer_norm(x, (32,), w[p + "ln_1.weight"], w[p + "ln_1.bias"])
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = nn.functional.layer_norm(x, (32,), w[p + "ln_2.weight"], w[p + "ln_2.bias"])
        y = nn.functional.gelu(nn.functional.linear(y, w[p + "mlp.c_fc.weight"], w[p + "mlp.c_fc.bias"]))
        x = x + nn.functional.linear(y, w[p + "mlp.c_proj.weight"], w[p + "mlp.c_proj.bias"])
    expected = nn.functional.layer_norm(x, (32,), w["ln_final.weight"], w["ln_final.bias"])
    text_encoder = kit.load("file").base.text_encoder
    torch.testing.assert_close(text_encoder(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "float16"])
def test_one_call_of_the_network_for_a_batch_in_every_number_format(kit: Kit, form: str, dtype: str) -> None:
    pipe = kit.load(form, dtype=dtype)
    assert {p.dtype for part in bases.PARTS for p in getattr(pipe.base, part).parameters()} == {pipe.dtype}
    calls = count_calls(pipe.base.unet)
    made = pipe(PROMPTS, batch=4, return_latents=True)
    assert calls == [4, 1]  # no second branch either: the batch is the pictures
    assert made.calls == 2 and made.seconds > 0 and len(made.images) == 5
    reference = kit.load(form)(PROMPTS, batch=5, return_latents=True)
    error = (made.latents - reference.latents).square().mean() / reference.latents.square().mean()
    assert error.sqrt() < {"fp32": 1e-5, "bf16": 0.1, "float16": 0.01}[dtype]


def test_a_batch_gives_the_pictures_that_each_gives_alone(kit: Kit) -> None:
    pipe = kit.load()
    together = pipe(PROMPTS, seed=40, batch=4, return_latents=True)
    alone = pipe(PROMPTS, seed=40, batch=1, return_latents=True)
    torch.testing.assert_close(together.latents, alone.latents, rtol=1e-4, atol=2e-4)
    for index, prompt in enumerate(PROMPTS):
        again = pipe(prompt, seed=40 + index, return_latents=True)
        assert torch.equal(again.latents[0], alone.latents[index])
        assert alone.settings[index] == again.settings[0]


def test_noise_is_that_of_a_generator_on_the_cpu_for_each_picture() -> None:
    z = noise([5, 6, 2**64 - 1], width=80, height=64)
    assert z.shape == (3, 4, 8, 10) and z.dtype == torch.float32
    for index, seed in enumerate([5, 6, 2**64 - 1]):
        generator = torch.Generator("cpu").manual_seed(seed)
        assert torch.equal(z[index], torch.randn(1, 4, 8, 10, generator=generator)[0])


def test_seeds_can_be_named(sd15: Kit) -> None:
    pipe = sd15.load()
    made = pipe("a cat", seeds=[9, 3])
    assert [(one.prompt, one.seed) for one in made.settings] == [("a cat", 9), ("a cat", 3)]
    assert largest_difference(made.images[1], pipe("a cat", seed=3).images[0]) <= 1
    with pytest.raises(ValueError, match="one seed for each"):
        pipe(["a", "b", "c"], seeds=[1, 2])


@pytest.mark.parametrize(("width", "height"), [(72, 64), (128, 88), (64, 120)])
def test_other_sizes_than_the_native_one(sd15: Kit, width: int, height: int) -> None:
    made = sd15.load()("a cat", width=width, height=height, return_latents=True)
    assert made.images[0].size == (width, height)
    assert made.latents.shape == (1, 4, height // 8, width // 8)
    assert sd15.load().native_size == (64, 64)


def test_progress_is_told_after_each_call(sd15: Kit) -> None:
    told: list[tuple[int, int]] = []
    sd15.load()(PROMPTS, batch=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_full_width_blocks_as_folder_and_single_file(tmp_path: Path) -> None:
    """One level of SD1.5's own width and text width, so that what depends on 320, 768 and 8 heads is met in CI."""
    kit = make_kit(tmp_path, "sd15", networks.FULL_WIDTH)
    for form in ("folder", "file"):
        for dtype in ("fp32", "bf16"):
            pipe = kit.load(form, dtype=dtype)
            calls = count_calls(pipe.base.unet)
            made = pipe("a red apple", return_latents=True)
            assert calls == [1] and made.latents.isfinite().all()
    assert pipe.base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.shape == (320, 768)


# Adapters


def test_another_strength_starts_from_the_very_bits_of_the_base(kit: Kit) -> None:
    bare = weights_of(kit.load(lorad=[]).base.unet)
    pipe = kit.load(strength=0.5)
    half = weights_of(pipe.base.unet)
    pipe.set_lorad(kit.lorad, strength=1.0)
    assert equal(weights_of(pipe.base.unet), weights_of(kit.load().base.unet))
    pipe.set_lorad((kit.lorad, 0.5))
    assert equal(weights_of(pipe.base.unet), half) and not equal(half, bare)
    pipe.set_lorad(None)
    assert equal(weights_of(pipe.base.unet), bare) and pipe.adapters == ()


def test_strength_0_touches_neither_weights_nor_sampling(sd15: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lorad = LoRaD.load(sd15.lorad)
    other = LoRaD(lorad.factors, Metadata(alpha_T_squared=0.02, timestep=999))
    pipe = sd15.load(lorad=[(other, 0.0), (lorad, 1.0)])  # they could not both be in use
    assert pipe.one_step == OneStep(0.0047)
    assert equal(weights_of(pipe.base.unet), weights_of(sd15.load().base.unet))
    caplog.clear()
    pipe.set_lorad(other, strength=0.0)
    assert equal(weights_of(pipe.base.unet), weights_of(sd15.load(lorad=[]).base.unet))
    assert "no one-step weights" in caplog.text and pipe.one_step == OneStep()


def test_angles_of_several_adapters_are_added(sd15: Kit) -> None:
    one = LoRaD.load(sd15.lorad)
    unet = sd15.load(lorad=[]).base.unet
    style = networks.random_lorad(unet, rank=2, seed=5, one_step=False)
    pipe = sd15.load(lorad=[(one, 1.0), (style, -0.7)])
    for path in student_layers(unet):
        key = adapter_key(path, "unet-custom")
        (a, b), (c, d) = one.factors[key], style.factors[key]
        theta = a.float() @ b.float() - 0.7 * (c @ d)
        torch.testing.assert_close(pipe.base.unet.get_submodule(path).weight, rotate(unet.get_submodule(path).weight, theta))
    assert [adapter.strength for adapter in pipe.adapters] == [1.0, -0.7]
    assert pipe.one_step == OneStep()


def test_adapters_that_cannot_be_used_leave_the_pipeline_as_it_was(sd15: Kit, tmp_path: Path) -> None:
    pipe = sd15.load()
    before, adapters = weights_of(pipe.base.unet), pipe.adapters
    lorad = LoRaD.load(sd15.lorad)
    for wrong, message in (
        (LoRaD(lorad.factors, Metadata(architecture="sd15")), "made for sd15"),
        ([lorad, LoRaD(lorad.factors, Metadata(alpha_T_squared=0.02, timestep=999))], "cannot be used together"),
        (LoRaD({"lora_unet_none": (torch.zeros(4, 1), torch.zeros(1, 2))}), "none of its 1 layers"),
        ([(lorad, math.nan)], "finite"),
        (tmp_path / "missing.safetensors", "no such file"),
    ):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            pipe.set_lorad(wrong)
        assert "\n" not in str(caught.value)
        assert equal(weights_of(pipe.base.unet), before) and pipe.adapters == adapters


def test_without_a_backup_the_strength_cannot_change(sd15: Kit) -> None:
    pipe = sd15.load(keep_base=False)
    before = weights_of(pipe.base.unet)
    with pytest.raises(ValueError, match="no backup was kept"):
        pipe.set_lorad(sd15.lorad, strength=0.5)
    assert equal(weights_of(pipe.base.unet), before)


def test_a_base_without_one_step_weights_draws_all_the_same_and_says_so(sd15: Kit, caplog: pytest.LogCaptureFixture) -> None:
    pipe = sd15.load(lorad=None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "\n" not in caplog.records[0].getMessage()
    assert len(pipe("a cat").images) == 1


def test_a_merged_one_step_network_is_one_by_what_its_file_or_its_user_says(
    sd15: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = networks.states(networks.make_networks(sd15.folder))
    metadata = {"wadi.alpha_T_squared": "0.02", "wadi.timestep": "998"}
    merged = networks.write_single_file(tmp_path / "merged.safetensors", weights, sd15.folder, metadata)
    pipe = OneStepPipeline.from_pretrained(merged, config=sd15.folder, device="cpu")
    assert pipe.one_step == OneStep(0.02, 998)
    assert pipe("a cat").settings[0].alpha_T_squared == 0.02
    assert sd15.load(lorad=None, alpha_T_squared=0.0046).one_step == OneStep(0.0046)
    assert not caplog.records
    with pytest.raises(ValueError, match="one-step network already"):
        OneStepPipeline.from_pretrained(merged, config=sd15.folder, device="cpu", lorad=sd15.lorad)


def test_a_network_that_returns_v(tmp_path: Path) -> None:
    kit = make_kit(tmp_path, "sd21")
    schedule = kit.folder / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps({**configs.read(schedule), "prediction_type": "v_prediction"}))
    pipe = kit.load(lorad=None, alpha_T_squared=0.0047)
    assert pipe.one_step.prediction_type == "v_prediction"
    made = pipe("a cat", seed=2, return_latents=True)
    with torch.no_grad():
        z = noise([2], 64, 64)
        v = pipe.base.unet(z, 999, encoder_hidden_states=pipe.encode(["a cat"])).sample
    torch.testing.assert_close(made.latents, math.sqrt(0.0047) * z - math.sqrt(1 - 0.0047) * v)


def test_another_base_than_the_one_trained_on_is_noted(sd15: Kit, caplog: pytest.LogCaptureFixture) -> None:
    from wadi_core.lorad.layers import network_sha256

    lorad = LoRaD.load(sd15.lorad)
    digest = network_sha256(sd15.load(lorad=[]).base.unet)
    caplog.set_level(logging.INFO)
    for checksum, notes in ((digest, 0), ("0" * 64, 1)):
        caplog.clear()
        sd15.load(lorad=LoRaD(lorad.factors, Metadata(alpha_T_squared=0.0047, timestep=999, base_sha256=checksum)))
        assert len(caplog.records) == notes


# Prompts


def test_prompts_become_the_tokens_that_each_base_was_trained_with(kit: Kit) -> None:
    pipe = kit.load()
    seen: list[Tensor] = []
    pipe.base.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["input_ids"]), with_kwargs=True
    )
    assert pipe.encode(["A red apple!", ""]).shape == (2, 77, 32)
    pad = {"sd15": 49407, "sd21": 0}[kit.architecture]
    # "!" in a prompt is the word 256, also where the token 0, which looks the same, fills up.
    assert seen[0].tolist() == [[49406, 320, 736, 3055, 256, 49407] + [pad] * 71, [49406, 49407] + [pad] * 75]


def test_a_prompt_that_is_too_long_is_cut_with_one_line(sd15: Kit, caplog: pytest.LogCaptureFixture) -> None:
    pipe = sd15.load()
    exact = " ".join(["apple"] * 75)
    assert torch.equal(pipe.encode([exact + " red cat"]), pipe.encode([exact]))
    assert [record.getMessage() for record in caplog.records] == ["a prompt has more than 75 tokens; left out is: red cat"]


def test_a_folder_with_its_own_vocabulary_and_settings_of_any_age(tmp_path: Path) -> None:
    kit = make_kit(tmp_path, "sd21")
    own = kit.folder / "tokenizer"
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(configs.TOKENIZER / name, own)
    token = {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    (own / "tokenizer_config.json").write_text(json.dumps({"pad_token": token, "tokenizer_class": "CLIPTokenizer"}))
    (own / "special_tokens_map.json").write_text(json.dumps({"pad_token": token}))
    pipe = kit.load()
    assert pipe.base.pad == 0
    assert pipe.base.tokenizer("hello!").input_ids == [49406, 3306, 256, 49407]


# Bases in every form that people have


def test_a_folder_in_shards_in_half_precision_or_pickled(sd15: Kit, tmp_path: Path) -> None:
    expected = weights_of(sd15.load(lorad=[]).base.unet)
    names = sorted(expected)
    folder = Path(shutil.copytree(sd15.folder, tmp_path / "base"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()

    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        write_safetensors(folder / "unet" / file, {name: expected[name] for name in held})
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in shards.items() for name in held}}))
    assert equal(weights_of(bases.load(folder, torch.device("cpu"), torch.float32).unet), expected)
    assert bases.unet_shapes(folder) == {name: tuple(tensor.shape) for name, tensor in expected.items()}

    index.unlink()
    torch.save(expected, folder / "unet" / "diffusion_pytorch_model.bin")
    assert equal(weights_of(bases.load(folder, torch.device("cpu"), torch.float32).unet), expected)

    half = {name: tensor.half() for name, tensor in expected.items()}
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", half)
    assert equal(weights_of(bases.load(folder, torch.device("cpu"), torch.float16).unet), half)


def test_the_names_that_old_folders_give_to_the_autoencoders_attention(sd15: Kit, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd15.folder, tmp_path / "base"))
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = weights_of(sd15.load().base.vae)
    old = {new: before for before, new in bases.OLD_ATTENTION.items()}
    renamed = {bases._renamed(name, old): tensor for name, tensor in weights.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in renamed
    write_safetensors(file, renamed)
    assert equal(weights_of(bases.load(folder, torch.device("cpu"), torch.float32).vae), weights)


@pytest.mark.parametrize("architecture", ["sd15", "sd21", "wadi-mini"])
def test_a_full_size_single_file_is_recognised_from_its_header(architecture: str, tmp_path: Path) -> None:
    """All names and shapes of a whole U-Net, through diffusers' converter and back, without its gigabytes."""
    settings = configs.read(configs.folder(architecture) / "unet" / "config.json")
    shapes = {
        name: tuple(t.shape)
        for name, t in bases._empty_network("unet", configs.folder(architecture) / "unet" / "config.json").state_dict().items()
    }
    file = tmp_path / "big.safetensors"
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        ldm = f"model.diffusion_model.{networks.ldm_unet_name(name, settings)}"
        header[ldm] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    assert len(header) == len(shapes)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)  # a hole: it takes no room on the disk
    assert bases.find(file).settings == configs.folder(architecture)
    assert bases.unet_shapes(file) == shapes
    assert bases.detect_architecture(shapes) == architecture


def test_refused_bases(sd15: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(name: str) -> Path:
        return Path(shutil.copytree(sd15.folder, tmp_path / name))

    def file(name: str, content: dict[str, Tensor]) -> Path:
        write_safetensors(tmp_path / name, content)
        return tmp_path / name

    weights = networks.states(networks.make_networks(sd15.folder))
    one = torch.zeros(1)

    xl = folder("xl")
    (xl / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    no_index = folder("no-index")
    (no_index / "model_index.json").write_text("{")
    part_missing = folder("part-missing")
    shutil.rmtree(part_missing / "vae")
    weights_missing = folder("weights-missing")
    (weights_missing / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    settings_wrong = folder("settings-wrong")
    (settings_wrong / "unet" / "config.json").write_text(json.dumps({"block_out_channels": "wide"}))
    t5 = folder("t5")
    (t5 / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    tensor_missing = folder("tensor-missing")
    write_safetensors(
        tensor_missing / "unet" / "diffusion_pytorch_model.safetensors",
        {name: tensor for name, tensor in weights["unet"].items() if name != "conv_in.bias"},
    )
    tensor_extra = folder("tensor-extra")
    write_safetensors(tensor_extra / "unet" / "diffusion_pytorch_model.safetensors", {**weights["unet"], "more.weight": one})
    other_shape = folder("other-shape")
    write_safetensors(
        other_shape / "unet" / "diffusion_pytorch_model.safetensors", {**weights["unet"], "conv_in.bias": torch.zeros(33)}
    )
    widths = networks.small_settings("sd15")
    inpainting = make_kit(tmp_path / "in", "sd15", {**widths, "unet": {**widths["unet"], "in_channels": 9}})
    mismatch = folder("mismatch")
    shutil.rmtree(mismatch / "text_encoder")
    wide_text = {**networks.SMALL["text_encoder"], "hidden_size": 64}
    wide = make_kit(tmp_path / "wide", "sd21", {**networks.small_settings("sd21"), "text_encoder": wide_text,
                                                "unet": {**widths["unet"], "cross_attention_dim": 64}})  # fmt: skip
    shutil.copytree(wide.folder / "text_encoder", mismatch / "text_encoder")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(sd15.single_file.read_bytes()[:-100])
    text = tmp_path / "text.safetensors"
    text.write_text("this is no network at all")
    pickle = tmp_path / "old.ckpt"
    pickle.write_bytes(b"\x80\x02")

    cases = [
        (tmp_path / "nothing", "no such file or folder"),
        ("runwayml/stable-diffusion-v1-5", "nothing is downloaded"),
        (tmp_path, "unet/config.json is missing"),
        (xl, "StableDiffusionXLPipeline"),
        (no_index, "not a JSON file"),
        (part_missing, "vae/config.json is missing"),
        (weights_missing, "diffusion_pytorch_model.safetensors is missing"),
        (settings_wrong, "no network can be built"),
        (t5, "a text encoder of the kind t5"),
        (tensor_missing, "conv_in.bias is missing"),
        (tensor_extra, "more.weight has no place"),
        (other_shape, "conv_in.bias has another shape"),
        (inpainting.folder, "9 input channels"),
        (mismatch, "do not belong together"),
        (cut, "cut short"),
        (text, "no .safetensors file"),
        (pickle, "convert this one first"),
        (sd15.lorad, "an adapter, not a base"),
        (file("lora.safetensors", {"lora_unet_x.lora_down.weight": one}), "an adapter, not a base"),
        (file("unet.safetensors", {"down_blocks.0.resnets.0.norm1.weight": one}), "a U-Net alone"),
        (file("other.safetensors", {"encoder.weight": one}), "no checkpoint of Stable Diffusion"),
        (sd15.single_file, "no settings are known for a U-Net of these widths"),
    ]  # fmt: skip
    for base, message in cases:
        with pytest.raises((ValueError, OSError), match=message) as caught:
            OneStepPipeline.from_pretrained(base, device="cpu")
        assert "\n" not in str(caught.value), base

    pruned = {name: t for name, t in networks.states(networks.make_networks(sd15.folder)).items()}
    without_text = tmp_path / "no-text.safetensors"
    networks.write_single_file(without_text, {**pruned, "text_encoder": {}}, sd15.folder)
    content = bases.checkpoint.read_tensors(bases.checkpoint.read_header(without_text))
    write_safetensors(without_text, {name: t for name, t in content.items() if not name.startswith(bases.LDM_CLIP)})
    with pytest.raises(ValueError, match="holds no text encoder"):
        OneStepPipeline.from_pretrained(without_text, config=sd15.folder, device="cpu")


def test_a_lorad_of_another_network_is_refused_before_anything_is_made(sd15: Kit, tmp_path: Path) -> None:
    wide = make_kit(tmp_path, "sd21")
    lorad = LoRaD.load(wide.lorad)
    with pytest.raises(ValueError, match="does not fit this network") as caught:
        sd15.load(lorad=LoRaD(lorad.factors, Metadata(architecture="sd21")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 65}, "width must be divisible by 8, not 65: try 64 or 72"),
        ({"height": 100}, "height must be divisible by 8"),
        ({"width": 0}, "width must lie from 64"),
        ({"width": 10**9}, "width must lie from 64"),
        ({"seed": -1}, "seed must lie from 0"),
        ({"seed": 2**64 - 1}, "seed must lie from 0"),  # the second picture's
        ({"seed": 1.5}, "seed must be of type int"),
        ({"prompts": []}, "needs a prompt"),
        ({"prompts": ["a", 3]}, "prompt must be of type str"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_calls_that_are_refused_before_the_network_is_asked(sd15: Kit, options: dict, message: str) -> None:
    pipe = sd15.load()
    calls = count_calls(pipe.base.unet)
    with pytest.raises(ValueError, match=message) as caught:
        pipe(**{"prompts": ["a", "b"], **options})
    assert calls == [] and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"), [("device", "toaster"), ("device", "meta"), ("dtype", "int8"), ("dtype", torch.int8)]
)
def test_devices_and_number_formats_that_there_are_not(sd15: Kit, option: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        sd15.load(**{option: value})
    assert "\n" not in str(caught.value)


def test_moving_to_a_device_keeps_what_is_fused(sd15: Kit) -> None:
    pipe = sd15.load()
    picture = pipe("a cat").images[0].tobytes()
    assert pipe.to("cpu")("a cat").images[0].tobytes() == picture
    pipe.set_lorad(None)
    assert equal(weights_of(pipe.base.unet), weights_of(sd15.load(lorad=[]).base.unet))


# What a picture says of itself


def test_a_picture_carries_all_that_makes_it_again(sd15: Kit, tmp_path: Path) -> None:
    pipe = sd15.load(strength=0.5)
    prompts = ["a cat, café: “naïve” 😀", "second\nline"]
    paths = pipe(prompts, seed=2**64 - 2, width=72).save(tmp_path / "new" / "deep" / "p.png")
    assert [path.name for path in paths] == ["p-0001.png", "p-0002.png"]
    for path, prompt in zip(paths, prompts, strict=True):
        said = pictures.read_settings(path)
        assert (said.prompt, said.width, said.height, said.alpha_T_squared) == (prompt, 72, 64, 0.0047)
        assert said.lorad[0].file == "one-step.safetensors" and said.lorad[0].strength == 0.5
        assert str(tmp_path) not in said.to_json()  # no folder of the user's machine
        with Image.open(path) as picture:
            assert largest_difference(picture, next(pipe.run([said])).images[0]) <= 1  # alone, no longer in a batch
            text = picture.info[pictures.TEXT_KEY]
        assert text.startswith(prompt + "\nSteps: 1, Sampler: WaDi one-step, CFG scale: 1, Seed: 184467440737095516")
    assert Settings.from_json(said.to_json()) == said
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["p-0001.png", "p-0002.png"]


# The full size, as people use it


@pytest.fixture
def big_place(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes, which do not stay."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(
    ("architecture", "runs"),
    [
        ("sd15", [("folder", "fp32"), ("file", "fp32"), ("folder", "bf16"), ("file", "bf16")]),
        ("sd21", [("folder", "fp32"), ("file", "bf16")]),
    ],
)
def test_full_size_at_512_on_the_cpu(architecture: str, runs: list[tuple[str, str]], big_place: Path) -> None:
    kit = make_kit(big_place, architecture, {"unet": {}}, torch.float16)
    made = {}
    for form, dtype in runs:
        base = kit.folder if form == "folder" else kit.single_file  # its settings are found by its widths
        pipe = OneStepPipeline.from_pretrained(base, kit.lorad, device="cpu", dtype=dtype, keep_base=False)
        assert pipe.base.architecture == architecture and pipe.native_size == (512, 512)
        calls = count_calls(pipe.base.unet)
        result = pipe("a red apple", seed=1, return_latents=True)
        assert calls == [1] and result.images[0].size == (512, 512)
        made[form, dtype] = result
        sys.stdout.write(f"{architecture} as a {form} in {dtype}: one network call, {result.seconds:.1f} s\n")
        del pipe
    assert len({result.images[0].tobytes() for (_, dtype), result in made.items() if dtype == "fp32"}) == 1
    exact, rounded = (next(r.latents for (_, of), r in made.items() if of == dtype) for dtype in ("fp32", "bf16"))
    assert (exact - rounded).norm() < 0.1 * exact.norm()
