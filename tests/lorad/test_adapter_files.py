"""LoRaD files: what is written, what comes back, metadata, hashes."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lorad_networks import SMALL, SMALL_PIXART, STUDENT, pixart, random_adapter, unet
from safetensors import safe_open
from torch import nn

from wadi_core.lorad import LoRaD, Metadata
from wadi_core.lorad.checkpoint import read_header
from wadi_core.lorad.layers import student_layers
from wadi_core.lorad.metadata import content_sha256


@pytest.fixture
def network() -> nn.Module:
    return unet(SMALL)


@pytest.fixture
def saved(network: nn.Module, tmp_path: Path) -> Path:
    random_adapter(network, metadata=STUDENT).save(tmp_path / "student.safetensors")
    return tmp_path / "student.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_gives_back_what_was_saved(network, tmp_path, dtype):
    metadata = Metadata(
        "unet-custom",
        alpha_T_squared=0.0047,
        timestep=999,
        prediction_type="v_prediction",
        base_sha256="0" * 64,
        title="Ein Löwe 獅子",
        resolution="128x128",
        license="Apache-2.0",
        thumbnail="data:image/png;base64,AAAA",
        extra={"ss_training_comment": "two\nlines", "someone.else": "x"},
    )
    lorad = random_adapter(network, metadata=metadata)
    lorad.save(tmp_path / "a.safetensors", dtype)
    loaded = LoRaD.load(tmp_path / "a.safetensors")
    assert loaded.metadata == metadata
    assert loaded.factors.keys() == lorad.factors.keys()
    for key, pair in lorad.factors.items():
        for got, wanted in zip(loaded.factors[key], pair, strict=True):
            assert got.dtype == dtype and torch.equal(got, wanted.to(dtype))
    first = (tmp_path / "a.safetensors").read_bytes()
    loaded.save(tmp_path / "a.safetensors", dtype)
    assert (tmp_path / "a.safetensors").read_bytes() == first


def test_the_default_is_float16(saved):
    assert {place.dtype for place in read_header(saved).places.values()} == {"F16"}


def test_the_safetensors_library_reads_the_same(saved):
    lorad = LoRaD.load(saved)
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {f"{key}.lorad_{part}" for key in lorad.factors for part in "ab"}
        for key, pair in lorad.factors.items():
            for part, tensor in zip("ab", pair, strict=True):
                assert torch.equal(file.get_tensor(f"{key}.lorad_{part}"), tensor)
    assert metadata == read_header(saved).metadata


def test_the_metadata_that_hosts_and_managers_look_for(saved):
    metadata = read_header(saved).metadata
    fixed = {
        "wadi.format": "1",
        "wadi.alpha_T_squared": "0.0047",
        "wadi.timestep": "999",
        "wadi.prediction_type": "epsilon",
        "wadi.architecture": "unet-custom",
        "wadi.pairing": "interleaved-input",
        "ss_network_module": "wadi_core",
        "ss_network_dim": "2",
        "ss_network_alpha": "None",
        "ss_base_model_version": "unet-custom",
        "ss_output_name": "student",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "wadi_core",
        "modelspec.architecture": "unet-custom/lora",
        "modelspec.title": "student",
        "modelspec.prediction_type": "epsilon",
        "modelspec.timestep_range": "999,999",
        "modelspec.usage_hint": "1 step, CFG 1",
    }
    hashes = {"wadi.sha256", "sshs_model_hash", "sshs_legacy_hash"}
    assert metadata.keys() == fixed.keys() | hashes
    assert {key: metadata[key] for key in fixed} == fixed


def test_the_metadata_of_each_architecture():
    def of(architecture: str, **values: object) -> dict[str, str]:
        return Metadata(architecture, **values).to_strings(256, "name")

    sd15, sd21 = of("sd15"), of("sd21")
    assert (sd15["ss_base_model_version"], sd15["modelspec.architecture"]) == ("sd-v1-5", "stable-diffusion-v1/lora")
    assert (sd21["ss_base_model_version"], sd21["modelspec.architecture"]) == ("sd-v2-1", "stable-diffusion-v2-512/lora")
    assert "ss_v2" not in sd15 and sd21["ss_v2"] == "True"
    assert sd15["modelspec.resolution"] == sd21["modelspec.resolution"] == "512x512"
    assert of("wadi-mini")["ss_base_model_version"] == "wadi-mini"
    velocity = of("sd21", alpha_T_squared=0.0047, timestep=999, prediction_type="v_prediction")
    assert velocity["modelspec.prediction_type"] == "v" and velocity["wadi.prediction_type"] == "v_prediction"
    ordinary = of("sd15")
    assert not {"wadi.timestep", "wadi.alpha_T_squared", "modelspec.timestep_range", "modelspec.usage_hint"} & set(ordinary)
    assert not {"modelspec.license", "modelspec.thumbnail", "wadi.base_sha256"} & set(ordinary)


def test_an_ordinary_adapter_changes_no_sampling(network, tmp_path):
    random_adapter(network).save(tmp_path / "style.safetensors")
    assert LoRaD.load(tmp_path / "style.safetensors").one_step is None


def test_hashes_follow_the_sd_scripts_convention(tmp_path):
    """Computed as sd-scripts does: on the file that safetensors writes with no metadata but ss_*. Large enough that
    the window of the legacy hash, 64 KiB from 1 MiB on, lies inside."""
    factors = {f"lora_unet_{i}": (torch.randn(512, 32), torch.randn(32, 300)) for i in range(30)}
    LoRaD(factors, STUDENT).save(tmp_path / "large.safetensors")
    header = read_header(tmp_path / "large.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "large.safetensors")
    training = {key: value for key, value in header.metadata.items() if key.startswith("ss_")}
    file = io.BytesIO(safetensors.torch.save(tensors, training))
    file.seek(0x100000)
    legacy = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    file.seek(0)
    file.seek(8 + int.from_bytes(file.read(8), "little"))
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(file.read()).hexdigest()
    assert header.metadata["sshs_legacy_hash"] == legacy
    written = (tmp_path / "large.safetensors").read_bytes()
    length = int.from_bytes(written[:8], "little")
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(written[8 + length :]).hexdigest()


def test_the_content_hash_as_documented(saved):
    header, digest = read_header(saved), hashlib.sha256()
    tensors = safetensors.torch.load_file(saved)
    for name in sorted(tensors):
        shape = ", ".join(map(str, tensors[name].shape))
        digest.update(f'["{name}", "F16", [{shape}]]\n'.encode() + tensors[name].numpy().tobytes())
    for key in sorted(header.metadata):
        if key.startswith("wadi.") and key != "wadi.sha256":
            digest.update(f'["{key}", "{header.metadata[key]}"]\n'.encode())
    assert digest.hexdigest() == header.metadata["wadi.sha256"] == content_sha256(tensors, header.metadata)


def test_a_loaded_adapter_does_not_hold_the_file(saved):
    lorad = LoRaD.load(saved)
    before = {key: a.clone() for key, (a, _) in lorad.factors.items()}
    content = saved.read_bytes()
    with open(saved, "r+b") as file:  # in place: a mapping would see it
        file.write(b"\0" * len(content))
    assert all(torch.equal(a, before[key]) for key, (a, _) in lorad.factors.items())
    if Path("/proc/self/maps").exists():
        assert str(saved) not in Path("/proc/self/maps").read_text()


def test_architecture_is_found_out_where_a_file_does_not_say(tmp_path):
    network = unet({"sample_size": 8, "cross_attention_dim": 768, "attention_head_dim": 8}, "meta")
    lorad = LoRaD.create(network, 1)
    tensors = {f"{key}.lorad_{part}": t for key, pair in lorad.factors.items() for part, t in zip("ab", pair, strict=True)}
    safetensors.torch.save_file(tensors, tmp_path / "bare.safetensors")
    assert LoRaD.load(tmp_path / "bare.safetensors").metadata == Metadata("sd15")
    authors = {
        f"unet.{name}.theta_{part}": t
        for name in student_layers(network)
        for part, t in zip("ab", lorad.factors["lora_unet_" + name.replace(".", "_")], strict=True)
    }
    safetensors.torch.save_file(authors, tmp_path / "authors.safetensors")
    loaded = LoRaD.load(tmp_path / "authors.safetensors")
    assert loaded.metadata == Metadata("sd15", 0.0047, 999) and loaded.factors.keys() == lorad.factors.keys()


@pytest.mark.parametrize("prefix", ["", "transformer.", "module.", "module.transformer."])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_the_authors_pixart_factors(tmp_path, prefix, ending):
    network = pixart(SMALL_PIXART)
    lorad = random_adapter(network)
    tensors = {
        f"{prefix}{key.removeprefix('transformer.')}.theta_{part}": t
        for key, pair in lorad.factors.items()
        for part, t in zip("ab", pair, strict=True)
    }
    path = tmp_path / f"kduv{ending}"
    torch.save(tensors, path) if ending == ".pth" else safetensors.torch.save_file(tensors, path)
    loaded = LoRaD.load(path)
    assert loaded.metadata == Metadata("pixart-alpha", 0.0047, 999)
    loaded.matched(network).check()
    assert all(torch.equal(loaded.factors[key][0], a) for key, (a, _) in lorad.factors.items())


@pytest.mark.parametrize(
    "values",
    [
        {"architecture": "sdxl"},
        {"prediction_type": "v"},
        {"alpha_T_squared": 0.0047},
        {"timestep": 999},
        {"alpha_T_squared": 5e-324, "timestep": 999},
        {"alpha_T_squared": 1e-12, "timestep": 999},
        {"alpha_T_squared": 2.0, "timestep": 999},
        {"base_sha256": "abc"},
    ],
)
def test_metadata_that_no_file_may_hold(values):
    with pytest.raises(ValueError) as caught:
        Metadata(**values)
    assert "\n" not in str(caught.value)


def test_numbers_that_the_type_cannot_hold_are_not_saved(tmp_path):
    large = LoRaD({"lora_unet_x": (torch.full((2, 1), 1e5), torch.full((1, 2), 1e-5))})
    with pytest.raises(ValueError, match="NaN, Inf"):
        large.save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
    large.save(tmp_path / "x.safetensors", torch.float32)
    with pytest.raises(ValueError, match="not torch.float64"):
        large.save(tmp_path / "x.safetensors", torch.float64)


def test_saving_where_it_cannot_be_saved(tmp_path, network):
    lorad = random_adapter(network)
    (tmp_path / "folder.safetensors").mkdir()
    for target in (tmp_path / "nowhere" / "x.safetensors", tmp_path / "folder.safetensors"):
        with pytest.raises(OSError) as caught:
            lorad.save(target)
        assert str(target) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


def test_what_the_json_of_the_header_looks_like(saved):
    """The form of the safetensors library: no spaces inside, padded to 8 bytes, UTF-8."""
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length]
    assert length % 8 == 0
    assert json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False) == text.decode().rstrip(" ")
