"""What the hub of the tests holds: a base as published repositories have it, and a one-step network released for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networks
import torch
from hub_server import Repository, folder_files

from wadi_core.lorad.checkpoint import write_safetensors

BASE, AUTHORS = "stable-diffusion-v1-5/stable-diffusion-v1-5", "gudaochangsheng/WaDi"
NETWORK = "rotated_unet-sdv1-5.safetensors"
NETWORK_21 = "rotated_unet-sdv2-1.safetensors"
PIXART, NETWORK_PIXART = "PixArt-alpha/PixArt-XL-2-256x256", "rotated_transformer.safetensors"
# Every block and every layer of Stable Diffusion 1.5, narrow.
TRUE_SHAPE: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": 2, "cross_attention_dim": 32, "sample_size": 8},
    "vae": networks.SMALL["vae"],
    "text_encoder": networks.SMALL["text_encoder"],
}
# What lies beside the weights in such repositories and is never to be fetched.
STRANGERS = (
    "v1-5-pruned.safetensors",
    "v1-5-pruned-emaonly.ckpt",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.onnx",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
    "README.md",
)


def base_repository(place: Path, architecture: str = "sd15", changes: dict[str, dict[str, Any]] | None = None) -> Repository:
    """A base in both precisions, with everything beside it that such repositories hold; its folder is ``place``."""
    folder = networks.write_settings(place, architecture, changes or TRUE_SHAPE)
    weights = networks.states(networks.make_networks(folder))
    for part, state in weights.items():
        name = f"{networks.STEMS[part]}.fp16.safetensors"
        write_safetensors(folder / part / name, {key: tensor.half() for key, tensor in state.items()}, {"format": "pt"})
    networks.write_folder(folder, weights)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return Repository({**folder_files(folder), **dict.fromkeys(STRANGERS, b"never to be fetched")})


def released_network(base: Path, path: Path, part: str = "unet", spread: float = 0.1) -> Path:
    """A base's network, rotated by random angles of rank 4, complete and in one file as the authors released theirs."""
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    kind: Any = UNet2DConditionModel if part == "unet" else PixArtTransformer2DModel
    network = kind.from_pretrained(base / part, local_files_only=True, use_safetensors=True)
    lorad = networks.random_lorad(network, spread=spread)
    lorad.fuse_into(network, keep_backup=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, {"format": "pt"})
    return path


def random_file(size: int) -> bytes:
    """Bytes that no two of which are alike for long."""
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
