"""Small ControlNets with random weights, in every form in which they are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networks
import torch
from torch import Tensor, nn

from wadi_core import configs
from wadi_core.lorad.checkpoint import write_safetensors

State = dict[str, Tensor]
TOP = {
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}


def random_controlnet(unet: nn.Module, seed: int = 5, strength: float = 0.1) -> nn.Module:
    """A ControlNet for a U-Net that adds something: what begins at zero is random."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    made = ControlNetModel.from_unet(unet).eval().requires_grad_(False)
    for layer in (*made.controlnet_down_blocks, made.controlnet_mid_block, made.controlnet_cond_embedding.conv_out):
        nn.init.normal_(layer.weight, std=strength)
    for layer in made.controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.mul_(3)  # or hardly anything of the map would come through eight layers at random
    return made


def ldm_name(name: str, settings: dict[str, Any]) -> str:
    """The LDM name of a ControlNet's tensor, from its diffusers name."""
    layer, _, kind = name.rpartition(".")
    if layer in TOP:
        return f"{TOP[layer]}.{kind}"
    if layer.startswith("controlnet_down_blocks."):
        return f"zero_convs.{layer.rpartition('.')[2]}.0.{kind}"
    if layer.startswith("controlnet_cond_embedding.blocks."):
        return f"input_hint_block.{2 * int(layer.rpartition('.')[2]) + 2}.{kind}"
    return networks.ldm_unet_name(name, settings)


def write_forms(place: Path, controlnet: nn.Module, base: Path) -> dict[str, Path]:
    """One ControlNet as a folder and as single files; ``base`` is the folder of its base."""
    place.mkdir(parents=True, exist_ok=True)
    controlnet.save_pretrained(place / "canny")
    state = dict(controlnet.state_dict())
    settings = configs.read(base / "unet" / "config.json")
    ldm = {ldm_name(name, settings): tensor for name, tensor in state.items()}
    prefixed = {f"control_model.{name}": tensor for name, tensor in ldm.items()}
    other = {"first_stage_model.decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}
    write_safetensors(place / "ldm.safetensors", ldm)
    write_safetensors(place / "prefixed.safetensors", prefixed | other)
    write_safetensors(place / "diffusers.safetensors", state)
    torch.save(prefixed, place / "pickle.pth")
    names = ("canny", "ldm.safetensors", "prefixed.safetensors", "diffusers.safetensors", "pickle.pth")
    return {name: place / name for name in names}
