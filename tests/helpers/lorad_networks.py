"""Networks for the adapter's tests: small ones with random weights, full-size ones on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wadi_core.lorad import LoRaD, Metadata

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
MINI: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (96, 192, 192),
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "norm_num_groups": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
PIXART: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 32,
    "patch_size": 2,
    "caption_channels": 4096,
    "norm_type": "ada_norm_single",
}
SMALL_PIXART = {
    **PIXART,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "sample_size": 8,
}


def unet(config: dict[str, Any], device: str = "cpu") -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        return UNet2DConditionModel(**config).eval().requires_grad_(False)


def pixart(config: dict[str, Any], device: str = "cpu") -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    with torch.device(device):
        return PixArtTransformer2DModel(**config).eval().requires_grad_(False)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, copied."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


STUDENT = Metadata("unet-custom", alpha_T_squared=0.0047, timestep=999)


def random_adapter(network: nn.Module, rank: int = 2, metadata: Metadata | None = None, seed: int = 0) -> LoRaD:
    generator = torch.Generator().manual_seed(seed)
    lorad = LoRaD.create(network, rank, generator=generator)
    factors = {key: (torch.randn(a.shape, generator=generator) * 0.3, b) for key, (a, b) in lorad.factors.items()}
    return LoRaD(factors, metadata or lorad.metadata)
