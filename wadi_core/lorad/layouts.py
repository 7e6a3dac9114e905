"""Where the layers of a network lie in state dicts of every layout.

Canonical names are diffusers module paths. A layout is a rule, not a list: patterns of names and the canonical paths
that they stand for. In the LDM (CompVis) layout the blocks of a U-Net are numbered in one row; how many of them make a
level is seen from where the row shrinks the picture. PixArt's original layout keeps query, key and value of an
attention in one tensor, so a layer there is some rows of one.

    ldm         model.diffusion_model.input_blocks.1.1...     single-file checkpoints of SD 1 and 2
    comfy       diffusion_model.input_blocks.1.1...           a network as ComfyUI holds it
    bare        input_blocks.1.1...                           the same names without a prefix
    diffusers   down_blocks.0.attentions.0...                 also under unet., transformer. or module.
    pixart      blocks.0.attn.qkv                             also under the prefixes above
    (LoRA keys) lora_unet_down_blocks_0_attentions_0...       :func:`~.layers.adapter_key` and :func:`path_of_key`
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from . import kinds
from .format import LORA_MARKS, LORAD_ENDINGS
from .layers import SUPPORTED, detect_architecture, student_layers

Shapes: TypeAlias = Mapping[str, Sequence[int]]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "module.unet.", "module.", "unet.", "transformer.", "")

# Pattern of a layer's name -> canonical paths; several share the rows of one tensor equally. {level} and {number} are
# counted from {row}.
_Rules: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
_LDM: _Rules = (
    (r"time_embed\.0", ("time_embedding.linear_1",)),
    (r"time_embed\.2", ("time_embedding.linear_2",)),
    (r"input_blocks\.(?P<row>\d+)\.0\.emb_layers\.1", ("down_blocks.{level}.resnets.{number}.time_emb_proj",)),
    (r"input_blocks\.(?P<row>\d+)\.1\.(?P<inner>.+)", ("down_blocks.{level}.attentions.{number}.{inner}",)),
    (r"middle_block\.0\.emb_layers\.1", ("mid_block.resnets.0.time_emb_proj",)),
    (r"middle_block\.1\.(?P<inner>.+)", ("mid_block.attentions.0.{inner}",)),
    (r"middle_block\.2\.emb_layers\.1", ("mid_block.resnets.1.time_emb_proj",)),
    (r"output_blocks\.(?P<row>\d+)\.0\.emb_layers\.1", ("up_blocks.{level}.resnets.{number}.time_emb_proj",)),
    (r"output_blocks\.(?P<row>\d+)\.1\.(?P<inner>.+)", ("up_blocks.{level}.attentions.{number}.{inner}",)),
)
_BLOCK, _ITS = r"blocks\.(?P<number>\d+)\.", "transformer_blocks.{number}."
_EMBEDDERS = {"t": "timestep", "csize": "resolution", "ar": "aspect_ratio"}
_PIXART: _Rules = (
    (_BLOCK + r"attn\.qkv", (_ITS + "attn1.to_q", _ITS + "attn1.to_k", _ITS + "attn1.to_v")),
    (_BLOCK + r"attn\.proj", (_ITS + "attn1.to_out.0",)),
    (_BLOCK + r"cross_attn\.q_linear", (_ITS + "attn2.to_q",)),
    (_BLOCK + r"cross_attn\.kv_linear", (_ITS + "attn2.to_k", _ITS + "attn2.to_v")),
    (_BLOCK + r"cross_attn\.proj", (_ITS + "attn2.to_out.0",)),
    (_BLOCK + r"mlp\.fc1", (_ITS + "ff.net.0.proj",)),
    (_BLOCK + r"mlp\.fc2", (_ITS + "ff.net.2",)),
    (r"y_embedder\.y_proj\.fc1", ("caption_projection.linear_1",)),
    (r"y_embedder\.y_proj\.fc2", ("caption_projection.linear_2",)),
    *(
        (rf"{old}_embedder\.mlp\.{place}", (f"adaln_single.emb.{new}_embedder.linear_{number}",))
        for old, new in _EMBEDDERS.items()
        for place, number in ((0, 1), (2, 2))
    ),
    (r"t_block\.1", ("adaln_single.linear",)),
    (r"final_layer\.linear", ("proj_out",)),
)
_DIFFUSERS: _Rules = ((r"(?P<inner>.+)", ("{inner}",)),)

# Naming -> its rules, and a tensor that every network in it has.
_NAMINGS: dict[str, tuple[_Rules, str]] = {
    "ldm": (_LDM, "input_blocks.1.0.emb_layers.1.weight"),
    "diffusers": (_DIFFUSERS, "down_blocks.0.resnets.0.time_emb_proj.weight"),
    "diffusers transformer": (_DIFFUSERS, "transformer_blocks.0.attn1.to_q.weight"),
    "pixart": (_PIXART, "blocks.0.cross_attn.kv_linear.weight"),
}
# What only adapters have in their names.
_ADAPTERS = {
    **{ending: "a LoRaD adapter, not a network" for ending in LORAD_ENDINGS},
    ".theta_a": "the authors' LoRaD factors, not a network",
    **{mark: "an ordinary LoRA, not a network" for mark in LORA_MARKS},
}
# Parts of a U-Net's paths that hold underscores themselves.
_COMPOUNDS = (
    *("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "time_emb_proj", "time_embedding", "linear_1"),
    *("linear_2", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out"),
)


@dataclass(frozen=True)
class Place:
    """Where a layer's weight lies: the tensor's name, and the rows of it that are the layer's; None for all."""

    name: str
    rows: slice | None = None


@dataclass(frozen=True)
class Layout:
    """How a state dict names its layers.

    Attributes:
        name: ``ldm``, ``comfy``, ``bare``, ``diffusers`` or ``pixart``.
        prefix: what stands before every name of the network.
        architecture: one of :data:`~.layers.ARCHITECTURES`.
        places: canonical path of every linear layer -> where its weight lies.
        shapes: canonical path of every linear layer -> (out, in).
    """

    name: str
    prefix: str
    architecture: str
    places: Mapping[str, Place]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def network(self) -> dict[str, tuple[int, int]]:
        """The linear layers as :mod:`~.layers` and :meth:`~.adapter.LoRaD.matched` take a network: by tensor name."""
        return {f"{path}.weight": shape for path, shape in self.shapes.items()}

    def layers(self) -> dict[str, Place]:
        """Canonical path -> place of the layers that a one-step student's LoRaD turns, in the network's order."""
        return {path: self.places[path] for path in student_layers(self.network, self.architecture)}

    def __str__(self) -> str:
        return f"{self.architecture} in {self.name} layout"


def detect(shapes: Shapes) -> Layout:
    """The layout and architecture of a state dict, by the names and shapes of its tensors.

    Other parts (text encoder, autoencoder) may be in it too.

    Raises:
        ValueError: it holds no network that LoRaD is made for; one line that says what it is, where that is known.
    """
    for prefix in PREFIXES:
        for naming, (rules, mark) in _NAMINGS.items():
            if prefix + mark in shapes:
                own = {name.removeprefix(prefix): tuple(shape) for name, shape in shapes.items() if name.startswith(prefix)}
                return _layout(naming, prefix, own, rules)
    _refuse_others(shapes)
    raise ValueError(f"there is no network in it that LoRaD knows; supported are {SUPPORTED}")


def path_of_key(key: str) -> str:
    """The canonical path that an adapter file's key stands for, found without a network.

    Raises:
        ValueError: it is no such key; one line.
    """
    if key.startswith("transformer."):
        return key.removeprefix("transformer.")
    path = key.removeprefix("lora_unet_").replace("_", ".")
    for compound in _COMPOUNDS:
        path = re.sub(rf"(?<![^.]){compound.replace('_', '[.]')}(?![^.])", compound, path)
    if not key.startswith("lora_unet_") or "_" not in path:
        raise ValueError(f"{key[:80]!r} is no key of a layer in an adapter file")
    return path


def _layout(naming: str, prefix: str, shapes: dict[str, tuple[int, ...]], rules: _Rules) -> Layout:
    _refuse_others(shapes)
    places: dict[str, Place] = {}
    linears: dict[str, tuple[int, int]] = {}
    for path, name, rows in _linear_layers(shapes, rules):
        if path in places:
            raise ValueError(f"two of its tensors are the layer {path}: {places[path].name} and {prefix}{name}")
        places[path] = Place(prefix + name, rows)
        out_features, in_features = shapes[name]
        linears[path] = (out_features if rows is None else rows.stop - rows.start, in_features)
    network = {f"{path}.weight": shape for path, shape in linears.items()}
    # In diffusers' own names the other tensors say something too, such as what only a ControlNet has.
    architecture = detect_architecture(shapes if rules is _DIFFUSERS else network)
    name = naming.split()[0]
    if name == "ldm" and prefix != PREFIXES[0]:
        name = "comfy" if prefix == PREFIXES[1] else "bare"
    return Layout(name, prefix, architecture, places, linears)


def _linear_layers(shapes: Shapes, rules: _Rules) -> Iterator[tuple[str, str, slice | None]]:
    """Canonical path, tensor's name and rows of every linear layer."""
    per_level = _row_length(shapes) if rules is _LDM else 0
    for name, shape in shapes.items():
        if len(shape) != 2 or not name.endswith(".weight"):
            continue
        for pattern, paths in rules:
            found = re.fullmatch(pattern, name.removesuffix(".weight"))
            if found is None:
                continue
            counted = _place_in_row(found, per_level) | found.groupdict()
            share, rest = divmod(shape[0], len(paths))
            if rest:
                raise ValueError(f"{name} has {shape[0]} rows, which {len(paths)} layers cannot share")
            for index, path in enumerate(paths):
                rows = slice(index * share, (index + 1) * share) if len(paths) > 1 else None
                yield path.format(**counted), name, rows
            break


def _place_in_row(found: re.Match[str], per_level: int) -> dict[str, int]:
    """Level and number within it of an LDM block; the first input block is the convolution that lets the picture in."""
    if "row" not in found.re.groupindex:
        return {}
    row = int(found["row"]) - (1 if found.string.startswith("input_blocks.") else 0)
    if row < 0:
        raise ValueError(f"{found.string} is not where a U-Net of Stable Diffusion has a linear layer")
    return {"level": row // per_level, "number": row % per_level}


def _row_length(shapes: Shapes) -> int:
    """How many LDM blocks make a level: its residual blocks, and the one that halves the picture."""
    rows = {int(found[1]) for name in shapes if (found := re.match(r"input_blocks\.(\d+)\.", name))}
    halving = {int(found[1]) for name in shapes if (found := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))}
    length = min(halving, default=max(rows) + 1)
    if any(row % length for row in halving):
        raise ValueError("its levels are not equally deep, as those of Stable Diffusion's U-Nets are")
    return length


def _refuse_others(names: Mapping[str, object]) -> None:
    adapters = (what for part, what in _ADAPTERS.items() if any(part in name for name in names))
    if what := kinds.of_names(names) or next(adapters, None):
        raise ValueError(f"this is {what}; supported are {SUPPORTED}")
