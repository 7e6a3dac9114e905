"""Names of layers: which linear layers of a network LoRaD turns, and what each is called in an adapter file.

Canonical names are diffusers module paths (``down_blocks.0.attentions.0.proj_in``). Everything is derived from the
paths and shapes of a network's linear layers, so a network and the header of its file are read in the same way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from . import kinds

# A network, or "<path>.weight" -> shape for each of its tensors (others may be in it).
Network: TypeAlias = "nn.Module | Mapping[str, Sequence[int]]"

ARCHITECTURES = ("sd15", "sd21", "pixart-alpha", "wadi-mini", "unet-custom")
SUPPORTED = "the U-Nets of Stable Diffusion 1 and 2, and PixArt-alpha"

# AnimateDiff puts its own modules between the layers of a U-Net, which stays the network that adapters are made for.
_MOTION = ".motion_modules."

UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
_UNET_CONDITIONING = {"proj_in", "proj_out", "time_emb_proj"}  # what the fake score leaves as it is


@dataclass(frozen=True)
class _Rule:
    """Which linear layers the two trained roles take, and the prefix and form of keys in a file."""

    student: Callable[[str], bool]
    fake_score: Callable[[str], bool]
    key: Callable[[str], str]


# Convolutions are never turned. Source: Wang et al., "WaDi", 2026; the layer counts of its released networks.
_UNET = _Rule(
    student=lambda path: path.startswith(UNET_BLOCKS),
    fake_score=lambda path: path.startswith(UNET_BLOCKS) and path.rpartition(".")[2] not in _UNET_CONDITIONING,
    # The hosts' own LoRA key maps resolve this form for every layer, and A1111 splits a key at its first dot.
    key=lambda path: "lora_unet_" + path.replace(".", "_"),
)
_PIXART = _Rule(
    student=lambda path: not path.startswith("adaln_single."),
    fake_score=lambda path: path.startswith("transformer_blocks."),
    key=lambda path: "transformer." + path,
)
_RULES = {name: _PIXART if name.startswith("pixart") else _UNET for name in ARCHITECTURES}


@dataclass(frozen=True)
class _UNetForm:
    """What tells U-Nets of one family apart: level widths, width of the text embedding, student layers."""

    widths: tuple[int, ...]
    context: int
    linears: int


_KNOWN_UNETS = {
    _UNetForm((320, 640, 1280, 1280), 768, 182): "sd15",
    _UNetForm((320, 640, 1280, 1280), 1024, 214): "sd21",
    _UNetForm((96, 192, 192), 128, 81): "wadi-mini",
}

_LDM_MARK = "model.diffusion_model."


def linear_shapes(network: Network) -> dict[str, tuple[int, int]]:
    """Path -> (out, in) of every linear layer, in the network's order; motion modules on a live U-Net are left out."""
    if isinstance(network, nn.Module):
        layers = ((path, m) for path, m in network.named_modules() if isinstance(m, nn.Linear))
        return {path: (m.out_features, m.in_features) for path, m in layers if _MOTION not in path}
    ending = ".weight"
    return {
        name[: -len(ending)]: (shape[0], shape[1])
        for name, shape in network.items()
        if name.endswith(ending) and len(shape) == 2
    }


def detect_architecture(network: Network) -> str:
    """One of :data:`ARCHITECTURES`, from layer names and shapes.

    Raises:
        ValueError: not a network that LoRaD is made for; the message names it where it is known.
    """
    shapes = linear_shapes(network)
    names = network.keys() if isinstance(network, Mapping) else shapes.keys()
    what = kinds.of_names(names)
    if any(name.startswith(_LDM_MARK) for name in names):
        what = "a single-file checkpoint (LDM layout), not a network in diffusers layout"
    if what is not None:
        raise ValueError(f"this is {what}; supported are {SUPPORTED}")
    if "adaln_single.linear" in shapes and "transformer_blocks.0.attn1.to_q" in shapes:
        return "pixart-alpha"
    architecture = unet_architecture({_UNET.key(path): shape for path, shape in shapes.items() if _UNET.student(path)})
    if architecture is None or not all(any(path.startswith(block) for path in shapes) for block in UNET_BLOCKS):
        raise ValueError(f"this is no network that LoRaD knows; supported are {SUPPORTED}")
    return architecture


def unet_architecture(shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """The U-Net to which student layers belong, by adapter key -> (out, in); None if to no such U-Net."""
    levels = re.compile(r"lora_unet_down_blocks_(\d+)_resnets_0_time_emb_proj")
    widths = {int(found[1]): shape[0] for key, shape in shapes.items() if (found := levels.fullmatch(key))}
    contexts = {shape[1] for key, shape in shapes.items() if key.endswith("_attn2_to_k")}
    if len(contexts) != 1 or not all(key.startswith("lora_unet_") for key in shapes):
        return None
    form = _UNetForm(tuple(width for _, width in sorted(widths.items())), contexts.pop(), len(shapes))
    return _KNOWN_UNETS.get(form, "unet-custom")


def student_layers(network: Network, architecture: str | None = None) -> list[str]:
    """Paths of the layers that the one-step student's LoRaD takes, in the network's order."""
    rule = _RULES[architecture or detect_architecture(network)]
    return [path for path in linear_shapes(network) if rule.student(path)]


def fake_score_layers(network: Network, architecture: str | None = None) -> list[str]:
    """Paths of the layers that the fake-score model's LoRaD takes, in the network's order."""
    rule = _RULES[architecture or detect_architecture(network)]
    return [path for path in linear_shapes(network) if rule.fake_score(path)]


def adapter_key(layer: str, architecture: str) -> str:
    """The name of a layer in an adapter file, without ``.lorad_a`` or ``.lorad_b``."""
    return _RULES[architecture].key(layer)


def layers_of_keys(keys: Iterable[str], network: Network, architecture: str) -> dict[str, str]:
    """Adapter key -> path of the linear layer that it names; keys that name none are left out.

    Underscores do not tell where the dots were, so keys are compared with those of the network's own layers.
    """
    known = {adapter_key(path, architecture): path for path in linear_shapes(network)}
    return {key: known[key] for key in keys if key in known}


def network_sha256(network: nn.Module | Mapping[str, Tensor], architecture: str | None = None) -> str:
    """SHA-256 over the weights of a network's student layers, by which an adapter knows its base again.

    They are hashed as float16 in the order of their names, so a network in float32 and its float16 copy are one
    base. Adapters on the network do not count, what has been fused into it does.
    """
    if isinstance(network, nn.Module):
        layers = student_layers(network, architecture)
        return sha256_of_layers(layers, lambda path: network.get_parameter(f"{path}.weight"))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.items()}
    return sha256_of_layers(student_layers(shapes, architecture), lambda path: network[f"{path}.weight"])


def sha256_of_layers(paths: Iterable[str], weight: Callable[[str], Tensor]) -> str:
    """The checksum of :func:`network_sha256` for these layers, whose weights are asked for one at a time."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        values = weight(path)
        digest.update(f"{path} {list(values.shape)}\n".encode())
        digest.update(values.detach().to("cpu", torch.float16).contiguous().numpy().data)
    return digest.hexdigest()
