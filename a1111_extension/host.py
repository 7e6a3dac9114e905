"""What the two programs keep in different places: the loaded network, the adapters on it, and the file it came from."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from modules import sd_models, shared
from torch import nn

from wadi_core.files import one_line
from wadi_core.lorad import layouts
from wadi_core.lorad.checkpoint import read_header

FORGE = find_spec("modules_forge") is not None

logger = logging.getLogger("wadi")


def tell(p: Any, sentence: str) -> None:
    """Say something about a generation below its pictures, and in the console.

    Args:
        p: the program's object for the generation.
    """
    sentence = one_line(f"WaDi: {sentence}")
    if sentence not in p.comments and not getattr(p, "wadi_live", False):  # not again for every letter that is typed
        logger.warning("%s", sentence)
    p.comment(sentence)


def lora_extension() -> ModuleType | None:
    """The module ``networks`` of the built-in extension for LoRA, with its tables of files; None where that is off."""
    found = sys.modules.get("networks")
    return found if hasattr(found, "available_networks") else None


def lora_layers() -> dict[str, nn.Module]:
    """A1111's layers of the loaded model, by the names that its extension for LoRA has given them."""
    return sd_models.model_data.sd_model.network_layer_mapping


def network() -> nn.Module | None:
    """The denoising network of the loaded checkpoint; None while none is loaded."""
    model = sd_models.model_data.sd_model
    if FORGE:
        objects = getattr(model, "forge_objects", None)
        return None if objects is None else objects.unet.model.diffusion_model
    return None if model is None else model.model.diffusion_model


def controls() -> Any:
    """In Forge the last of the chain of ControlNets on the network; None where there is none, and in A1111."""
    objects = getattr(sd_models.model_data.sd_model, "forge_objects", None) if FORGE else None
    return None if objects is None else objects.unet.controlnet_linked_list


def layout() -> layouts.Layout:
    """Names and places of the layers of the network that draws, or will draw when a checkpoint is loaded lazily.

    Raises:
        ValueError: not a network that LoRaD is made for, or no checkpoint; one line.
        OSError: the checkpoint cannot be read.
    """
    loaded = network()
    if loaded is not None:
        return layouts.detect({name: tuple(tensor.shape) for name, tensor in loaded.state_dict().items()})
    file = checkpoint_file()
    if file is None:
        raise ValueError("no checkpoint is chosen")
    return layouts.detect(read_header(file).shapes)


def checkpoint_file() -> Path | None:
    """The file of the chosen checkpoint; None where there is none."""
    info = sd_models.checkpoint_aliases.get(shared.opts.sd_model_checkpoint)
    model = sd_models.model_data.sd_model
    info = info or getattr(model, "sd_checkpoint_info", None)
    return None if info is None else Path(info.filename)


def prediction_type() -> str:
    """What the loaded network returns, ``epsilon`` or ``v_prediction``."""
    model = sd_models.model_data.sd_model
    if FORGE:
        return "v_prediction" if model.forge_objects.unet.model.predictor.prediction_type == "v_prediction" else "epsilon"
    return "v_prediction" if model.parameterization == "v" else "epsilon"


def applied() -> list[tuple[Path, float]]:
    """File and strength of the adapters on the loaded network, in the order in which they work."""
    if FORGE:
        unet = sd_models.model_data.sd_model.forge_objects.unet
        return [(Path(file), strength) for file, strength, *_ in unet.lora_patches]
    extension = lora_extension()
    loaded = [] if extension is None else extension.loaded_networks
    return [(Path(net.network_on_disk.filename), net.unet_multiplier) for net in loaded]
