"""Weights are read one tensor at a time from whatever holds them, and written in the same manner."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layout_networks import LDM, SMALL_LINEAR, ldm_state, pixart_original, small_pixart_state, small_state
from lorad_networks import unet

from wadi_core.lorad import checkpoint
from wadi_core.lorad import stored as module
from wadi_core.lorad.checkpoint import read_header, read_tensors, write_safetensors
from wadi_core.lorad.layers import network_sha256, student_layers
from wadi_core.lorad.quantised import cast, dequantise, quantise
from wadi_core.lorad.weights import Weights, check_output, network_files, write_stream

NAME = "diffusion_pytorch_model"
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def state():
    return small_state(SMALL_LINEAR)


def test_a_file_in_any_layout_gives_the_same_layers(state, tmp_path):
    write_safetensors(tmp_path / "ldm.safetensors", ldm_state(state, SMALL_LINEAR), {"title": "a base"})
    write_safetensors(tmp_path / "diffusers.safetensors", state)
    ldm, plain = Weights.open(tmp_path / "ldm.safetensors"), Weights.open(tmp_path / "diffusers.safetensors")
    assert (ldm.layout.name, plain.layout.name) == ("ldm", "diffusers")
    assert ldm.architecture == plain.architecture == "unet-custom"
    assert (ldm.metadata, plain.metadata) == ({"title": "a base"}, {})
    assert set(ldm.layers()) == set(plain.layers()) == set(student_layers(unet(SMALL_LINEAR, "meta")))
    for path in plain.layers():
        assert torch.equal(ldm.linear(path), state[f"{path}.weight"])
        assert torch.equal(plain.linear(path), state[f"{path}.weight"])
    assert ldm.sha256() == plain.sha256() == Weights.of(state).sha256() == network_sha256(state)
    assert "first_stage_model.decoder.conv_in.weight" in ldm.names
    assert ldm.shape(LDM + "input_blocks.0.0.weight") == (32, 4, 3, 3)
    assert ldm.dtype(LDM + "input_blocks.0.0.weight") == torch.float32
    assert ldm.file_of(LDM + "input_blocks.0.0.weight") == tmp_path / "ldm.safetensors"


def test_only_the_tensor_that_is_asked_for_is_read(state, tmp_path, monkeypatch):
    write_safetensors(tmp_path / "base.safetensors", state)
    read: list[str] = []

    def watched(header, names=None):
        read.extend(names or header.places)
        return checkpoint.read_tensors(header, names)

    monkeypatch.setattr(module, "read_tensors", watched)
    weights = Weights.open(tmp_path / "base.safetensors")
    assert read == []
    weights.linear(LAYER)
    assert read == [f"{LAYER}.weight"]


def test_the_rows_of_a_fused_tensor_are_cut_out():
    state = small_pixart_state()
    fused, plain = Weights.of(pixart_original(state)), Weights.of(state)
    assert len(fused.names) < len(plain.names)
    assert set(fused.layers()) == set(plain.layers())
    for path in plain.layers():
        assert torch.equal(fused.linear(path), state[f"{path}.weight"])
    assert fused.sha256() == plain.sha256()
    assert fused.files == () and fused.file_of(fused.names[0]) is None


@pytest.mark.parametrize("inside", ["unet", "."])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_folder_in_diffusers_layout(state, tmp_path, inside, variant):
    (tmp_path / inside).mkdir(exist_ok=True)
    write_safetensors(tmp_path / inside / f"{NAME}{variant}.safetensors", state)
    weights = Weights.open(tmp_path)
    assert torch.equal(weights.linear(LAYER), state[f"{LAYER}.weight"])
    assert [file.name for file in weights.files] == [f"{NAME}{variant}.safetensors"]


def test_a_transformer_in_several_files(tmp_path):
    state = small_pixart_state()
    names = list(state)
    shards = {f"{NAME}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    folder = tmp_path / "transformer"
    folder.mkdir()
    for file, part in shards.items():
        write_safetensors(folder / file, {name: state[name] for name in part})
    index = folder / f"{NAME}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    weights = Weights.open(tmp_path)
    assert len(weights.files) == 2 and sorted(weights.names) == sorted(names)
    assert all(torch.equal(weights.tensor(name), state[name]) for name in names)
    write_safetensors(folder / f"{NAME}-00001-of-00002.safetensors", state)
    with pytest.raises(ValueError, match="two of its files hold the same tensor"):
        Weights.open(tmp_path)
    index.write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(ValueError, match="does not say which file"):
        network_files(tmp_path)
    index.write_text("nonsense")
    with pytest.raises(ValueError, match="not a JSON file"):
        network_files(tmp_path)


def test_a_pickle_of_plain_tensors(state, tmp_path):
    torch.save(state, tmp_path / f"{NAME}.bin")
    assert torch.equal(Weights.open(tmp_path).linear(LAYER), state[f"{LAYER}.weight"])
    torch.save({"state_dict": state}, tmp_path / "nested.ckpt")
    with pytest.raises(ValueError, match="nested.ckpt: this pickle is not a table of plain tensors"):
        Weights.open(tmp_path / "nested.ckpt")


def test_what_cannot_be_opened_says_why_in_one_line(tmp_path):
    write_safetensors(tmp_path / "lora.safetensors", {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)})
    (tmp_path / "short.safetensors").write_bytes(b"123")
    (tmp_path / "empty").mkdir()
    for name, kind, said in (
        ("lora.safetensors", ValueError, "lora.safetensors: this is an ordinary LoRA"),
        ("short.safetensors", ValueError, "too short"),
        ("missing.safetensors", OSError, "no such file"),
        ("empty", OSError, "holds no network in diffusers layout"),
    ):
        with pytest.raises(kind, match=said) as caught:
            Weights.open(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_type_that_nobody_knows_is_named(state, tmp_path):
    write_safetensors(tmp_path / "base.safetensors", state)
    raw = (tmp_path / "base.safetensors").read_bytes()
    (tmp_path / "base.safetensors").write_bytes(raw.replace(b'"F32"', b'"F4X"'))
    weights = Weights.open(tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="unknown type 'F4X'"):
        weights.dtype(weights.names[0])
    with pytest.raises(ValueError, match="unknown type"):
        weights.linear(LAYER)


# Codes with a scale


@pytest.mark.parametrize("ending", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (32,), (32, 1)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_with_a_scale_beside_it_is_read_as_its_values(state, ending, shape, dtype):
    values = state[f"{LAYER}.weight"]
    scale = torch.full(shape, 0.003)
    codes = (values / 0.003).to(dtype)
    weights = Weights.of({**state, f"{LAYER}.weight": codes, f"{LAYER}.{ending}": scale})
    found = weights.linear(LAYER)
    assert found.dtype == torch.float32
    assert torch.equal(found, codes.float() * 0.003)
    assert weights.scale_of(f"{LAYER}.weight") == f"{LAYER}.{ending}"
    assert torch.equal(weights.tensor(f"{LAYER}.weight").float(), codes.float())


def test_scales_and_numbers_of_unknown_kinds_are_refused(state):
    name = f"{LAYER}.weight"
    blocks = Weights.of({**state, f"{LAYER}.weight_scale": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"to_q.weight: a scale of shape \(2, 2\)"):
        blocks.linear(LAYER)
    with pytest.raises(ValueError, match="to_q.weight has Inf among its codes times .*to_q.weight_scale: the scale is damaged"):
        Weights.of(
            {**state, name: state[name].sign().mul(4).to(torch.float8_e4m3fn), f"{name}_scale": torch.tensor(3.4e38)}
        ).linear(LAYER)
    integers = Weights.of({**state, name: state[name].to(torch.int8)})
    with pytest.raises(ValueError, match="int8, not as floating-point"):
        integers.linear(LAYER)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (6, 1)])
def test_a_scale_grows_only_where_it_must(dtype, shape):
    values = torch.randn(6, 8)
    largest = values.abs().amax() if shape == () else values.abs().amax(dim=1, keepdim=True)
    scale = (largest / torch.finfo(dtype).max).reshape(shape)
    codes, same = quantise(values, scale, dtype)
    assert torch.equal(same, scale)
    assert codes.dtype == dtype and codes.float().isfinite().all()
    again, _ = quantise(dequantise(codes, scale), scale, dtype)
    assert torch.equal(again.float(), codes.float())  # codes of their own values
    values[2] *= 1.4
    codes, larger = quantise(values, scale, dtype)
    assert codes.float().isfinite().all() and larger.shape == scale.shape
    assert torch.allclose(dequantise(codes, larger), values, rtol=0.13, atol=float(larger.max()) * 0.002)
    if shape:
        assert larger[2] > scale[2] and torch.equal(larger[:2], scale[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@given(value=st.floats(-400, 400, width=32))
def test_stochastic_rounding_takes_one_of_the_two_neighbours(dtype, value):
    many = cast(torch.full((4000,), value), dtype, seed=3).double()
    assert len(many.unique()) <= 2
    nearest = torch.tensor(value).to(dtype).double()
    step = (many.max() - many.min()).item()
    assert many.min() <= value <= many.max() or step == 0 and many[0] == nearest
    spacing = torch.finfo(dtype).eps * max(abs(value), torch.finfo(dtype).tiny)
    assert abs(many.mean() - value) <= 0.06 * spacing  # four standard deviations


def test_stochastic_rounding_repeats_with_its_seed_and_never_overflows():
    values = torch.randn(50, 50)
    assert torch.equal(cast(values, torch.bfloat16, 1), cast(values, torch.bfloat16, 1))
    assert not torch.equal(cast(values, torch.bfloat16, 1), cast(values, torch.bfloat16, 2))
    exact = values.bfloat16()
    assert torch.equal(cast(exact.float(), torch.bfloat16, 1), exact)
    for dtype in (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        limit = torch.finfo(dtype).max
        assert (cast(torch.tensor([limit, -limit, 1e9, -1e9]), dtype, 1).float().abs() == limit).all()
    assert torch.equal(cast(values, torch.float32, 1), values)  # nothing to round
    assert (cast(torch.tensor([1e6]), torch.float8_e4m3fn).float() == 448).all()


# Writing


def entries(tensors: dict[str, torch.Tensor]):
    return [(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in tensors.items()]


def test_a_stream_is_the_file_that_would_be_written_at_once(tmp_path):
    tensors = {"b": torch.randn(3, 4), "a": torch.ones(2, dtype=torch.float16), "c": torch.zeros(0, 2), "d": torch.tensor(4)}
    seen: list[tuple[int, int]] = []
    write_stream(tmp_path / "one.safetensors", entries(tensors), {"k": "v"}, progress=lambda *done: seen.append(done))
    write_safetensors(tmp_path / "two.safetensors", tensors, {"k": "v"})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert seen[-1] == (60, 60) and len(seen) == 4
    found = read_tensors(read_header(tmp_path / "one.safetensors"))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_goes_wrong_half_way_leaves_what_was_there(tmp_path):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"before")

    def fails():
        raise OSError("the disk broke")

    good = entries({"a": torch.zeros(4)})
    with pytest.raises(OSError, match="the disk broke"):
        write_stream(target, [*good, ("z", torch.float32, (2,), fails)])
    with pytest.raises(ValueError, match="was to be written"):
        write_stream(target, [*good, ("z", torch.float32, (2,), lambda: torch.zeros(3))])
    assert target.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_an_output_that_is_an_input_is_refused_under_any_name(tmp_path):
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"base")
    (tmp_path / "link").symlink_to(base)
    os.link(base, tmp_path / "hard")
    for name in ("base.safetensors", "link", "hard", "./base.safetensors"):
        with pytest.raises(ValueError, match="would overwrite an input"):
            write_stream(tmp_path / name, entries({"a": torch.zeros(1)}), inputs=[base])
    assert base.read_bytes() == b"base"
    check_output(tmp_path / "other", [base])


def test_no_room_on_the_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - 3999, 3999))

    def never():
        raise AssertionError("nothing is computed")

    with pytest.raises(OSError, match="the disk has 0.00 GB left") as caught:
        write_stream(tmp_path / "out.safetensors", [("a", torch.float32, (1000,), never)])
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="the folder does not exist"):
        check_output(tmp_path / "nowhere" / "out.safetensors", [])
    with pytest.raises(OSError, match="this is a folder"):
        write_stream(tmp_path, entries({"a": torch.zeros(1)}))
    Path(tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        write_stream(tmp_path / "file" / "out.safetensors", entries({"a": torch.zeros(1)}))
