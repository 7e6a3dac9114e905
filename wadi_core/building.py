"""Networks of diffusers and transformers, built without weights and then filled, each tensor checked.

A network is built on the meta device, where it takes no memory; its tensors then go straight to their place.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from . import configs
from .files import refusal
from .lorad import kinds
from .thirdparty import DiffusersNetwork

SUPPORTED = 'Stable Diffusion 1.5, 2.1-base and "mini"'


def empty_network(part: str, config: Path) -> DiffusersNetwork:
    """A network without weights, on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = configs.read(config)
    if part == "text_encoder" and settings.get("model_type") != "clip_text_model":
        raise refusal(config, f"a text encoder of the kind {settings.get('model_type')}, where CLIP's is needed")
    if part == "unet" and (what := kinds.of_settings(settings)):
        raise refusal(config, f"this is {what}; supported are {SUPPORTED}")
    try:
        with torch.device("meta"):
            if part == "text_encoder":
                return CLIPTextModel(CLIPTextConfig.from_dict(settings))
            return (UNet2DConditionModel if part == "unet" else AutoencoderKL).from_config(settings)
    except Exception as error:  # senseless settings can raise nearly anything, and all of it means this one thing
        raise refusal(config, f"no network can be built from these settings: {error}") from error


def fill(network: nn.Module, tensors: dict[str, Tensor], where: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Give a network built on the meta device its weights.

    Raises:
        ValueError: a tensor is missing, has another shape, or there is one too many; one line.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    # transformers 5.6 dropped the "text_model." of its CLIP text encoder; files have it or not.
    prefix = "text_model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    names = {name.removeprefix(prefix): name for name in shapes}
    _refuse_names(where, "is missing", names.keys() - bare.keys())
    _refuse_names(where, "has no place in the network of these settings", bare.keys() - names.keys())
    wrong = [name for name, full in names.items() if tuple(bare[name].shape) != shapes[full]]
    _refuse_names(where, "has another shape than the settings say", wrong)
    if dtype == torch.float16:
        _refuse_names(where, "is too large for float16: take bf16 or fp32", [name for name in names if _overflows(bare[name])])
    network.load_state_dict({full: bare.pop(name).to(device, dtype) for name, full in names.items()}, assign=True)
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta:  # no file stores CLIP's position_ids, and on the meta device they have no values
            parent, _, attribute = name.rpartition(".")
            values = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            network.get_submodule(parent).register_buffer(attribute, values, persistent=False)
    return network.eval().requires_grad_(False)


def _overflows(tensor: Tensor) -> bool:
    """Whether a number is too large for float16; of those that have been looked at already, in types that reach further."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16) or not tensor.numel():
        return False
    low, high = tensor.aminmax()
    return max(-float(low), float(high)) > torch.finfo(torch.float16).max


def _refuse_names(where: Path, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise refusal(where, f"these weights do not fit: {names[0]} {what}{more}")
