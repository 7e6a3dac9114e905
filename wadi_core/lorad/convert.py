"""Adapters in the forms that other programs read: the authors' factors, and plain LoRA.

A LoRaD turns weights, a LoRA adds to them. Turned minus plain weight on a given base is a change of full rank in
general; its best approximation of a low rank is a LoRA for that base, and costs an error that grows with the angles.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import atomic_write, one_line
from .adapter import LoRaD, check_together, fuse
from .checkpoint import PICKLE_ENDINGS, write_safetensors
from .format import AUTHORS_ENDINGS
from .layers import adapter_key
from .layouts import path_of_key
from .lowrank import decompose
from .merge import factors_by_layer
from .metadata import Metadata, sd_scripts_hashes
from .rotation import rotate_
from .weights import Weights, check_output

Pair = tuple[Tensor, Tensor]


def save_factors(lorad: LoRaD, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
    """Write an adapter as the authors' code has it: ``<diffusers path>.theta_a`` and ``.theta_b``.

    These files say nothing of the schedule; every reader takes the released one (0.0047, 999).

    Args:
        path: a ``.safetensors`` file, or a ``.pth`` that ``torch.load(weights_only=True)`` reads.

    Raises:
        OSError: it cannot be written.
        ValueError: another ending, or an adapter whose schedule would be lost. Both with a message of one line.
    """
    path = Path(path)
    released = Metadata(alpha_T_squared=0.0047, timestep=999).one_step
    if lorad.one_step not in (None, released):
        raise ValueError("the authors' factors cannot say their schedule, and this adapter's is not the released one")
    tensors = {
        path_of_key(key) + ending: pair[place].detach().to("cpu", dtype).contiguous()
        for key, pair in lorad.factors.items()
        for ending, place in AUTHORS_ENDINGS.items()
    }
    if path.suffix.lower() in PICKLE_ENDINGS:
        with atomic_write(path) as file:
            torch.save(tensors, file)
    elif path.suffix.lower() == ".safetensors":
        write_safetensors(path, tensors)
    else:
        raise ValueError(one_line(f"{path}: factors are written as .safetensors or .pth"))


@dataclass(frozen=True)
class LayerError:
    """What a LoRA of limited rank gets wrong in a layer, squared Frobenius norms: of the change, of what is missing."""

    change: float
    missing: float

    @property
    def relative(self) -> float:
        """Norm of what is missing over the norm of the change; 0 where nothing changes."""
        return math.sqrt(self.missing / self.change) if self.change else 0.0


@dataclass(frozen=True)
class LoRA:
    """A plain LoRA: weight + up @ down.

    Attributes:
        factors: canonical path -> (up (out, rank), down (rank, in)).
        errors: canonical path -> what the rank costs there.
        metadata: of the LoRaD that it stands for.
        rank: of its layers.
    """

    factors: Mapping[str, Pair]
    errors: Mapping[str, LayerError]
    metadata: Metadata

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values()))[1].shape[0]

    @property
    def error(self) -> float:
        """Relative error of the change of all weights together, in the Frobenius norm."""
        return LayerError(sum(e.change for e in self.errors.values()), sum(e.missing for e in self.errors.values())).relative

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as programs that know LoRA read it.

        For U-Nets in the names of sd-scripts (``lora_unet_*.lora_down.weight``, ``.lora_up.weight``, ``.alpha`` equal to
        the rank, so that nothing is scaled), for PixArt in those of peft (``transformer.*.lora_A.weight``).

        Raises:
            OSError: it cannot be written; one line.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        for layer, (up, down) in self.factors.items():
            key = adapter_key(layer, self.metadata.architecture)
            if self.metadata.architecture == "pixart-alpha":
                tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            else:
                alpha = torch.tensor(float(down.shape[0]), dtype=down.dtype)
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
        strings = self.metadata.to_strings(self.rank, path.stem)
        for own in ("wadi.format", "wadi.pairing"):
            del strings[own]
        strings |= {"ss_network_module": "networks.lora", "ss_network_alpha": str(self.rank)}
        write_safetensors(path, tensors, strings | sd_scripts_hashes(tensors, strings))


def to_lora(
    base: Weights,
    adapters: Sequence[tuple[LoRaD, float]],
    rank: int,
    dtype: torch.dtype = torch.float16,
    progress: Callable[[int, int], None] | None = None,
) -> LoRA:
    """The LoRA that comes closest, layer by layer, to what LoRaDs do to a base.

    The truncated singular value decomposition of turned minus plain weight; the error is that of the factors as they
    are stored.

    Args:
        base: the network that the LoRA will be used on; on another one the error is larger.
        adapters: (LoRaD, strength) of each.
        rank: of every layer, at most what the largest needs. Smaller layers are filled up with zeros, because
            programs exist that scale all layers by one alpha and one rank.
        dtype: in which the factors are stored.
        progress: called after each layer with how many of how many are done.

    Raises:
        ValueError: an adapter does not fit, or they do not belong together; one line.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, not {rank}")
    schedule = check_together(adapter for adapter, strength in adapters if strength)
    layers = factors_by_layer(base, adapters)
    if not layers:
        raise ValueError("at strength 0 nothing changes: there is nothing to convert")
    rank = min(rank, max(min(base.layout.shapes[path]) for path in layers))
    factors: dict[str, Pair] = {}
    errors: dict[str, LayerError] = {}
    for path, angles in layers.items():
        # Singular vectors come by way of a Gram matrix, which halves the digits: hence float64.
        weight = base.linear(path).double()
        change = rotate_(weight.clone(), angles) - weight
        up, down = decompose(change).factors(min(rank, *change.shape))
        up = F.pad(up, (0, rank - up.shape[1])).to(dtype)
        down = F.pad(down, (0, 0, 0, rank - down.shape[0])).to(dtype)
        missing = change - up.double() @ down.double()
        factors[path] = (up, down)
        errors[path] = LayerError(float(change.square().sum()), float(missing.square().sum()))
        if progress is not None:
            progress(len(factors), len(layers))
    first = adapters[0][0].metadata
    metadata = Metadata(
        architecture=base.architecture,
        alpha_T_squared=schedule.alpha_T_squared if schedule else None,
        timestep=schedule.timestep if schedule else None,
        input_scale=schedule.input_scale if schedule else "one",
        prediction_type=first.prediction_type,
        title=first.title,
        license=first.license,
    )
    return LoRA(factors, errors, metadata)


@torch.no_grad()
def eps_error(
    network: nn.Module, adapters: Iterable[tuple[LoRaD, float]], lora: LoRA, predict: Callable[[], Tensor]
) -> tuple[float, float]:
    """What a LoRA costs in what the network returns.

    Args:
        network: the base, live; it is as it was when this returns.
        adapters: (LoRaD, strength) of each.
        lora: what stands for them.
        predict: calls the network on the same inputs each time.

    Returns:
        |eps_LoRA - eps_LoRaD| / |eps_LoRaD|, and the same over |eps_LoRaD - eps_base|: 1 is as far off as the bare base.
    """
    plain = predict().double()
    fused = fuse(network, adapters)
    try:
        turned = predict().double()
    finally:
        fused.restore()
    weights = {path: network.get_parameter(f"{path}.weight") for path in lora.factors}
    kept = {path: weight.clone() for path, weight in weights.items()}
    try:
        for path, (up, down) in lora.factors.items():
            weights[path].copy_(kept[path].float() + (up.float() @ down.float()).to(kept[path].device))
        added = predict().double()
    finally:
        for path, weight in weights.items():
            weight.copy_(kept[path])
    off = (added - turned).norm()
    return float(off / turned.norm()), float(off / (turned - plain).norm())


def convert_file(source: str | os.PathLike[str], output: str | os.PathLike[str], to: str, dtype: torch.dtype) -> LoRaD:
    """A LoRaD or the authors' factors as the other of the two.

    Args:
        to: ``lorad`` or ``factors``.

    Raises:
        OSError, ValueError: a file cannot be read or written, or is something else; one line.
    """
    check_output(output, [source])
    lorad = LoRaD.load(source)
    if to == "factors":
        save_factors(lorad, output, dtype)
    else:
        lorad.save(output, dtype)
    return lorad
