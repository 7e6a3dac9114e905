"""What makes a role of the frozen network: a LoRaD, a LoRA or DoRA of peft, or a copy of the network with all weights.

Each kind names its trained parameters, switches itself on and off, and can say what the network's weights are with it.
LoRaD is the method; the others are there to be compared with it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wadi_core import hub
from wadi_core.lorad import LoRaD, Metadata
from wadi_core.lorad.layers import adapter_key
from wadi_core.lorad.linear import RotatedLinear, attach
from wadi_core.packages import install

Factors = Mapping[str, tuple[Tensor, Tensor]]


def factors_of_file(path: str, network: nn.Module, layers: Sequence[str], rank: int) -> Factors:
    """The factors of a LoRaD, a file or a name of the model hub, for exactly these layers, in their order."""
    lorad = LoRaD.load(hub.local(path))
    match = lorad.matched(network)
    try:
        match.check()
    except ValueError as error:
        raise ValueError(f"start_from: {path}: {error}") from None
    found = {layer: lorad.factors[key] for key, layer in match.paths.items()}
    ranks = sorted({a.shape[1] for a, _ in found.values()})
    if set(found) != set(layers) or ranks != [rank]:
        raise ValueError(
            f"start_from: {path} turns {len(found)} layers at rank {', '.join(map(str, ranks))}; "
            f"the student is to turn {len(layers)} at rank {rank} (student_rank)"
        )
    return {layer: found[layer] for layer in layers}


class Adapter:
    """One role's trained parameters.

    Attributes:
        name: of the role.
        network: what is called in this role.
        parameters: name -> trained parameter, in an order that depends on nothing but the network.
    """

    def __init__(self, name: str, network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.name, self.network, self.parameters = name, network, dict(parameters)

    def switch(self, on: bool) -> None:
        """Let the network compute with this adapter, or without it."""
        raise NotImplementedError

    def forget(self) -> None:
        """Let go of what was kept between calls."""

    def weights(self) -> dict[str, Tensor]:
        """All weights of the network as this adapter makes them, in diffusers' names, as float32 on the CPU."""
        raise NotImplementedError


class LoRaDAdapter(Adapter):
    """Rotation angles.

    Args:
        name: of the role.
        network: gets the adapter, in place.
        factors: path of a layer -> (theta_a, theta_b), the initial values.
        share, recompute: as the attributes of :class:`~wadi_core.lorad.linear.RotatedLinear`.
    """

    def __init__(self, name: str, network: nn.Module, factors: Factors, share: bool = False, recompute: bool = False) -> None:
        attach(network, factors, name, trainable=True)
        self.layers = {path: cast(RotatedLinear, network.get_submodule(path)) for path in factors}
        for layer in self.layers.values():
            layer.share, layer.recompute, layer.active = share, recompute, ()
        parameters = {}
        for path, layer in self.layers.items():
            parameters |= {f"{path}.a": layer.lorad_a[name], f"{path}.b": layer.lorad_b[name]}
        super().__init__(name, network, parameters)

    def switch(self, on: bool) -> None:
        for layer in self.layers.values():
            if on:
                layer.active = (self.name,)
            elif layer.active == (self.name,):
                layer.active = ()

    def forget(self) -> None:
        for layer in self.layers.values():
            layer.forget(self.name)

    def lorad(self, metadata: Metadata) -> LoRaD:
        """The adapter as the object that is saved, copied."""
        factors = {}
        for path in self.layers:
            pair = (self.parameters[f"{path}.{part}"].detach().float().cpu().clone() for part in "ab")
            factors[adapter_key(path, metadata.architecture)] = tuple(pair)
        return LoRaD(factors, metadata)

    def weights(self) -> dict[str, Tensor]:
        state = bare_weights(self.network)
        self.switch(True)
        return state | {f"{path}.weight": layer.rotated_weight().float().cpu() for path, layer in self.layers.items()}


PEFT_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", "oft_R")


class PeftAdapter(Adapter):
    """LoRA, DoRA with its trained norms, or OFT, by peft; alpha equals the rank, so nothing is scaled.

    Of OFT the rank is the side of its blocks; where they do not fill a layer, peft takes the nearest side that does.

    Put on a network after every LoRaD: what it wraps keeps its own rotations.

    Raises:
        ValueError: peft is not installed; one line.
    """

    def __init__(self, name: str, network: nn.Module, layers: Sequence[str], rank: int, seed: int, kind: str = "lora") -> None:
        try:
            from peft import LoraConfig, OFTConfig, inject_adapter_in_model
        except ImportError as error:
            raise ValueError(f"adapter: {kind} needs peft, which cannot be imported ({error}): {install('peft')}") from None
        targets = list(layers)
        if kind == "oft":
            settings: Any = OFTConfig(r=0, oft_block_size=rank, target_modules=targets, bias="none")
        else:
            settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, use_dora=kind == "dora", bias="none")
        others = [parameter for parameter in network.parameters() if parameter.requires_grad]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft is surprised by a second adapter; here it is meant
            torch.manual_seed(seed)
            inject_adapter_in_model(settings, network, adapter_name=name)
        for parameter in others:  # peft freezes all but its own
            parameter.requires_grad_(True)
        self.layers: dict[str, Any] = {path: network.get_submodule(path) for path in layers}  # of peft
        parameters = {}
        for path, layer in self.layers.items():
            for part in PEFT_PARTS:
                if name in getattr(layer, part, ()):
                    weight = getattr(layer, part)[name].weight
                    weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
                    parameters[f"{path}.{part}"] = weight
        super().__init__(name, network, parameters)

    def switch(self, on: bool) -> None:
        # peft marks the parameters of what is switched off as frozen: a role must be on for its backward too.
        for layer in self.layers.values():
            if on:
                layer.set_adapter(self.name)
            if on or layer.active_adapters == [self.name]:
                layer.enable_adapters(on)

    def weights(self) -> dict[str, Tensor]:
        state = bare_weights(self.network)
        for path, layer in self.layers.items():
            self.switch(True)
            state[f"{path}.weight"] = self._merged(layer).float().cpu()
        return state

    @torch.no_grad()
    def _merged(self, layer: Any) -> Tensor:
        """The weight (out, in) of a layer with this adapter merged into it."""
        base = layer.get_base_layer()
        if hasattr(layer, "oft_R"):  # it turns the input: what becomes of each unit vector are the weight's columns
            bias = 0.0 if base.bias is None else base.bias
            return (layer(torch.eye(base.in_features, device=base.weight.device, dtype=base.weight.dtype)) - bias).T
        return merged_weight(layer, self.name, base.weight.detach())


def oft_parameters(inputs: int, block: int) -> int:
    """How many numbers peft trains of a layer with so many inputs, in blocks of this side or of the nearest that fits."""
    below = next(side for side in range(min(block, inputs), 0, -1) if inputs % side == 0)
    above = next(side for side in range(min(block, inputs), inputs + 1) if inputs % side == 0)
    side = above if above - block < block - below else below
    return inputs * (side - 1) // 2


def merged_weight(layer: Any, name: str, base: Tensor) -> Tensor:
    """The weight (out, in) of a linear layer with peft's LoRA or DoRA merged into it."""
    with torch.no_grad():
        moved = base.float() + layer.get_delta_weight(name).float()
        if name not in layer.lora_magnitude_vector:
            return moved
        norm = moved.norm(dim=1)
        return moved * (layer.lora_magnitude_vector[name].weight.float() / norm)[:, None]


class FullAdapter(Adapter):
    """A copy of the network of which every weight is trained: the costliest way, as a measure of the others."""

    def __init__(self, name: str, network: nn.Module) -> None:
        own = copy.deepcopy(network).requires_grad_(True)
        for parameter in own.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        super().__init__(name, own, dict(own.named_parameters()))

    def switch(self, on: bool) -> None:
        """Nothing to switch: the copy is never anything else."""

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().float().cpu() for name, tensor in self.network.state_dict().items()}


def bare_weights(network: nn.Module) -> dict[str, Tensor]:
    """The frozen weights under the names that they have without any adapter, as float32 on the CPU."""
    state = {}
    for name, tensor in network.state_dict().items():
        if any(part in name for part in ("lorad_a.", "lorad_b.", ".lora_", ".oft_")):
            continue
        state[name.replace(".base_layer.", ".")] = tensor.detach().float().cpu()
    return state
