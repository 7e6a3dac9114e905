"""ControlNets: every form of file, what they add in one call, with larger pictures too, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import control_networks
import networks
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from wadi_core import OneStepPipeline, control, highres, mini, pictures
from wadi_core.control import Steered, Steering
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.pipeline import noise

SIDE = 64  # pixels, the small base's native size


@dataclass
class Kit:
    """A small base with its one-step adapter, and a ControlNet for it in every form."""

    base: Path
    lorad: Path
    forms: dict[str, Path]
    unet: nn.Module
    controlnet: nn.Module

    def pipe(self, *controls: object) -> OneStepPipeline:
        return OneStepPipeline.from_pretrained(
            self.base, lorad=self.lorad, device="cpu", control=controls or None, precision="exact"
        )


def make_kit(place: Path, architecture: str) -> Kit:
    base, made = networks.write_base(place / "base", architecture)
    networks.random_lorad(made["unet"]).save(place / "one-step.safetensors")
    controlnet = control_networks.random_controlnet(made["unet"])
    forms = control_networks.write_forms(place / "controls", controlnet, base)
    return Kit(base, place / "one-step.safetensors", forms, made["unet"], controlnet)


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("sd15"), "sd15")


def picture(width: int = SIDE, height: int = SIDE, seed: int = 0) -> Image.Image:
    """Black and white patches."""
    small = np.random.default_rng(seed).integers(0, 2, (4, 4), dtype=np.uint8) * 255
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST).convert("RGB")


def latents(pipe: OneStepPipeline, *prompts: str, **options: object) -> torch.Tensor:
    return pipe(list(prompts) or ["a cat"], seed=3, return_latents=True, **options).latents


# --- what it computes ------------------------------------------------------------------------------------------------


def test_the_network_gets_what_the_controlnet_adds(kit: Kit) -> None:
    pipe = kit.pipe(kit.forms["canny"])
    image = picture()
    found = latents(pipe, control_image=image, control_scale=0.7)
    with torch.no_grad():
        text, z = pipe.encode(["a cat"]), noise([3], SIDE, SIDE)
        map = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        down, mid = kit.controlnet(
            z, 999, encoder_hidden_states=text, controlnet_cond=map, conditioning_scale=0.7, return_dict=False
        )
        eps = pipe.base.unet(
            z, 999, encoder_hidden_states=text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
    assert torch.allclose(found, pipe.one_step.x0(z, eps), atol=1e-4)
    bare = latents(kit.pipe())
    assert (found - bare).abs().mean() > 0.1
    assert not torch.allclose(found, latents(pipe, control_image=picture(seed=1), control_scale=0.7), atol=0.1)


def test_every_form_of_file_is_the_same_controlnet(kit: Kit) -> None:
    wanted = kit.controlnet.state_dict()
    for name, path in kit.forms.items():
        pipe = kit.pipe(path)
        found = pipe.control[0].network.state_dict()
        assert found.keys() == wanted.keys(), name
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
        assert pipe.control[0].file == path.name and len(pipe.control[0].sha256) == 64


def test_several_controlnets_add_up_and_scale_0_is_none(sd15: Kit) -> None:
    other = control.ControlNet("other", control_networks.random_controlnet(sd15.unet, seed=9))
    pipe, bare = sd15.pipe(sd15.forms["canny"], other), latents(sd15.pipe())
    maps = [picture(), picture(seed=1)]
    assert torch.equal(latents(pipe, control_image=maps, control_scale=0), bare)
    alone = latents(sd15.pipe(sd15.forms["canny"]), control_image=maps[0], control_scale=0.5)
    assert torch.equal(latents(pipe, control_image=maps, control_scale=[0.5, 0]), alone)
    both = latents(pipe, control_image=maps, control_scale=[0.5, 0.5])
    pipe.set_control([other, sd15.forms["canny"]])
    assert torch.allclose(latents(pipe, control_image=maps[::-1], control_scale=0.5), both, atol=1e-4)
    assert not torch.allclose(both, alone, atol=0.1)
    pipe.set_control(None)
    assert torch.equal(latents(pipe), bare)


def test_pictures_of_a_batch_may_have_maps_of_their_own(sd15: Kit) -> None:
    pipe = sd15.pipe(sd15.forms["canny"])
    prompts, maps = ["a", "b", "c"], [picture(seed=seed) for seed in range(3)]
    together = latents(pipe, *prompts, control_image=[maps], batch=2)
    assert torch.equal(together, latents(pipe, *prompts, control_image=maps, batch=2))
    for index, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=3 + index, control_image=maps[index], return_latents=True).latents
        assert torch.allclose(together[index : index + 1], alone, atol=1e-3)
    shared = latents(pipe, *prompts, control_image=maps[1])
    assert torch.allclose(shared[1], together[1], atol=1e-3) and not torch.allclose(shared[0], together[0], atol=1e-3)


def test_guidance_repeats_the_maps(sd15: Kit) -> None:
    maps = torch.rand(2, 3, SIDE, SIDE)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(4, 5, 32)
    with torch.no_grad():
        both = Steered(sd15.unet, [Steering(sd15.controlnet, maps)])(x.repeat(2, 1, 1, 1), 500, text).sample
        second = Steered(sd15.unet, [Steering(sd15.controlnet, maps)])(x, 500, text[2:]).sample
    assert torch.allclose(both[2:], second, atol=1e-4)


@pytest.mark.parametrize("method", highres.METHODS)
def test_control_of_larger_pictures(sd15: Kit, method: str) -> None:
    pipe = sd15.pipe(sd15.forms["canny"])
    hooks = [len(module._forward_pre_hooks) for net in (pipe.base.unet, pipe.control[0].network) for module in net.modules()]
    image = picture(2 * SIDE, 2 * SIDE + 16)
    made = pipe("a cat", control_image=image, hires=method)
    assert made.images[0].size == image.size
    assert (made.settings[0].hires, made.calls) == (method, 1)
    large = latents(pipe, control_image=image, hires=method)
    for other in (
        latents(pipe, control_image=image),
        latents(pipe, control_image=image, hires=method, control_scale=0),
        latents(pipe, control_image=picture(2 * SIDE, 2 * SIDE + 16, seed=1), hires=method),
    ):
        assert not torch.allclose(large, other, atol=0.05)
    after = [len(module._forward_pre_hooks) for net in (pipe.base.unet, pipe.control[0].network) for module in net.modules()]
    assert after == hooks


def test_larger_pictures_without_control(sd15: Kit) -> None:
    pipe = sd15.pipe()
    assert pipe("a cat", width=128, height=96, hires=True).settings[0].hires == highres.METHODS[0]
    assert torch.equal(latents(pipe, hires=True), latents(pipe))  # native size: nothing to see to
    plan = pipe.plan("a cat", width=128, height=128)
    assert plan[0].hires is None


# --- what is written of it -------------------------------------------------------------------------------------------


def test_a_picture_says_what_steered_it(sd15: Kit, tmp_path: Path) -> None:
    pipe = sd15.pipe(sd15.forms["canny"])
    picture(72, 80).save(tmp_path / "map.png")
    made = pipe("a cat", control_image=Image.open(tmp_path / "map.png"), control_scale=0.75, hires="redilate")
    made.save(tmp_path / "cat.png")
    said = pictures.read_settings(tmp_path / "cat.png")
    assert said == made.settings[0]
    (kept,) = said.control
    assert (kept.file, kept.scale, kept.image, len(kept.sha256)) == ("canny", 0.75, "map.png", 64)
    assert (said.width, said.height) == (72, 80)  # the control image's
    text = Image.open(tmp_path / "cat.png").info["parameters"]
    assert 'ControlNet: "canny: 0.75"' in text and "High resolution: redilate" in text


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(act: object, *arguments: object, **options: object) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        act(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_control_images_that_do_not_fit(sd15: Kit) -> None:
    pipe = sd15.pipe(sd15.forms["canny"])

    def says(**options: object) -> str:
        return refused(pipe, "a cat", **options)

    wrong = says(control_image=picture(72, 64), width=64, height=64)
    assert wrong == "the control image is 72x64 and the picture 64x64: both need the same size"
    assert "width must be divisible by 8, not 70" in says(control_image=picture(70, 64))
    assert "values in this picture that are NaN or Inf" in says(control_image=Image.new("F", (SIDE, SIDE), float("nan")))
    assert says() == "there are 1 ControlNets and 0 control images for them"
    assert "2 control images for 1 pictures" in says(control_image=[picture(), picture()])
    assert "there are 1 ControlNets and 2 control scales" in says(control_image=picture(), control_scale=[1, 1])
    assert "from 0 to 4, not -1" in says(control_image=picture(), control_scale=-1)
    assert "0 ControlNets and 1 control images" in refused(sd15.pipe(), "a cat", control_image=picture())


def test_control_images_of_all_modes_are_looked_at_alike(sd15: Kit) -> None:
    pipe, drawn = sd15.pipe(sd15.forms["canny"]), picture()
    deep = Image.fromarray(np.asarray(drawn.convert("L"), np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    drawn.transpose(Image.Transpose.ROTATE_90).save(file, "png", exif=exif)
    expected = np.asarray(pipe("a cat", control_image=drawn).images[0])
    for image in (*(drawn.convert(mode) for mode in ("L", "1", "P", "RGBA", "LA", "CMYK")), deep, Image.open(file)):
        assert np.array_equal(np.asarray(pipe("a cat", control_image=image).images[0]), expected), image.mode
    clear = Image.new("RGBA", drawn.size, (0, 200, 0, 0))  # what lies below is not seen
    white = pipe("a cat", control_image=Image.new("RGB", drawn.size, "white")).images[0]
    assert np.array_equal(np.asarray(pipe("a cat", control_image=clear).images[0]), np.asarray(white))


def test_absurd_sizes(sd15: Kit) -> None:
    pipe = sd15.pipe()
    assert "too large for this network: enlarging goes up to 256x256" in refused(pipe, "a", width=8192, height=64, hires=True)
    assert "must lie from 64 to 8192" in refused(pipe, "a", width=1 << 40)
    assert "divisible by 8" in refused(pipe, "a", height=100, hires=True)
    assert "hires must be one of redilate, shrink, not widen" in refused(pipe, "a", hires="widen")


def test_what_is_no_controlnet_for_this_base(sd15: Kit, tmp_path: Path) -> None:
    def says(path: Path) -> str:
        message = refused(sd15.pipe, path)
        assert message.startswith(str(path)), message
        return message

    wider = control_networks.random_controlnet(wide_unet())
    forms = control_networks.write_forms(tmp_path / "wide", wider, sd15.base)
    for name in ("canny", "ldm.safetensors", "pickle.pth"):
        assert "made for a network of width 64 and text width 32, and the base base is a network of width 32" in says(
            forms[name]
        )
    assert "this is no ControlNet but a LoRaD adapter" in says(sd15.lorad)
    assert "no ControlNet but a whole U-Net" in says(sd15.base / "unet" / "diffusion_pytorch_model.safetensors")
    write_safetensors(tmp_path / "other.safetensors", {"weight": torch.zeros(2)})
    assert "no ControlNet but something else" in says(tmp_path / "other.safetensors")
    assert "there is no such file" in says(tmp_path / "missing.safetensors")
    assert "config.json is missing" in says(tmp_path)
    assert "this folder is for UNet2DConditionModel" in says(sd15.base / "unet")
    (tmp_path / "notes.safetensors").write_text("a shopping list")
    assert "no .safetensors file" in says(tmp_path / "notes.safetensors")
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "no pickle of plain tensors" in says(tmp_path / "evil.pth")


def wide_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    settings = {"attention_head_dim": 2, **networks.SMALL["unet"], "block_out_channels": [64, 64]}
    return UNet2DConditionModel(**settings)


def test_damaged_folders(sd15: Kit, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(sd15.forms["canny"], tmp_path / name))

    empty = copy("empty")
    (empty / "diffusion_pytorch_model.safetensors").unlink()
    assert "diffusion_pytorch_model.safetensors is missing" in refused(sd15.pipe, empty)
    odd = copy("odd")
    settings = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**settings, "layers_per_block": 2}))
    assert "is missing (and" in refused(sd15.pipe, odd)
    (odd / "config.json").write_text(json.dumps({**settings, "down_block_types": ["Nonsense"]}))
    assert "no ControlNet can be built from its settings" in refused(sd15.pipe, odd)
    (odd / "config.json").write_text("{")
    assert "not a JSON file" in refused(sd15.pipe, odd)


def test_a_shuffle_controlnet_says_nothing_of_places(sd15: Kit, tmp_path: Path) -> None:
    path = tmp_path / "control_v11e_sd15_shuffle.safetensors"
    shutil.copyfile(sd15.forms["ldm.safetensors"], path)
    pipe = sd15.pipe(path)
    assert pipe.control[0].network.config.global_pool_conditions
    assert torch.isfinite(latents(pipe, control_image=picture())).all()


def test_the_controlnet_of_mini_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd15: Kit
) -> None:
    monkeypatch.setattr(mini, "FOLDER", tmp_path)
    assert "controlnet-canny/diffusion_pytorch_model.safetensors: this file of wadi-mini is missing" in refused(
        sd15.pipe, "mini"
    )
