"""A small Stable Diffusion in the LDM (CompVis) layout: names of its tensors, and the settings file that A1111 wants.

The other direction, from LDM names to diffusers paths, is in :mod:`~..lorad.layouts` for the layers that LoRaD turns;
the two are tested against each other. Here are all tensors of the three networks, as one checkpoint holds them. In the
LDM layout the blocks of a U-Net are numbered in one row, and an autoencoder's decoder counts its levels from the
other end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

Settings: TypeAlias = Mapping[str, Any]
State: TypeAlias = Mapping[str, Tensor]

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."}

_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Of an autoencoder's layers outside its levels; first match counts.
_VAE_RULES: tuple[tuple[str, str], ...] = (
    (r"(.+)\.mid_block\.attentions\.0\.group_norm", r"\1.mid.attn_1.norm"),
    (r"(.+)\.mid_block\.attentions\.0\.to_([qkv])", r"\1.mid.attn_1.\2"),
    (r"(.+)\.mid_block\.attentions\.0\.to_out\.0", r"\1.mid.attn_1.proj_out"),
    (r"(.+)\.conv_norm_out", r"\1.norm_out"),
    (r"(encoder|decoder)\.(conv_in|conv_out)", r"\1.\2"),
    (r"(quant_conv|post_quant_conv)", r"\1"),
)


def checkpoint(weights: Mapping[str, State], settings: Mapping[str, Settings]) -> dict[str, Tensor]:
    """The tensors of one checkpoint.

    Args:
        weights: of ``unet``, ``vae`` and ``text_encoder`` (CLIP's, with ``text_model.`` before its names), each in
            diffusers' names.
        settings: of the same parts, as in their ``config.json``.

    Raises:
        ValueError: a name that no network of this kind has; one line.
    """
    levels = len(settings["vae"]["block_out_channels"])
    rename: dict[str, Callable[[str], str]] = {
        "unet": lambda layer: unet_layer(layer, settings["unet"]),
        "vae": lambda layer: vae_layer(layer, levels),
        "text_encoder": lambda layer: layer,
    }
    tensors = {}
    for part, prefix in PREFIXES.items():
        for name, tensor in weights[part].items():
            layer, _, kind = name.rpartition(".")
            if part == "vae" and ".attentions." in layer and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]  # its attention is made of 1x1 convolutions there
            tensors[f"{prefix}{rename[part](layer)}.{kind}"] = tensor
    return tensors


def unet_layer(layer: str, settings: Settings) -> str:
    """The LDM path of a U-Net's layer, from its diffusers path."""
    if layer in _UNET_TOP:
        return _UNET_TOP[layer]
    row = settings["layers_per_block"] + 1  # blocks that make a level: the residual ones and the one that resizes
    found = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", layer)
    if found is None:
        raise ValueError(f"{layer}: a U-Net of Stable Diffusion has no layer of this name")
    side, level, kind, number, inner = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        inner = _UNET_RESNET.get(inner, inner)
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * row}.0.op"
    if kind == "upsamplers":
        place = 2 if settings["up_block_types"][level].startswith("CrossAttn") else 1
        return f"output_blocks.{(level + 1) * row - 1}.{place}.conv"
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{inner}"
    block = f"input_blocks.{1 + level * row + number}" if side == "down" else f"output_blocks.{level * row + number}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{inner}"


def vae_layer(layer: str, levels: int) -> str:
    """The LDM path of an autoencoder's layer, from its diffusers path."""
    for pattern, replacement in _VAE_RULES:
        if found := re.fullmatch(pattern, layer):
            return found.expand(replacement)
    layer = layer.replace("conv_shortcut", "nin_shortcut")
    if found := re.fullmatch(r"(.+)\.mid_block\.resnets\.(\d+)\.(.+)", layer):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"
    found = re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", layer)
    if found is None:
        raise ValueError(f"{layer}: an autoencoder of Stable Diffusion has no layer of this name")
    level = int(found[3]) if found[2] == "down" else levels - 1 - int(found[3])
    inner = {"resnets": f"block.{found[5]}", "downsamplers": "downsample", "upsamplers": "upsample"}[found[4]]
    return f"{found[1]}.{found[2]}.{level}.{inner}.{found[6]}"


def settings_file(settings: Mapping[str, Settings], schedule: Settings, text_encoder: str) -> str:
    """The text of the ``.yaml`` that stands beside a checkpoint and tells A1111 how to build it.

    Args:
        settings: of ``unet``, ``vae`` and ``text_encoder``.
        schedule: the scheduler's.
        text_encoder: name of the folder beside the checkpoint with the text encoder's ``config.json`` and its tokenizer;
            this pack's extension finds it.

    Raises:
        ValueError: a network that this layout has no words for; one line.
    """
    unet, vae = settings["unet"], settings["vae"]
    if (
        settings["text_encoder"].get("model_type") != "clip_text_model"
        or settings["text_encoder"]["hidden_act"] != "quick_gelu"
    ):
        raise ValueError("only bases with OpenAI's CLIP as text encoder (Stable Diffusion 1 and wadi-mini) can be exported")
    if schedule["beta_schedule"] != "scaled_linear":
        raise ValueError(f"the LDM layout knows no schedule {schedule['beta_schedule']}")
    diffusion = {
        "linear_start": schedule["beta_start"],
        "linear_end": schedule["beta_end"],
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": schedule["num_train_timesteps"],
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": unet["sample_size"],
        "channels": unet["in_channels"],
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": vae["scaling_factor"],
        "use_ema": False,
        **({"parameterization": "v"} if schedule.get("prediction_type") == "v_prediction" else {}),
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": _unet_settings(unet)},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": _vae_settings(vae)},
        "cond_stage_config": {
            "target": "a1111_extension.text_encoder.beside",
            "params": {"folder": text_encoder},
        },
    }
    model = {"base_learning_rate": 1e-4, "target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": diffusion}
    return "".join(f"{line}\n" for line in _yaml({"model": model}))


def _unet_settings(unet: Settings) -> dict[str, Any]:
    widths = unet["block_out_channels"]
    heads = unet["attention_head_dim"]  # the number of heads: diffusers' name for it is a known mistake
    attention = [2**level for level, kind in enumerate(unet["down_block_types"]) if kind.startswith("CrossAttn")]
    return {
        "image_size": 32,  # unused
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": widths[0],
        "attention_resolutions": attention,
        "num_res_blocks": unet["layers_per_block"],
        "channel_mult": _multiples(widths),
        "num_heads": _one_number(heads),
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(unet.get("use_linear_projection", False)),
        "transformer_depth": 1,
        "context_dim": unet["cross_attention_dim"],
        "use_checkpoint": False,
        "legacy": False,
    }


def _vae_settings(vae: Settings) -> dict[str, Any]:
    ddconfig = {
        "double_z": True,
        "z_channels": vae["latent_channels"],
        "resolution": vae["sample_size"],
        "in_channels": vae["in_channels"],
        "out_ch": vae["out_channels"],
        "ch": vae["block_out_channels"][0],
        "ch_mult": _multiples(vae["block_out_channels"]),
        "num_res_blocks": vae["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    loss = {"target": "torch.nn.Identity"}
    return {"embed_dim": vae["latent_channels"], "monitor": "val/rec_loss", "ddconfig": ddconfig, "lossconfig": loss}


def _multiples(widths: Sequence[int]) -> list[int]:
    """Widths of levels as multiples of the first."""
    if any(width % widths[0] for width in widths):
        raise ValueError(f"the LDM layout knows only levels whose widths are multiples of the first, not {list(widths)}")
    return [width // widths[0] for width in widths]


def _one_number(heads: int | Sequence[int]) -> int:
    counts = {heads} if isinstance(heads, int) else set(heads)
    if len(counts) > 1:
        raise ValueError(f"a text encoder of CLIP goes with the same number of heads on all levels, not {heads}")
    return counts.pop()


def _yaml(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested mappings as YAML; scalars and lists are written as JSON, which is YAML too."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", *_yaml(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}")
    return lines
