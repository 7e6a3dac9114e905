"""Layers are found in every layout, and other networks are told by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_networks import LDM, ldm_state, pixart_original, sdxl_shapes
from lorad_networks import MINI, PIXART, SD15, SD21, SMALL, SMALL_PIXART, pixart, unet

from wadi_core.lorad.layers import adapter_key, linear_shapes, student_layers
from wadi_core.lorad.layouts import Place, detect, path_of_key

UNETS = {"sd15": SD15, "sd21": SD21, "wadi-mini": MINI, "unet-custom": SMALL}


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def with_defaults(config):
    return {**dict(unet(config, "meta").config), **config}


@pytest.fixture(scope="module", params=UNETS)
def network(request):
    module = unet(UNETS[request.param], "meta")
    return request.param, module, dict(module.config)


@pytest.mark.parametrize(("prefix", "name"), [(LDM, "ldm"), ("diffusion_model.", "comfy"), ("", "bare")])
def test_ldm_names_are_those_that_diffusers_converts(network, prefix, name):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    architecture, module, config = network
    state = ldm_state(module.state_dict(), config, prefix)
    layout = detect(shapes_of(state))
    assert (layout.name, layout.prefix, layout.architecture) == (name, prefix, architecture)
    assert set(layout.layers()) == set(student_layers(module, architecture))
    assert dict(layout.shapes) == linear_shapes(module)
    # diffusers' own converter takes each tensor from where this layout says that it lies.
    known = {LDM + full.removeprefix(prefix): full for full in state}
    converted = convert_ldm_unet_checkpoint(known, config)
    places = {path: Place(converted[f"{path}.weight"]) for path in linear_shapes(module)}
    assert dict(layout.places) == places


@pytest.mark.parametrize("prefix", ["", "unet.", "module.", "module.unet."])
def test_diffusers_names(network, prefix):
    architecture, module, _ = network
    layout = detect({prefix + name: shape for name, shape in shapes_of(module.state_dict()).items()})
    assert (layout.name, layout.prefix, layout.architecture) == ("diffusers", prefix, architecture)
    assert list(layout.layers()) == student_layers(module)
    assert all(place == Place(f"{prefix}{path}.weight") for path, place in layout.places.items())
    assert str(layout) == f"{architecture} in diffusers layout"


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_pixart_original_names_hold_several_layers_in_one_tensor(prefix):
    module = pixart(PIXART, "meta")
    state = pixart_original(module.state_dict(), prefix)
    layout = detect(shapes_of(state))
    assert (layout.name, layout.prefix, layout.architecture) == ("pixart", prefix, "pixart-alpha")
    assert len(layout.layers()) == 283
    assert dict(layout.shapes) == linear_shapes(module)
    block = "transformer_blocks.7."
    qkv, kv = f"{prefix}blocks.7.attn.qkv.weight", f"{prefix}blocks.7.cross_attn.kv_linear.weight"
    assert layout.places[block + "attn1.to_q"] == Place(qkv, slice(0, 1152))
    assert layout.places[block + "attn1.to_v"] == Place(qkv, slice(2304, 3456))
    assert layout.places[block + "attn2.to_k"] == Place(kv, slice(0, 1152))
    assert layout.places[block + "attn2.to_v"] == Place(kv, slice(1152, 2304))
    assert layout.places[block + "attn2.to_q"] == Place(f"{prefix}blocks.7.cross_attn.q_linear.weight")


def test_pixart_in_diffusers_names():
    module = pixart(SMALL_PIXART, "meta")
    layout = detect({f"transformer.{name}": shape for name, shape in shapes_of(module.state_dict()).items()})
    assert (layout.name, layout.prefix) == ("diffusers", "transformer.")
    assert list(layout.layers()) == student_layers(module)


def test_pixart_micro_conditions_are_known():
    state = pixart_original(pixart(SMALL_PIXART, "meta").state_dict())
    state |= {f"{which}_embedder.mlp.{place}.weight": torch.empty(5, 16) for which in ("csize", "ar") for place in (0, 2)}
    places = detect(shapes_of(state)).places
    assert places["adaln_single.emb.aspect_ratio_embedder.linear_2"].name == "ar_embedder.mlp.2.weight"
    assert places["adaln_single.emb.resolution_embedder.linear_1"].name == "csize_embedder.mlp.0.weight"


def test_an_inpainting_network_has_the_same_layers():
    module = unet({**SMALL, "in_channels": 9}, "meta")
    assert detect(shapes_of(ldm_state(module.state_dict(), SMALL))).architecture == "unet-custom"


@settings(max_examples=12)
@given(levels=st.integers(1, 4), depth=st.integers(1, 3), width=st.sampled_from([8, 16]), linear=st.booleans(), data=st.data())
def test_any_network_of_the_family_is_numbered_right(levels, depth, width, linear, data):
    down = [data.draw(st.sampled_from(["CrossAttnDownBlock2D", "DownBlock2D"])) for _ in range(levels)]
    config = {
        **SMALL,
        "block_out_channels": tuple(width * (level + 1) for level in range(levels)),
        "norm_num_groups": 4,
        "layers_per_block": depth,
        "use_linear_projection": linear,
        "down_block_types": tuple(down),
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(down)),
    }
    module = unet(config, "meta")
    layout = detect(shapes_of(ldm_state(module.state_dict(), with_defaults(config))))
    assert dict(layout.shapes) == linear_shapes(module)
    assert all(path_of_key(adapter_key(path, "unet-custom")) == path for path in layout.shapes)


def test_keys_of_an_adapter_are_read_without_a_network():
    assert path_of_key("transformer.transformer_blocks.0.attn1.to_q") == "transformer_blocks.0.attn1.to_q"
    key = "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj"
    assert path_of_key(key) == "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj"
    assert path_of_key("lora_unet_mid_block_resnets_1_time_emb_proj") == "mid_block.resnets.1.time_emb_proj"
    for nonsense in ("lora_unet_", "lora_te_text_model_encoder_layers_0_mlp_fc1", "elsewhere"):
        with pytest.raises(ValueError, match="no key of a layer"):
            path_of_key(nonsense)


def small_ldm(**more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return shapes_of(ldm_state(unet(SMALL, "meta").state_dict())) | {LDM + name: shape for name, shape in more.items()}


def uneven() -> dict[str, tuple[int, ...]]:
    return small_ldm(**{"input_blocks.3.0.op.weight": (64, 64, 3, 3)})


def fused_badly() -> dict[str, tuple[int, ...]]:
    shapes = shapes_of(pixart_original(pixart(SMALL_PIXART, "meta").state_dict()))
    return shapes | {"blocks.0.attn.qkv.weight": (47, 16)}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (sdxl_shapes, "Stable Diffusion XL"),
        (lambda: small_ldm(**{"label_emb.0.0.weight": (1280, 2816)}), "Stable Diffusion XL"),
        (lambda: small_ldm(**{"input_hint_block.0.weight": (16, 3, 3, 3)}), "a ControlNet"),
        (lambda: small_ldm(**{"input_blocks.1.1.time_stack.0.attn1.to_q.weight": (32, 32)}), "a video network"),
        (uneven, "levels are not equally deep"),
        (fused_badly, "3 layers cannot share"),
        (lambda: {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (1536, 512)}, "Stable Diffusion 3"),
        (lambda: {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "Flux"),
        (lambda: {"lora_unet_down_blocks_0_x.lora_up.weight": (8, 4)}, "an ordinary LoRA"),
        (lambda: {"lora_unet_down_blocks_0_x.lorad_a": (8, 4)}, "a LoRaD adapter"),
        (lambda: {"down_blocks.0.x.theta_a": (8, 4)}, "authors' LoRaD factors"),
        (lambda: {"encoder.layers.0.weight": (10, 10)}, "no network in it"),
        (dict, "no network in it"),
    ],
)
def test_what_is_something_else_is_refused_by_name(shapes, said):
    with pytest.raises(ValueError, match=said) as caught:
        detect(shapes())
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match="two of its tensors are the layer"):
        detect(small_ldm(**{"input_blocks.01.0.emb_layers.1.weight": (32, 128)}))
