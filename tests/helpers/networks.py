"""Small Stable Diffusions with random weights for the tests, as folders and as single files in the LDM layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi_core import LoRaD, configs
from wadi_core.base import PARTS, STEMS
from wadi_core.lorad import Metadata
from wadi_core.lorad.checkpoint import write_safetensors

State = dict[str, Tensor]

CHANNELS = [32, 64]
SMALL = {
    "unet": {
        "block_out_channels": CHANNELS,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 32,
        "layers_per_block": 1,
        "sample_size": 8,
    },
    "vae": {"block_out_channels": [32, 32, 32, 64], "layers_per_block": 1, "sample_size": 64},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
}
HEADS = {"sd15": 2, "sd21": [1, 2]}
# As small as can be, for pictures of 128 pixels: an autoencoder of few channels, which is most of the work at that size.
TINY = {
    "unet": {**SMALL["unet"], "attention_head_dim": HEADS["sd15"], "sample_size": 16},
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 128},
    "text_encoder": SMALL["text_encoder"],
}
# One level of SD1.5's own width, with its attention, time embedding and feed-forward at full size.
FULL_WIDTH = {
    "unet": {
        "block_out_channels": [320],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "sample_size": 8,
    },
    "vae": SMALL["vae"],
    "text_encoder": {"num_hidden_layers": 1},
}


def small_settings(architecture: str) -> dict[str, dict[str, Any]]:
    """The changes that make a small network of the shipped settings of ``sd15`` or ``sd21``."""
    return {**SMALL, "unet": {**SMALL["unet"], "attention_head_dim": HEADS[architecture]}}


def write_settings(folder: Path, architecture: str, changes: dict[str, dict[str, Any]] | None = None) -> Path:
    """A folder with the shipped settings of an architecture, changed, and no weights."""
    shutil.copytree(configs.folder(architecture), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "__pycache__"))
    for part, values in (changes or {}).items():
        path = folder / part / "config.json"
        path.write_text(json.dumps({**configs.read(path), **values}))
    return folder


def make_networks(folder: Path, seed: int = 0) -> dict[str, torch.nn.Module]:
    """Networks of a folder's settings with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    read = {part: configs.read(folder / part / "config.json") for part in PARTS}
    torch.manual_seed(seed)
    return {
        "unet": UNet2DConditionModel.from_config(read["unet"]).eval(),
        "vae": AutoencoderKL.from_config(read["vae"]).eval(),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(read["text_encoder"])).eval(),
    }


def states(networks: dict[str, torch.nn.Module]) -> dict[str, State]:
    """The weights of each network; the text encoder's without the "text_model." that some versions put before them."""
    found = {part: dict(network.state_dict()) for part, network in networks.items()}
    found["text_encoder"] = {name.removeprefix("text_model."): tensor for name, tensor in found["text_encoder"].items()}
    return found


def write_folder(folder: Path, weights: dict[str, State]) -> Path:
    """Put weights into a folder of settings, under the names that most such folders have."""
    text_encoder = {f"text_model.{name}": tensor for name, tensor in weights["text_encoder"].items()}
    for part, tensors in {**weights, "text_encoder": text_encoder}.items():
        write_safetensors(folder / part / f"{STEMS[part]}.safetensors", tensors, {"format": "pt"})
    return folder


def write_base(
    folder: Path, architecture: str = "sd15", changes: dict[str, dict[str, Any]] | None = None
) -> tuple[Path, dict[str, torch.nn.Module]]:
    """A diffusers folder of networks with random weights, small ones where no changes are given; the networks too."""
    write_settings(folder, architecture, changes or small_settings(architecture))
    made = make_networks(folder)
    return write_folder(folder, states(made)), made


def write_single_file(path: Path, weights: dict[str, State], settings: Path, metadata: dict[str, str] | None = None) -> Path:
    """The same weights as one checkpoint in the LDM layout, as the authors of Stable Diffusion published theirs."""
    unet, vae, text = (configs.read(settings / part / "config.json") for part in PARTS)
    tensors = {f"model.diffusion_model.{ldm_unet_name(name, unet)}": t for name, t in weights["unet"].items()}
    tensors |= dict(ldm_vae_tensor(name, tensor, vae) for name, tensor in weights["vae"].items())
    tensors |= (
        open_clip_tensors(weights["text_encoder"], text)
        if text["hidden_act"] == "gelu"
        else clip_tensors(weights["text_encoder"])
    )
    write_safetensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    return path


UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_unet_name(name: str, settings: dict[str, Any]) -> str:
    """The LDM name of a U-Net's tensor, from its diffusers name: blocks there are numbered in one row."""
    layer, _, kind = name.rpartition(".")
    if layer in UNET_TOP:
        return f"{UNET_TOP[layer]}.{kind}"
    per_block = settings["layers_per_block"] + 1
    block, *rest = layer.split(".")
    if block == "mid_block":
        place = f"middle_block.{1 if rest[0] == 'attentions' else 2 * int(rest[1])}"
        what, inner = rest[0], rest[2:]
    else:
        level, what, number, inner = int(rest[0]), rest[1], int(rest[2]), rest[3:]
        start, row = (1, "input_blocks") if block == "down_blocks" else (0, "output_blocks")
        if what == "downsamplers":
            return f"input_blocks.{(level + 1) * per_block}.0.op.{kind}"
        if what == "upsamplers":
            attention = settings["up_block_types"][level].startswith("CrossAttn")
            return f"output_blocks.{(level + 1) * per_block - 1}.{2 if attention else 1}.conv.{kind}"
        place = f"{row}.{start + level * per_block + number}.{0 if what == 'resnets' else 1}"
    path = UNET_RESNET[inner[0]] if what == "resnets" else ".".join(inner)
    return f"{place}.{path}.{kind}"


VAE_NAMES = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def ldm_vae_tensor(name: str, tensor: Tensor, settings: dict[str, Any]) -> tuple[str, Tensor]:
    """The LDM name of an autoencoder's tensor; its attention is written as 1x1 convolutions there."""
    levels = len(settings["block_out_channels"])
    if ".attentions." in name and tensor.ndim == 2:
        tensor = tensor[:, :, None, None]
    for level in range(levels):
        name = name.replace(f"decoder.up_blocks.{level}.", f"decoder.up.{levels - 1 - level}.")
        name = name.replace(f"encoder.down_blocks.{level}.", f"encoder.down.{level}.")
    for diffusers_name, ldm_name in VAE_NAMES.items():
        name = name.replace(diffusers_name, ldm_name)
    return f"first_stage_model.{name}", tensor


def clip_tensors(weights: State) -> State:
    prefix = "cond_stage_model.transformer.text_model."
    positions = torch.arange(77)[None].float()  # stored as numbers with a point by mistake, in many files
    return {prefix + name: tensor for name, tensor in weights.items()} | {prefix + "embeddings.position_ids": positions}


OPEN_CLIP_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_tensors(weights: State, settings: dict[str, Any]) -> State:
    """OpenCLIP's names, query, key and value in one tensor, and the unused parts that are in published files."""
    prefix = "cond_stage_model.model."
    found = {}
    for name, tensor in weights.items():
        if ".self_attn.q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{which}_proj.")] for which in "qkv"]
            name, tensor = name.replace(".self_attn.q_proj.", ".attn.in_proj_"), torch.cat(parts)
        elif ".self_attn." in name and "out_proj" not in name:
            continue
        for clip_name, open_clip_name in OPEN_CLIP_NAMES.items():
            name = name.replace(clip_name, open_clip_name)
        found[prefix + name] = tensor
    last, unused = (f".resblocks.{settings['num_hidden_layers'] - i}." for i in (1, 0))
    found |= {name.replace(last, unused): torch.zeros_like(tensor) for name, tensor in found.items() if last in name}
    width = settings["hidden_size"]
    return found | {prefix + "text_projection": torch.zeros(width, width), prefix + "logit_scale": torch.tensor(4.6)}


def random_lorad(unet: torch.nn.Module, rank: int = 4, seed: int = 1, spread: float = 0.3, one_step: bool = True) -> LoRaD:
    """An adapter with random angles for a network."""
    generator = torch.Generator().manual_seed(seed)
    lorad = LoRaD.create(unet, rank, generator=generator)
    factors = {key: (torch.randn(a.shape, generator=generator) * spread, b) for key, (a, b) in lorad.factors.items()}
    schedule = {"alpha_T_squared": 0.0047, "timestep": 999} if one_step else {}
    return LoRaD(factors, Metadata(architecture=lorad.metadata.architecture, **schedule))
