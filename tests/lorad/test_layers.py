"""Which layers LoRaD takes, what they are called, and how many numbers that makes."""

from __future__ import annotations

import pytest
import torch
from layout_networks import sdxl_shapes
from lorad_networks import MINI, PIXART, SD15, SD21, SMALL, SMALL_PIXART, pixart, unet
from torch import nn

from wadi_core.lorad import LoRaD
from wadi_core.lorad.layers import (
    adapter_key,
    detect_architecture,
    fake_score_layers,
    layers_of_keys,
    linear_shapes,
    network_sha256,
    student_layers,
)

# architecture: student layers, rank, parameters; fake-score layers, rank, parameters
COUNTS = {
    "sd15": (182, 256, 83_795_968, 160, 32, 9_378_816),
    "sd21": (214, 256, 94_429_184, 160, 32, 9_509_888),
    "pixart-alpha": (283, 128, 81_219_584, 280, 32, 20_127_744),
}


def on_meta(architecture: str) -> nn.Module:
    if architecture == "pixart-alpha":
        return pixart(PIXART, "meta")
    return unet({"sd15": SD15, "sd21": SD21, "wadi-mini": MINI}[architecture], "meta")


@pytest.fixture(scope="module", params=list(COUNTS))
def full(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, on_meta(request.param)


def test_counts_of_layers_and_parameters(full):
    architecture, network = full
    layers, rank, parameters, fake_layers, fake_rank, fake_parameters = COUNTS[architecture]
    assert detect_architecture(network) == architecture
    student, fake = student_layers(network, architecture), fake_score_layers(network, architecture)
    assert (len(student), len(fake)) == (layers, fake_layers)
    assert set(fake) < set(student)
    assert LoRaD.create(network, rank).parameters_count == parameters
    assert LoRaD.create(network, fake_rank, layers=fake).parameters_count == fake_parameters


def test_the_header_of_a_file_is_read_as_the_network_is(full):
    architecture, network = full
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert detect_architecture(shapes) == architecture
    assert student_layers(shapes, architecture) == student_layers(network, architecture)
    assert fake_score_layers(shapes) == fake_score_layers(network)


def test_keys_resolve_to_their_layers(full):
    architecture, network = full
    paths = linear_shapes(network)
    keys = {adapter_key(path, architecture): path for path in paths}
    assert len(keys) == len(paths)
    assert layers_of_keys([*keys, "lora_unet_nowhere"], network, architecture) == keys
    if architecture != "pixart-alpha":
        assert not any("." in key for key in keys)  # A1111 splits a key at its first dot


def test_key_names_are_those_of_the_file_format():
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert adapter_key(path, "sd15") == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    path = "transformer_blocks.0.attn1.to_q"
    assert adapter_key(path, "pixart-alpha") == "transformer.transformer_blocks.0.attn1.to_q"


def test_only_linear_layers_are_taken_and_every_one_in_the_blocks():
    network = on_meta("sd21")
    layers = dict(network.named_modules())
    student = student_layers(network, "sd21")
    assert all(isinstance(layers[path], nn.Linear) for path in student)
    left = {path for path, layer in layers.items() if isinstance(layer, nn.Linear)} - set(student)
    assert left == {"time_embedding.linear_1", "time_embedding.linear_2"}


def test_the_embedded_model_and_small_networks_are_told_apart():
    assert detect_architecture(on_meta("wadi-mini")) == "wadi-mini"
    assert detect_architecture(unet(SMALL, "meta")) == "unet-custom"
    assert detect_architecture(pixart(SMALL_PIXART, "meta")) == "pixart-alpha"
    one_block_less = {**SD15, "layers_per_block": 1}
    assert detect_architecture(unet(one_block_less, "meta")) == "unet-custom"


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (sdxl_shapes, "Stable Diffusion XL"),
        (lambda: {"model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320)}, "LDM layout"),
        (lambda: {"context_embedder.weight": (1536, 4096)}, "Stable Diffusion 3"),
        (lambda: {"controlnet_down_blocks.0.weight": (320, 320, 1, 1)}, "ControlNet"),
        (lambda: {"encoder.layers.0.weight": (10, 10)}, "no network that LoRaD knows"),
        (dict, "no network that LoRaD knows"),
    ],
)
def test_other_networks_are_refused_by_name(shapes, said):
    with pytest.raises(ValueError, match=said) as caught:
        detect_architecture(shapes())
    assert "\n" not in str(caught.value)


def test_the_checksum_of_a_base_knows_it_again_in_half_precision_and_under_adapters():
    network = unet(SMALL)
    checksum = network_sha256(network)
    assert network_sha256(network.state_dict()) == checksum
    adapter = LoRaD.create(network, 2)
    adapter.apply_to(network)
    assert network_sha256(network) == checksum
    adapter.remove(network)
    assert network_sha256(network.half()) == checksum
    with torch.no_grad():
        network.get_submodule(student_layers(network)[0]).weight[0, 0] += 1
    assert network_sha256(network) != checksum
