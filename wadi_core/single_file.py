"""Single-file checkpoints of Stable Diffusion (LDM layout): which names belong to which part, in diffusers' names.

Every tensor of such a file is used, or known to be of no meaning for pictures, or refused by its name: one that is
quietly left out can turn a picture into noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import refusal
from .lorad import declared
from .lorad.leftovers import wanted

# Where the parts begin. The two text encoders are OpenAI's CLIP and OpenCLIP; the later of each is sgm's name.
LDM_UNET, LDM_VAE = "model.diffusion_model.", "first_stage_model."
LDM_CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
LDM_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
BEGINNINGS = {"unet": (LDM_UNET,), "vae": (LDM_VAE,), "text_encoder": (*LDM_CLIP, *LDM_OPEN_CLIP)}
LDM_CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"

# OpenCLIP's names of a text encoder and CLIP's; query, key and value are one tensor in the former.
OPEN_CLIP_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPEN_CLIP_LAYER = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}


def check_names(path: Path, names: Iterable[str]) -> None:
    """Do nothing if every tensor belongs to a part, is a known mark or harmless.

    Raises:
        ValueError: it does not; one line with its name.
    """
    parts = tuple(beginning for beginnings in BEGINNINGS.values() for beginning in beginnings)
    strange = [name for name in wanted(names) if not name.startswith(parts) and name != declared.V_MARK]
    refuse_unused(path, strange)


def refuse_unused(path: Path, names: Iterable[str]) -> None:
    """Raises ValueError if there are any names: of tensors that would be left out."""
    names = sorted(names)
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise refusal(path, f"{names[0]}{more} has no place in these networks; left out, it could change every picture")


def in_diffusers_names(part: str, path: Path, tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """A part's tensors as diffusers names them.

    Args:
        part: ``unet``, ``vae`` or ``text_encoder``.
        path: for messages.
        tensors: of this part, by their full names.
        settings: of the network that they are for.

    Raises:
        ValueError: a tensor that would be left out; one line with its name.
    """
    if part == "unet":
        converted = convert_unet(tensors, settings)
    elif part == "vae":
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        converted = convert_ldm_vae_checkpoint(tensors, settings)
    else:
        converted = _convert_text_encoder(tensors, int(settings["num_hidden_layers"]))
    refuse_unused(path, unused(tensors, converted, int(settings.get("num_hidden_layers", 0))))
    return converted


def convert_unet(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """A U-Net's tensors by diffusers' names, from full LDM names; what it does not know is left out."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint(tensors, settings)


def unused(tensors: Mapping[str, Tensor], converted: Mapping[str, Tensor], text_layers: int = 0) -> list[str]:
    """Names of the tensors of whose numbers nothing is left after a conversion.

    Args:
        text_layers: of a text encoder; Stable Diffusion 2 stores one more, whose output it does not read.
    """
    kept = {tensor.untyped_storage().data_ptr() for tensor in converted.values()}
    return [
        name
        for name, tensor in tensors.items()
        if tensor.untyped_storage().data_ptr() not in kept and f".transformer.resblocks.{text_layers}." not in name
    ]


def _convert_text_encoder(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    if any(name.startswith(LDM_OPEN_CLIP) for name in tensors):
        return _convert_open_clip(tensors, layers)
    return {_without(name, LDM_CLIP): tensor for name, tensor in tensors.items()}


def _convert_open_clip(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """OpenCLIP's text encoder in CLIP's names.

    Stable Diffusion 2 reads the output of the last layer but one, so the last layer is in the file and not wanted.
    """
    converted = {}
    for full_name, tensor in tensors.items():
        name = _without(full_name, LDM_OPEN_CLIP)
        if name in OPEN_CLIP_TOP:
            converted[OPEN_CLIP_TOP[name]] = tensor
        if not name.startswith("transformer.resblocks."):
            continue
        number, _, inner = name.removeprefix("transformer.resblocks.").partition(".")
        if not number.isdigit() or int(number) >= layers:
            continue
        layer = f"encoder.layers.{number}."
        if inner.startswith("attn.in_proj_"):
            kind = inner.removeprefix("attn.in_proj_")
            for which, share in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{layer}self_attn.{which}_proj.{kind}"] = share
        else:
            converted[layer + renamed(inner, OPEN_CLIP_LAYER)] = tensor
    return converted


def _without(name: str, beginnings: tuple[str, ...]) -> str:
    return next((name.removeprefix(beginning) for beginning in beginnings if name.startswith(beginning)), name)


def renamed(name: str, table: Mapping[str, str]) -> str:
    """A name with each part replaced that stands in a table."""
    for old, new in table.items():
        name = name.replace(old, new)
    return name
