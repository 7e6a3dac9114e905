"""The pipeline: every kind of base, one network call, the formula, seeds, adapters, prompts, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import networks
import pytest
import torch
from PIL import Image
from pipeline_kit import PROMPTS, Kit, count_calls, equal, largest_difference, make_kit, weights_of
from torch import Tensor, nn

from wadi_core import LoRaD, OneStep, OneStepPipeline, configs, pictures
from wadi_core import base as bases
from wadi_core.lorad import Metadata
from wadi_core.lorad.layers import adapter_key, student_layers
from wadi_core.lorad.rotation import rotate
from wadi_core.pipeline import noise
from wadi_core.settings import PictureSettings
from wadi_core.single_file import LDM_OPEN_CLIP

pytestmark = pytest.mark.usefixtures("no_network")

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

    prefix = LDM_OPEN_CLIP[0]
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


@pytest.fixture(scope="module")
def reference(kit: Kit) -> Tensor:
    """Latents of all prompts in single precision, in one call."""
    return kit.load()(PROMPTS, batch=5, return_latents=True).latents


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "float16"])
def test_one_call_of_the_network_for_a_batch_in_every_number_format(kit: Kit, reference: Tensor, form: str, dtype: str) -> None:
    pipe = kit.load(form, dtype=dtype)
    assert {p.dtype for part in bases.PARTS for p in getattr(pipe.base, part).parameters()} == {pipe.dtype}
    calls = count_calls(pipe.base.unet)
    made = pipe(PROMPTS, batch=4, return_latents=True)
    assert calls == [4, 1]  # no second branch either: the batch is the pictures
    assert made.calls == 2 and made.seconds > 0 and len(made.images) == 5
    error = (made.latents - reference).square().mean() / reference.square().mean()
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
        ([(lorad, math.nan)], "from -100 to 100, not nan"),
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
    pipe = OneStepPipeline.from_pretrained(merged, config=sd15.folder, device="cpu", precision="exact")
    assert pipe.one_step == OneStep(0.02, 998)
    assert pipe("a cat").settings[0].alpha_T_squared == 0.02
    assert sd15.load(lorad=None, alpha_T_squared=0.0046).one_step == OneStep(0.0046)
    assert not caplog.records
    with pytest.raises(ValueError, match="one-step network already"):
        OneStepPipeline.from_pretrained(merged, config=sd15.folder, device="cpu", lorad=sd15.lorad, precision="exact")


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
        ({"prompts": ["a", 3]}, "prompt must be of type str, not int"),
        ({"prompts": ["a", None]}, "prompt must be of type str, not NoneType"),
        ({"prompts": ["a", b"b"]}, "prompt must be of type str, not bytes"),
        ({"prompts": None}, "prompts must be a text or a list of texts, not NoneType"),
        ({"prompts": b"a cat"}, "prompts must be a text or a list of texts, not bytes"),
        ({"prompts": 3}, "prompts must be a text or a list of texts, not int"),
        ({"prompts": {"a": "b"}}, "prompts must be a text or a list of texts, not dict"),
        ({"prompts": "caf\udce9"}, "prompt is no valid text"),
        ({"prompts": ["a", "\ud83d"]}, "prompt is no valid text"),
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
    assert PictureSettings.from_json(said.to_json()) == said
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["p-0001.png", "p-0002.png"]
