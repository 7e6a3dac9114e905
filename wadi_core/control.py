"""ControlNets: what a picture is to be steered by besides its prompt.

A ControlNet (Zhang et al., 2023) is a copy of a U-Net's first half that looks at a control map, such as the edges of
a picture, and adds what it finds to the U-Net's skip connections. It is trained for the multi-step base and works with
the one-step student as it is: rotating the weights of the U-Net leaves what its blocks expect in place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from . import base as bases
from . import configs, hub, mini, single_file
from .building import fill
from .files import as_text, existing_file, known_name, one_line, refusal, sha256_of_file
from .images import name_of, plain
from .lorad.folders import weight_files
from .lorad.leftovers import wanted
from .lorad.stored import Stored, open_files
from .settings import Control
from .thirdparty import DiffusersNetwork

if TYPE_CHECKING:
    from PIL.Image import Image

File: TypeAlias = "str | os.PathLike[str]"
Controls: TypeAlias = "ControlNet | File | Sequence[ControlNet | File] | None"
# For each ControlNet a control image, or one for each picture; a single ControlNet's need not be in a list.
ControlImages: TypeAlias = "Image | Sequence[Image | Sequence[Image]] | None"
Shapes: TypeAlias = Mapping[str, Sequence[int]]
T = TypeVar("T")

LDM_PREFIX = "control_model."
# Of which networks the width of the first level and of the text embedding are known.
_KNOWN = {
    (320, 768): "Stable Diffusion 1.5",
    (320, 1024): "Stable Diffusion 2.1",
    (320, 2048): "Stable Diffusion XL",
    (96, 128): "wadi-mini",
}
# What other files hold that are easily taken for a ControlNet.
_OTHERS = {
    "lora_controlnet": "a Control-LoRA, which works with Stable Diffusion XL only",
    ".lorad_a": "a LoRaD adapter",
    "lora_unet_": "a LoRA adapter",
    "adapter.body.": "a T2I-Adapter",
    "body.0.": "a T2I-Adapter",
    "first_stage_model.": "a whole checkpoint",
    "output_blocks.": "a whole U-Net",
    "up_blocks.": "a whole U-Net",
}
_OWN = ("controlnet_down_blocks.0.weight", "zero_convs.0.0.weight")


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet, ready to use.

    Attributes:
        file: the name of its file or folder, without the folders above it.
        network: diffusers' ``ControlNetModel``, without gradients.
        sha256: of the file with the weights, or of the first of several.
    """

    file: str
    network: DiffusersNetwork
    sha256: str = ""


def load(path: File, base: bases.Base, device: torch.device, dtype: torch.dtype) -> ControlNet:
    """Load a ControlNet for a base. Nothing is downloaded but what a name of the hub asks for.

    Args:
        path: a folder in diffusers layout, a single file (``.safetensors``, or a pickle of plain tensors) in the LDM
            or diffusers layout, a name of the hub, or ``mini`` for the one that belongs to the base ``mini``.
        base: whose U-Net it is to steer.

    Raises:
        OSError, ValueError: it is missing, damaged, no ControlNet, or made for another network; one line.
    """
    wanted = hub.parse(path)
    place = mini.control_path() if str(path) == "mini" else Path(hub.local(path, hub.CONTROL, dtype == torch.float16))
    settings: dict[str, Any] | None = None
    if place.is_dir():
        settings, files = _settings_of_folder(place), weight_files(place).files
    else:
        files = (existing_file(place),)
    stored = Stored(*open_files(files), place)
    names = _own_names(stored)
    _check_form(place, {name: stored.shape(full) for name, full in names.items()}, base)
    network = _empty_network(place, settings, base)
    if settings is None and "shuffle" in place.stem.lower():
        # This one kind says nothing of places in the picture, and its weights do not tell.
        network.register_to_config(global_pool_conditions=True)
    tensors = {name: stored.values(full) for name, full in names.items()}
    network = fill(network, _in_diffusers_names(place, tensors, network.config), place, device, dtype)
    name = str(wanted or path) if wanted or str(path) == "mini" else known_name(place)
    return ControlNet(name, network, sha256_of_file(files[0]))


def load_all(control: Controls, base: bases.Base, device: torch.device, dtype: torch.dtype) -> tuple[ControlNet, ...]:
    """None, one or several ControlNets, of which some may be loaded already; see :func:`load`."""
    if control is None:
        return ()
    if isinstance(control, (ControlNet, str, os.PathLike)):
        control = [control]
    return tuple(one if isinstance(one, ControlNet) else load(one, base, device, dtype) for one in control)


def _settings_of_folder(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(one_line(f"{folder}: this is no ControlNet in diffusers layout: config.json is missing"))
    settings = configs.read(path)
    name = str(settings.get("_class_name"))
    if name != "ControlNetModel":
        raise refusal(folder, f"this folder is for {name}, where a ControlNetModel is needed")
    return settings


def _own_names(stored: Stored) -> dict[str, str]:
    """The ControlNet's own name of each tensor -> its name in the file, where another network may be in it too."""
    own = [name for name in stored.names if name.startswith(LDM_PREFIX)] or stored.names
    return {name.removeprefix(LDM_PREFIX): name for name in wanted(own)}


def _check_form(path: Path, shapes: Shapes, base: bases.Base) -> None:
    """Whether this is a ControlNet, and for a U-Net like the base's."""
    if not any(name in shapes for name in _OWN):
        what = next((what for part, what in _OTHERS.items() if any(part in name for name in shapes)), "something else")
        raise refusal(path, f"this is no ControlNet but {what}")
    entry = shapes.get("conv_in.weight", shapes.get("input_blocks.0.0.weight", ()))
    context = next((shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), ())
    if len(entry) != 4 or len(context) != 2:
        raise refusal(path, "this ControlNet is not built like those of Stable Diffusion 1 and 2")
    unet = base.unet.config
    theirs, ours = (entry[0], context[1]), (unet.block_out_channels[0], unet.cross_attention_dim)
    if theirs != ours:
        raise refusal(path, f"this ControlNet is made for {_name(theirs)}, and the base {base.name} is {_name(ours)}")


def _name(form: tuple[int, int]) -> str:
    return _KNOWN.get(form, f"a network of width {form[0]} and text width {form[1]}")


def _empty_network(path: Path, settings: dict[str, Any] | None, base: bases.Base) -> DiffusersNetwork:
    """A ControlNet without weights, on the meta device; of a single file, with the settings of the base's U-Net."""
    from diffusers import ControlNetModel

    try:
        with torch.device("meta"):
            if settings is None:
                return ControlNetModel.from_unet(base.unet, load_weights_from_unet=False)
            return ControlNetModel.from_config(settings)
    except Exception as error:  # senseless settings can raise nearly anything, and all of it means this one thing
        raise refusal(path, f"no ControlNet can be built from its settings: {error}") from error


def _in_diffusers_names(path: Path, tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    if "zero_convs.0.0.weight" not in tensors:
        return tensors
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    converted = convert_controlnet_checkpoint(tensors, settings)
    found = {name: tensor for name, tensor in converted.items() if tensor is not None}
    single_file.refuse_unused(path, single_file.unused(tensors, found))
    return found


# --- control images --------------------------------------------------------------------------------------------------


def images_for(networks: Sequence[ControlNet], images: ControlImages, count: int) -> list[list[Image]]:
    """For each ControlNet its control images, in RGB and upright: one for all pictures, or one for each of ``count``.

    Raises:
        ValueError: there are too many or too few, or one cannot be looked at; one line.
    """
    given: Sequence[Image | Sequence[Image]] = [] if images is None else _listed(images)
    if len(networks) == 1 and len(given) > 1:
        given = [cast("Sequence[Image]", given)]
    if len(given) != len(networks):
        raise ValueError(f"there are {len(networks)} ControlNets and {len(given)} control images for them")
    found = [[plain(one) for one in _listed(own)] for own in given]
    for own in found:
        if len(own) not in (1, count):
            raise ValueError(f"there are {len(own)} control images for {count} pictures: one, or one for each, is needed")
    return found


def _listed(value: T | Sequence[T]) -> Sequence[T]:
    """One as a list of it; a list or a tuple as it is."""
    return value if isinstance(value, (list, tuple)) else [cast("T", value)]


def describe(
    networks: Sequence[ControlNet], images: Sequence[Sequence[Image]], scales: float | Sequence[float]
) -> tuple[Control, ...]:
    """What is written of the ControlNets into a picture's settings.

    Raises:
        ValueError: there are too many or too few scales, or one is out of range; one line.
    """
    scales = [scales] * len(networks) if isinstance(scales, (int, float)) else list(scales)
    if len(scales) != len(networks):
        raise ValueError(f"there are {len(networks)} ControlNets and {len(scales)} control scales for them")
    names = [as_text(Path(name_of(own[0])).name) if len(own) == 1 else "" for own in images]
    parts = zip(networks, scales, names, strict=True)
    return tuple(Control(network.file, scale, network.sha256, name) for network, scale, name in parts)


def to_map(image: Image, width: int, height: int) -> Tensor:
    """(1, 3, height, width) float32 from 0 to 1: a control map as ControlNets take it.

    Args:
        image: a picture of the size of the one that is to be drawn, looked at as :mod:`.images` says.

    Raises:
        ValueError: another size, or nothing that can be looked at; one line.
    """
    import numpy as np

    image = plain(image)
    if image.size != (width, height):
        size = f"{image.width}x{image.height}"
        raise ValueError(f"the control image is {size} and the picture {width}x{height}: both need the same size")
    array = np.array(image)
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


# --- the call --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steering:
    """What one ControlNet does in a call.

    Attributes:
        network: a ``ControlNetModel``.
        maps: (n or 1, 3, 8h, 8w) from 0 to 1, on the network's device and in its type; one map is for all pictures.
        scale: of what the network adds; 0 leaves it out.
    """

    network: DiffusersNetwork
    maps: Tensor
    scale: float = 1.0


class Steered:
    """A U-Net and the ControlNets that steer it, to be called like the U-Net alone.

    Args:
        unet: diffusers' ``UNet2DConditionModel``.
        steerings: what the ControlNets add up; none is the U-Net itself.
    """

    def __init__(self, unet: DiffusersNetwork, steerings: Sequence[Steering] = ()) -> None:
        self.unet = unet
        self.steerings = [steering for steering in steerings if steering.scale]

    def __call__(self, x: Tensor, t: Tensor | int, encoder_hidden_states: Tensor) -> Any:
        """What the U-Net returns. ``x``: (n, 4, h, w); with guidance, a multiple of the maps' n, set after set."""
        down: list[Tensor] = []
        middle: Tensor | None = None
        for steering in self.steerings:
            maps = steering.maps
            maps = maps.repeat(len(x) // len(maps), 1, 1, 1)
            more, more_middle = steering.network(
                x,
                t,
                encoder_hidden_states=encoder_hidden_states,
                controlnet_cond=maps,
                conditioning_scale=steering.scale,
                return_dict=False,
            )
            down = [one + other for one, other in zip(down, more, strict=True)] if down else list(more)
            middle = more_middle if middle is None else middle + more_middle
        if middle is None:
            return self.unet(x, t, encoder_hidden_states=encoder_hidden_states)
        return self.unet(
            x,
            t,
            encoder_hidden_states=encoder_hidden_states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        )
