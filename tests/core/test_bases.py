"""Bases: folders and single files of every kind that people have, what is refused, and the full size."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import networks
import pytest
import torch
from pipeline_kit import Kit, count_calls, equal, make_kit, weights_of
from torch import Tensor

from wadi_core import LoRaD, OneStepPipeline, building, configs
from wadi_core import base as bases
from wadi_core.lorad import Metadata, checkpoint
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.single_file import LDM_CLIP, renamed

pytestmark = pytest.mark.usefixtures("no_network")


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
    as_before = {renamed(name, old): tensor for name, tensor in weights.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in as_before
    write_safetensors(file, as_before)
    assert equal(weights_of(bases.load(folder, torch.device("cpu"), torch.float32).vae), weights)


@pytest.mark.parametrize("architecture", ["sd15", "sd21", "wadi-mini"])
def test_a_full_size_single_file_is_recognised_from_its_header(architecture: str, tmp_path: Path) -> None:
    """All names and shapes of a whole U-Net, through diffusers' converter and back, without its gigabytes."""
    config = configs.folder(architecture) / "unet" / "config.json"
    settings = configs.read(config)
    shapes = {name: tuple(t.shape) for name, t in building.empty_network("unet", config).state_dict().items()}
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
        ("runwayml/stable-diffusion-v1-5", "HF_HUB_OFFLINE forbids to fetch it"),
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
            OneStepPipeline.from_pretrained(base, device="cpu", precision="exact")
        assert "\n" not in str(caught.value), base

    pruned = {name: t for name, t in networks.states(networks.make_networks(sd15.folder)).items()}
    without_text = tmp_path / "no-text.safetensors"
    networks.write_single_file(without_text, {**pruned, "text_encoder": {}}, sd15.folder)
    content = checkpoint.read_tensors(checkpoint.read_header(without_text))
    write_safetensors(without_text, {name: t for name, t in content.items() if not name.startswith(LDM_CLIP)})
    with pytest.raises(ValueError, match="holds no text encoder"):
        OneStepPipeline.from_pretrained(without_text, config=sd15.folder, device="cpu", precision="exact")


def test_a_lorad_of_another_network_is_refused_before_anything_is_made(sd15: Kit, tmp_path: Path) -> None:
    wide = make_kit(tmp_path, "sd21")
    lorad = LoRaD.load(wide.lorad)
    with pytest.raises(ValueError, match="does not fit this network") as caught:
        sd15.load(lorad=LoRaD(lorad.factors, Metadata(architecture="sd21")))
    assert "\n" not in str(caught.value)


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
