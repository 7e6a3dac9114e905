"""State dicts of the tests' networks in the layouts that other programs use."""

from __future__ import annotations

from typing import Any

import torch
from lorad_networks import SMALL, SMALL_PIXART, pixart, unet
from networks import ldm_unet_name
from torch import Tensor

State = dict[str, Tensor]

LDM = "model.diffusion_model."
SMALL_LINEAR = {**SMALL, "use_linear_projection": True}


def small_state(config: dict[str, Any] = SMALL, seed: int = 0) -> State:
    """A small U-Net with random weights, in diffusers layout."""
    torch.manual_seed(seed)
    return dict(unet(config).state_dict())


def small_pixart_state(seed: int = 0) -> State:
    torch.manual_seed(seed)
    state = dict(pixart(SMALL_PIXART).state_dict())
    return {name: tensor for name, tensor in state.items() if name != "pos_embed.pos_embed"}


def ldm_state(state: State, config: dict[str, Any] = SMALL, prefix: str = LDM) -> State:
    """A U-Net in the LDM layout, with a tensor of another part beside it where the prefix leaves room for one."""
    other = {"first_stage_model.decoder.conv_in.weight": torch.arange(36.0).reshape(1, 4, 3, 3)} if prefix == LDM else {}
    return {prefix + ldm_unet_name(name, config): tensor for name, tensor in state.items()} | other


PIXART_FUSED = {
    "attn1.to_q": ("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    "attn2.to_k": ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
}
PIXART_NAMES = {
    "transformer_blocks.": "blocks.",
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "caption_projection.linear_": "y_embedder.y_proj.fc",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "pos_embed.proj": "x_embedder.proj",
}


def pixart_original(state: State, prefix: str = "") -> State:
    """A PixArt transformer as its authors name it: query, key and value in one tensor."""
    found = {}
    for name, tensor in state.items():
        if name.startswith("proj_out.") or name == "scale_shift_table":
            name = f"final_layer.{name.replace('proj_out', 'linear')}"
        for first, (fused, parts) in PIXART_FUSED.items():
            if f".{first}." in name:
                tensor = torch.cat([state[name.replace(first, part)] for part in parts])
                name = name.replace(first, fused)
        if any(f".{part}." in name for _, parts in PIXART_FUSED.values() for part in parts[1:]):
            continue
        for ours, theirs in PIXART_NAMES.items():
            name = name.replace(ours, theirs)
        found[prefix + name] = tensor
    return found


def sdxl_shapes() -> dict[str, tuple[int, ...]]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
