"""Adapters merged into weights: exact in every layout and type, and nothing half-written where it cannot be done."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from layout_networks import LDM, SMALL_LINEAR, ldm_state, pixart_original, small_pixart_state, small_state
from lorad_networks import SD15, SD21, SMALL, SMALL_PIXART, pixart, same_bits, unet
from networks import random_lorad, states, write_base, write_single_file

from wadi_core.base import load as load_base
from wadi_core.lorad import LoRaD, Metadata, fuse
from wadi_core.lorad.checkpoint import read_header, read_tensors, write_safetensors
from wadi_core.lorad.merge import merge, merged_tensors
from wadi_core.lorad.rotation import angles, rotate
from wadi_core.lorad.weights import Weights

State = dict[str, torch.Tensor]


def load(path: Path) -> State:
    return read_tensors(read_header(path))


def module_of(state: State, config=SMALL_LINEAR) -> torch.nn.Module:
    module = unet(config)
    module.load_state_dict(state)
    return module


@pytest.fixture(scope="module")
def state():
    return small_state(SMALL_LINEAR)


@pytest.fixture(scope="module")
def lorad():
    return random_lorad(unet(SMALL_LINEAR))


@pytest.fixture(scope="module")
def fused(state, lorad):
    """What the live network's own fusing makes of it."""
    module = module_of(state)
    fuse(module, [(lorad, 0.7)])
    return dict(module.state_dict())


@pytest.fixture
def base(state, tmp_path):
    write_safetensors(
        tmp_path / "base.safetensors", ldm_state(state, SMALL_LINEAR), {"title": "a base", "sshs_model_hash": "0"}
    )
    return tmp_path / "base.safetensors"


@pytest.mark.parametrize("config", [SMALL, SMALL_LINEAR], ids=["convolutions", "linear"])
def test_merged_then_converted_is_converted_then_merged(config, tmp_path):
    """diffusers' own converter, on both ways; bit for bit in float32."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    state, lorad, full = small_state(config), random_lorad(unet(config)), dict(unet(config, "meta").config)
    ldm = ldm_state(state, full)
    write_safetensors(tmp_path / "ldm.safetensors", ldm)
    write_safetensors(tmp_path / "diffusers.safetensors", convert_ldm_unet_checkpoint(dict(ldm), full))
    for name in ("ldm", "diffusers"):
        merge(tmp_path / f"{name}.safetensors", [(lorad, 1.0)], tmp_path / f"{name}-merged.safetensors")
    merged_first = convert_ldm_unet_checkpoint(load(tmp_path / "ldm-merged.safetensors"), full)
    converted_first = load(tmp_path / "diffusers-merged.safetensors")
    assert same_bits(merged_first, converted_first)
    assert not same_bits(converted_first, state)


def test_a_file_keeps_layout_types_metadata_and_what_is_not_turned(base, state, lorad, fused, tmp_path):
    done: list[tuple[int, int]] = []
    report = merge(base, [(lorad, 0.7)], tmp_path / "out.safetensors", progress=lambda *so_far: done.append(so_far))
    assert (report.layers, report.layout) == (len(lorad.factors), "unet-custom in ldm layout")
    assert done[-1][0] == done[-1][1]
    header = read_header(tmp_path / "out.safetensors")
    assert header.metadata["title"] == "a base" and "sshs_model_hash" not in header.metadata
    assert header.metadata["wadi.merged"] == "untitled (0.7)"
    merged, before = load(tmp_path / "out.safetensors"), load(base)
    assert same_bits({name: t for name, t in merged.items() if name.startswith(LDM)}, ldm_part(fused))
    other = "first_stage_model.decoder.conv_in.weight"
    assert torch.equal(merged[other], before[other])


def ldm_part(state: State) -> State:
    return {name: tensor for name, tensor in ldm_state(state, SMALL_LINEAR).items() if name.startswith(LDM)}


def test_the_pipeline_knows_a_merged_base_as_a_one_step_network(tmp_path):
    from wadi_core import OneStepPipeline

    folder, networks = write_base(tmp_path / "base")
    write_single_file(tmp_path / "base.safetensors", states(networks), folder)
    lorad = random_lorad(networks["unet"])
    merge(folder, [(lorad, 1.0)], tmp_path / "merged")
    merge(tmp_path / "base.safetensors", [(lorad, 1.0)], tmp_path / "merged.safetensors")
    with_adapter = OneStepPipeline.from_pretrained(folder, lorad=lorad, precision="exact")
    expected = with_adapter("a red circle", return_latents=True).latents
    for merged, config in ((tmp_path / "merged", None), (tmp_path / "merged.safetensors", folder)):
        pipe = OneStepPipeline.from_pretrained(merged, config=config, precision="exact")
        assert pipe.one_step == lorad.one_step
        assert torch.equal(pipe("a red circle", return_latents=True).latents, expected)
        with pytest.raises(ValueError, match="one-step network already"):
            merge(merged, [(lorad, 1.0)], tmp_path / "twice.safetensors")
    ordinary = random_lorad(networks["unet"], one_step=False)
    merge(tmp_path / "merged", [(ordinary, 0.5)], tmp_path / "styled.safetensors")
    metadata = read_header(tmp_path / "styled.safetensors").metadata
    assert metadata["wadi.merged"] == "untitled (1) + untitled (0.5)"
    assert metadata["wadi.alpha_T_squared"] == "0.0047"


def test_angles_of_several_add_and_strength_0_changes_nothing(base, state, lorad, tmp_path):
    other = random_lorad(unet(SMALL_LINEAR), rank=2, seed=5, one_step=False)
    lorad.save(tmp_path / "lorad.safetensors", torch.float32)
    stack = [(tmp_path / "lorad.safetensors", 0.5), (other, -0.25), (other, 0.0)]
    merge(base, stack, tmp_path / "out.safetensors")
    module = module_of(state)
    fuse(module, [(lorad, 0.5), (other, -0.25)])
    merged = {name: t for name, t in load(tmp_path / "out.safetensors").items() if name.startswith(LDM)}
    assert same_bits(merged, ldm_part(dict(module.state_dict())))
    merge(base, [(lorad, 0.0)], tmp_path / "same.safetensors")
    assert (tmp_path / "same.safetensors").read_bytes() == base.read_bytes()


def test_pixart_in_one_tensor_or_three(tmp_path):
    module = pixart(SMALL_PIXART)
    state = small_pixart_state()
    lorad = random_lorad(module, rank=3)
    plain = state | dict(merged_tensors(Weights.of(state), [(lorad, 1.0)]))
    fused = pixart_original(state)
    kept = {name: tensor.clone() for name, tensor in fused.items()}
    assert same_bits(fused | dict(merged_tensors(Weights.of(fused), [(lorad, 1.0)])), pixart_original(plain))
    assert same_bits(fused, kept)  # the tensors of the state dict are left alone
    # An adapter of some of the rows leaves the others alone.
    some = LoRaD({key: pair for key, pair in lorad.factors.items() if key.endswith("blocks.0.attn1.to_k")}, lorad.metadata)
    ((name, tensor),) = merged_tensors(Weights.of(fused), [(some, 1.0)])
    assert name == "blocks.0.attn.qkv.weight"
    changed = (tensor != fused[name]).any(dim=1)
    assert changed[16:32].all() and not changed[:16].any() and not changed[32:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_are_turned_in_float32_or_more_and_stored_in_their_own_type(state, lorad, dtype):
    cast = {name: tensor.to(dtype) for name, tensor in state.items()}
    module = module_of(state).to(dtype)
    fuse(module, [(lorad, 1.0)])
    merged = cast | dict(merged_tensors(Weights.of(cast), [(lorad, 1.0)]))
    assert same_bits(merged, dict(module.state_dict()))
    stochastic = cast | dict(merged_tensors(Weights.of(cast), [(lorad, 1.0)], stochastic=True))
    assert same_bits(stochastic, cast | dict(merged_tensors(Weights.of(cast), [(lorad, 1.0)], stochastic=True)))
    if dtype == torch.float64:
        assert same_bits(stochastic, merged)
        return
    exact = state | dict(merged_tensors(Weights.of({n: t.float() for n, t in cast.items()}), [(lorad, 1.0)]))
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"
    error = (stochastic[layer].float() - exact[layer]).abs()
    assert (error <= exact[layer].abs() * torch.finfo(dtype).eps + 1e-7).all()
    assert not torch.equal(stochastic[layer], merged[layer])
    bias = (stochastic[layer].double() - exact[layer].double()).mean() / exact[layer].double().abs().mean()
    assert abs(bias) < 0.1 * torch.finfo(dtype).eps


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("scaled", ["none", "one", "rows"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_with_and_without_scales(state, lorad, dtype, scaled, stochastic, tmp_path):
    coded = {}
    for name, tensor in state.items():
        coded[name] = tensor
        if tensor.ndim == 2:
            largest = tensor.abs().amax() if scaled != "rows" else tensor.abs().amax(dim=1, keepdim=True)
            scale = torch.ones(()) if scaled == "none" else largest / torch.finfo(dtype).max
            coded[name] = (tensor / scale).to(dtype)
            if scaled != "none":
                coded[name.removesuffix("weight") + "scale_weight"] = scale
    write_safetensors(tmp_path / "base.safetensors", coded)
    merge(tmp_path / "base.safetensors", [(lorad, 1.0)], tmp_path / "out.safetensors", stochastic=stochastic)
    base, merged = Weights.open(tmp_path / "base.safetensors"), Weights.open(tmp_path / "out.safetensors")
    assert merged.names == base.names
    assert all((merged.dtype(name), merged.shape(name)) == (base.dtype(name), base.shape(name)) for name in base.names)
    match = lorad.matched(base.layout.network)
    for key, path in match.paths.items():
        turned = rotate(base.linear(path).float(), angles(*lorad.factors[key]))
        found = merged.linear(path).float()
        assert found.isfinite().all()
        error = (found - turned).norm() / turned.norm()
        assert error < torch.finfo(dtype).eps * (0.5 if not stochastic else 1.0), path
    untouched = "time_embedding.linear_1"
    assert torch.equal(merged.linear(untouched).float(), base.linear(untouched).float())


# Folders


def in_pieces(folder: Path) -> None:
    """The U-Net of a folder in two files with an index, as large ones are stored."""
    import json

    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load(whole)
    names = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": list(tensors)[i::2] for i in range(2)}
    for file, part in names.items():
        write_safetensors(whole.with_name(file), {name: tensors[name] for name in part}, {"format": "pt"})
    table = {name: file for file, part in names.items() for name in part}
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps({"weight_map": table}))
    whole.unlink()


@pytest.mark.parametrize("pieces", [False, True])
def test_a_folder_becomes_a_folder_with_its_other_parts(pieces, tmp_path):
    folder, networks = write_base(tmp_path / "base")
    if pieces:
        in_pieces(folder)
    else:
        shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "unet" / "other.bin")
    (folder / "whole.safetensors").write_bytes(b"a checkpoint of the base")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    lorad = random_lorad(networks["unet"])
    done: list[tuple[int, int]] = []
    merge(folder, [(lorad, 1.0)], tmp_path / "merged", progress=lambda *so_far: done.append(so_far))
    assert done[-1][0] == done[-1][1] and done == sorted(done)
    left_out = {Path("whole.safetensors"), Path("unet/other.bin"), Path(".cache/x.json")}
    assert files_in(tmp_path / "merged") == files_in(folder) - left_out
    for name in files_in(tmp_path / "merged"):
        if name.parent.name != "unet" or name.suffix == ".json":
            assert (tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes()
    fuse(networks["unet"], [(lorad, 1.0)])
    assert load_base(tmp_path / "merged", torch.device("cpu"), torch.float32).one_step == lorad.one_step
    merged = Weights.open(tmp_path / "merged")
    assert same_bits({name: merged.tensor(name) for name in merged.names}, dict(networks["unet"].state_dict()))
    merge(folder / "unet", [(lorad, 1.0)], tmp_path / "unet.safetensors")
    assert same_bits(load(tmp_path / "unet.safetensors"), dict(networks["unet"].state_dict()))


def files_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["sd15", "sd21"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_full_size_networks_merge_alike_in_both_layouts(architecture, dtype, tmp_path):
    """Merged then converted by diffusers equals converted then merged, and a few layers are read at a time."""
    import tracemalloc

    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    module = unet({"sd15": SD15, "sd21": SD21}[architecture], "meta")
    full = dict(module.config)
    state = {name: torch.randn(t.shape, dtype=torch.float32).mul_(0.02).to(dtype) for name, t in module.state_dict().items()}
    lorad = random_lorad(module, rank=256, spread=0.01)
    write_safetensors(tmp_path / "diffusers.safetensors", state)
    write_safetensors(tmp_path / "ldm.safetensors", ldm_state(state, full))
    del state
    tracemalloc.start()
    for name in ("ldm", "diffusers"):
        report = merge(tmp_path / f"{name}.safetensors", [(lorad, 1.0)], tmp_path / f"{name}-merged.safetensors")
        assert report.layers == len(lorad.factors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.1 * (tmp_path / "diffusers.safetensors").stat().st_size
    merged_first = convert_ldm_unet_checkpoint(load(tmp_path / "ldm-merged.safetensors"), full)
    assert same_bits(merged_first, load(tmp_path / "diffusers-merged.safetensors"))
    for path in tmp_path.iterdir():
        path.unlink()


# Refusals


def refused(kind: type[Exception], said: str, tmp_path: Path, *arguments, **options) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=said) as caught:
        merge(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_adapter_of_another_network_is_refused(base, tmp_path):
    wrong = random_lorad(pixart(SMALL_PIXART))
    refused(
        ValueError, "made for pixart-alpha, this is unet-custom", tmp_path, base, [(wrong, 1.0)], tmp_path / "o.safetensors"
    )
    wider = random_lorad(unet({**SMALL_LINEAR, "cross_attention_dim": 40}))
    refused(ValueError, "has a weight of shape", tmp_path, base, [(wider, 1.0)], tmp_path / "o.safetensors")


def test_adapters_that_disagree_are_refused(base, lorad, tmp_path):
    other = LoRaD(lorad.factors, Metadata("unet-custom", 0.01, 999))
    stack = [(lorad, 1.0), (other, 1.0)]
    refused(ValueError, "cannot be used together", tmp_path, base, stack, tmp_path / "o.safetensors")


def test_outputs_that_are_inputs_or_cannot_be_are_refused(base, lorad, state, tmp_path):
    lorad.save(tmp_path / "lorad.safetensors")
    stack = [(tmp_path / "lorad.safetensors", 1.0)]
    for output in (base, tmp_path / "lorad.safetensors", tmp_path / "." / "base.safetensors"):
        refused(ValueError, "would overwrite an input", tmp_path, base, stack, output)
    refused(ValueError, "must end in .safetensors", tmp_path, base, stack, tmp_path / "folder")
    refused(OSError, "the folder does not exist", tmp_path, base, stack, tmp_path / "no" / "o.safetensors")
    folder = tmp_path / "unet"
    folder.mkdir()
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", state)
    refused(OSError, "already", tmp_path, folder, stack, folder)
    refused(OSError, "cannot be written", tmp_path, folder, stack, tmp_path / "lorad.safetensors" / "merged")
    inside = folder / "diffusion_pytorch_model.safetensors"
    refused(ValueError, "would overwrite an input", tmp_path, folder, stack, inside)


def test_an_empty_folder_is_filled(lorad, state, tmp_path):
    for name in ("unet", "merged"):
        (tmp_path / name).mkdir()
    write_safetensors(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", state)
    merge(tmp_path / "unet", [(lorad, 1.0)], tmp_path / "merged")
    assert os.listdir(tmp_path / "merged") == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("output", ["o.safetensors", "folder"])
def test_no_room_is_noticed_before_the_work(output, lorad, state, tmp_path, monkeypatch):
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", state)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - 10**5, 10**5))
    target = tmp_path.parent / f"{tmp_path.name}-{output}"
    refused(OSError, "the disk has 0.00 GB left", tmp_path.parent, tmp_path, [(lorad, 1.0)], target)
    assert not target.exists()


@pytest.mark.parametrize("output", ["o.safetensors", "folder"])
def test_an_interruption_leaves_nothing(output, lorad, state, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    write_safetensors(base / "diffusion_pytorch_model.safetensors", state)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, [(lorad, 1.0)], tmp_path / output, progress=interrupt)
    assert os.listdir(tmp_path) == ["base"]


def test_a_base_with_senseless_metadata_is_refused(state, lorad, tmp_path):
    write_safetensors(tmp_path / "base.safetensors", state, {"wadi.format": "99"})
    stack = [(lorad, 1.0)]
    refused(
        ValueError,
        "base.safetensors: LoRaD format 99 is newer",
        tmp_path,
        tmp_path / "base.safetensors",
        stack,
        "o.safetensors",
    )


CONVOLUTION, ENTRY = "middle_block.0.in_layers.2.weight", "input_blocks.0.0.weight"
UNKNOWN_NUMBERS = {
    "int8": (CONVOLUTION, lambda t: t.mul(127).to(torch.int8), "weight is stored as int8"),
    "e4m3 codes": (CONVOLUTION, lambda t: (t / t.abs().max() * 448).to(torch.float8_e4m3fn), "codes without their scale"),
    "bool bias": ("middle_block.0.in_layers.2.bias", lambda t: t > 0, "bias is stored as bool"),
    "inpainting": (ENTRY, lambda t: t.repeat(1, 3, 1, 1)[:, :9], "a U-Net for inpainting"),
    "depth": (ENTRY, lambda t: t.repeat(1, 2, 1, 1)[:, :5], "a U-Net with depth"),
}


@pytest.mark.parametrize("kind", UNKNOWN_NUMBERS)
@pytest.mark.parametrize("part", ["model.diffusion_model.", ""], ids=["ldm", "bare"])
def test_what_generate_would_refuse_is_not_copied(kind, part, lorad, state, tmp_path):
    name, change, message = UNKNOWN_NUMBERS[kind]
    content = {key.replace("model.diffusion_model.", part): t for key, t in ldm_state(state, SMALL_LINEAR).items()}
    write_safetensors(tmp_path / "base.safetensors", {**content, part + name: change(content[part + name])})
    refused(ValueError, message, tmp_path, tmp_path / "base.safetensors", [(lorad, 1.0)], tmp_path / "o.safetensors")


def test_whole_numbers_that_say_nothing_are_copied(lorad, state, tmp_path):
    ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    write_safetensors(tmp_path / "base.safetensors", {**ldm_state(state, SMALL_LINEAR), **ids})
    merge(tmp_path / "base.safetensors", [(lorad, 1.0)], tmp_path / "o.safetensors")
    assert {key: t for key, t in load(tmp_path / "o.safetensors").items() if key in ids}[next(iter(ids))].dtype == torch.int64
