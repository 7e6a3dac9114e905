"""Networks with random weights in the forms that ComfyUI's loaders recognise, as small as these allow.

ComfyUI knows Stable Diffusion 1.5 by its widths (320, 768) and counts the rest, so two levels of one block will do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from layout_networks import ldm_state
from torch import Tensor, nn

from wadi_core import LoRaD
from wadi_core.embeddings import Embedding
from wadi_core.lorad import Metadata
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.lorad.layers import adapter_key, linear_shapes, student_layers

State = dict[str, Tensor]

SLICE: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 320),
    "layers_per_block": 1,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
PIXART: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 1,
    "cross_attention_dim": 1152,
    "sample_size": 32,
    "patch_size": 2,
    "caption_channels": 4096,
    "norm_type": "ada_norm_single",
}
SD15_VAE_SCALE = 0.18215


def unet(config: dict[str, Any], seed: int = 0) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**config).eval().requires_grad_(False)


def pixart(seed: int = 0) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(seed)
    return PixArtTransformer2DModel(**PIXART).eval().requires_grad_(False)


def random_word(token: str, width: int, vectors: int = 2) -> Embedding:
    """A learned word with random vectors."""
    return Embedding(token, torch.randn(vectors, width, generator=torch.Generator().manual_seed(8)))


def taesd() -> State:
    """Random weights of the tiny autoencoder, under the names by which ComfyUI knows it."""

    def block(seed: int) -> dict[str, tuple[int, ...]]:
        return {f"{seed}.conv.{place}": (64, 64, 3, 3) for place in (0, 2, 4)}

    decoder = {"1": (64, 4, 3, 3)}
    for start in (3, 8, 13):
        for place in (start, start + 1, start + 2):
            decoder |= block(place)
        decoder[str(start + 4)] = (64, 64, 3, 3)
    decoder |= block(18) | {"19": (3, 64, 3, 3)}
    encoder = {"0": (64, 3, 3, 3), **block(1)}
    for start in (2, 6, 10):
        encoder[str(start)] = (64, 64, 3, 3)
        for place in (start + 1, start + 2, start + 3):
            encoder |= block(place)
    encoder["14"] = (4, 64, 3, 3)
    generator = torch.Generator().manual_seed(5)
    state = {}
    without_bias = {"taesd_decoder": ("7", "12", "17"), "taesd_encoder": ("2", "6", "10")}
    for part, shapes in (("taesd_decoder", decoder), ("taesd_encoder", encoder)):
        for name, shape in shapes.items():
            state[f"{part}.{name}.weight"] = torch.randn(shape, generator=generator) * (shape[1] * 9) ** -0.5
            if name not in without_bias[part]:
                state[f"{part}.{name}.bias"] = torch.zeros(shape[0])
    return state


def clip_l() -> State:
    """Random weights of Stable Diffusion 1.5's text encoder, as in its checkpoints, in half precision."""
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    torch.manual_seed(6)
    made = CLIPTextModel(CLIPTextConfig(**settings, hidden_act="quick_gelu", projection_dim=768)).half().state_dict()
    names = {name: name.removeprefix("text_model.") for name in made}
    return {f"cond_stage_model.transformer.text_model.{names[name]}": tensor for name, tensor in made.items()}


def checkpoint(path: Path, network: nn.Module, config: dict[str, Any]) -> None:
    """A checkpoint of Stable Diffusion 1.5's kind: this U-Net, a text encoder and a tiny autoencoder."""
    tensors = ldm_state(dict(network.state_dict()), config)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in taesd().items()} | clip_l()
    write_safetensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()})


def diffusion_model(path: Path, network: nn.Module, config: dict[str, Any]) -> None:
    """The U-Net alone, in the layout of checkpoints without their prefix."""
    tensors = ldm_state(dict(network.state_dict()), config, prefix="")
    write_safetensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()})


def random_lora(network: nn.Module, rank: int = 4, seed: int = 3, spread: float = 0.05) -> State:
    """A plain LoRA on the layers that a LoRaD takes, in the names of sd-scripts, alpha equal to the rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes, tensors = linear_shapes(network), {}
    for path in student_layers(network):
        out_features, in_features = shapes[path]
        key = adapter_key(path, "sd15")
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, in_features, generator=generator) * spread
        tensors[f"{key}.lora_up.weight"] = torch.randn(out_features, rank, generator=generator) * spread
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    return tensors


def lora_delta(lora: State, path: str) -> Tensor:
    """What a LoRA of :func:`random_lora` adds to a layer's weight."""
    key = adapter_key(path, "sd15")
    return lora[f"{key}.lora_up.weight"] @ lora[f"{key}.lora_down.weight"]


def pixart_lorad(network: nn.Module, rank: int = 4, seed: int = 1, spread: float = 0.3) -> LoRaD:
    """Random angles for PixArt."""
    lorad = LoRaD.create(network, rank, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    factors = {key: (torch.randn(a.shape, generator=generator) * spread, b) for key, (a, b) in lorad.factors.items()}
    return LoRaD(factors, Metadata("pixart-alpha", 0.0047, 999))
