"""What the programs keep in different places: the loaded network, the adapters on it, and the file it came from.

A1111, Forge, Forge Neo and reForge differ here and nowhere else. Each difference is one question to what the program
has, never to its name or its folder, so that a program that moves a part still works with the others.
"""

from __future__ import annotations

import ast
import importlib
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from modules import sd_models, shared
from torch import nn

from wadi_core.files import one_line
from wadi_core.lorad import layouts
from wadi_core.lorad.checkpoint import read_header

logger = logging.getLogger("wadi")
if not logger.isEnabledFor(logging.WARNING):  # Forge Neo shows errors alone
    logger.setLevel(logging.WARNING)


def has(module: str, *names: str) -> bool:
    """Whether the program has a module, and these names in it."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    return all(hasattr(found, name) for name in names)


def supported() -> bool:
    """Whether the program has what the sampler stands on."""
    return has("modules.sd_samplers_timesteps") and has("modules.sd_samplers", "get_sampler_and_scheduler")


def folder() -> Path | None:
    """The program's own folder; None where it does not say."""
    return Path(importlib.import_module("modules.paths").script_path) if has("modules.paths", "script_path") else None


def sampler_module() -> str:
    """Which of this package's modules has the sampler for the program."""
    return "forge" if has("backend.sampling.sampling_function", "sampling_function") else "sampler"


def adapter_module() -> str:
    """Which of this package's modules puts LoRaD among the program's kinds of adapters."""
    if has("backend.patcher.lora", "lora_collection_priority"):
        return "patches"
    return "network" if weight_adapters() is None else "adapters"


def weight_adapters() -> Any:
    """ComfyUI's scheme of adapters, with the list of their classes; None in programs that have not taken it over."""
    for place in ("backend.patcher.lora", "ldm_patched.modules.lora"):
        if has(place, "weight_adapter"):
            return sys.modules[place].weight_adapter
    return None


def knows_networks_by_widths() -> bool:
    """Whether the program has a list of the networks that it recognises; without one, a file says how to build them."""
    return has("huggingface_guess.model_list", "models")


def clip_skip() -> int:
    """How many layers of the text encoder are left out from the end, counted as the programs do: 1 means none."""
    return int(shared.opts.CLIP_stop_at_last_layers)


def tell(p: Any, sentence: str) -> None:
    """Say something about a generation below its pictures, and in the console.

    Args:
        p: the program's object for the generation.
    """
    sentence = one_line(f"WaDi: {sentence}")
    if sentence not in p.comments:
        logger.warning("%s", sentence)
    p.comment(sentence)


def lora_extension() -> ModuleType | None:
    """The module ``networks`` of the built-in extension for LoRA, with its tables of files; None where that is off."""
    found = sys.modules.get("networks")
    return found if hasattr(found, "available_networks") else None


def lora_layers() -> dict[str, nn.Module]:
    """A1111's layers of the loaded model, by the names that its extension for LoRA has given them."""
    return sd_models.model_data.sd_model.network_layer_mapping


def forge_unet() -> Any:
    """Forge's object of the loaded network with all that is patched on it; None where nothing is loaded, and in A1111.

    It is another one in every pass.
    """
    objects = getattr(sd_models.model_data.sd_model, "forge_objects", None)
    return None if objects is None else objects.unet


def network() -> nn.Module | None:
    """The denoising network of the loaded checkpoint; None while none is loaded."""
    unet = forge_unet()
    if unet is not None:
        return unet.model.diffusion_model
    return getattr(getattr(sd_models.model_data.sd_model, "model", None), "diffusion_model", None)


def controls() -> Any:
    """In Forge the last of the chain of ControlNets on the network; None where there is none, and in A1111."""
    unet = forge_unet()
    return None if unet is None else unet.controlnet_linked_list


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
    unet = forge_unet()
    if unet is not None:
        return "v_prediction" if unet.model.predictor.prediction_type == "v_prediction" else "epsilon"
    return "v_prediction" if sd_models.model_data.sd_model.parameterization == "v" else "epsilon"


def applied() -> list[tuple[Path, float]]:
    """File and strength of the adapters on the loaded network, in the order in which they work."""
    listed = getattr(sd_models.model_data.sd_model, "current_lora_hash", None)
    if listed is not None:  # Forge's own list of [file, strength, strength on the text encoder, ...], as text
        return [(Path(file), float(strength)) for file, strength, *_ in ast.literal_eval(listed)]
    extension = lora_extension()
    loaded = [] if extension is None else extension.loaded_networks
    return [(Path(net.network_on_disk.filename), net.unet_multiplier) for net in loaded]


def forbid_alias(alias: str) -> None:
    """Tell the program's extension for LoRA that several files have this alias, so that it means none of them."""
    forbidden = lora_extension().forbidden_network_aliases  # type: ignore[union-attr]
    if isinstance(forbidden, set):
        forbidden.add(alias.lower())
    else:
        forbidden[alias.lower()] = 1
