"""LoRaD for A1111's networks: a module type that turns a layer's weight, whatever else is applied before or after it.

The program applies the networks of a prompt one after another, each to the weight that the others have already
changed, and puts the original bits back when they go. So angles of several LoRaDs add, and the order of the prompt is
kept. Only the module type is registered; nothing of the program is replaced.
"""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wadi_core.lorad import LoRaD
from wadi_core.lorad.layers import adapter_key, layers_of_keys
from wadi_core.lorad.layouts import Layout
from wadi_core.lorad.linear import check_fits
from wadi_core.lorad.rotation import Factors, rotate_, working_dtype

from . import host

FIRST, SECOND = "lorad_a", "lorad_b"
NETWORK = "diffusion_model_"  # before the program's names of the denoising network's layers


def register() -> None:
    """Add the module type to the program's list; once, however often it is called. Without its Lora extension: nothing."""
    networks = host.lora_extension()
    if networks is not None:
        others = [kind for kind in networks.module_types if type(kind).__name__ != "ModuleTypeLoRaD"]
        networks.module_types[:] = [*others, _classes(networks)()]


def turned(weight: Tensor, factors: list[Factors]) -> Tensor:
    """A weight (out, in) of any type, turned by the sum of angles, in float32 (float64 for float64)."""
    return rotate_(weight.detach().to(working_dtype(weight), copy=True), factors)


def layer_names(layout: Layout) -> dict[str, str]:
    """Canonical path of each linear layer of the loaded network -> the program's name of it."""
    names = {path: place.name.removeprefix(layout.prefix).removesuffix(".weight") for path, place in layout.places.items()}
    return {path: NETWORK + name.replace(".", "_") for path, name in names.items()}


def program_knows(networks: ModuleType, layout: Layout) -> bool:
    """Whether the program finds the layers of this network by the keys of adapter files.

    It counts three blocks to a level, as Stable Diffusion's networks have; others are found by this module.
    """
    keys = {adapter_key(path, layout.architecture): name for path, name in layer_names(layout).items()}
    return all(networks.convert_diffusers_name_to_compvis(key, False) == name for key, name in keys.items())


@cache
def _classes(networks: ModuleType) -> type:
    """The module type, made of the program's classes, which are importable only while its own extension is loaded."""
    network: Any = sys.modules["network"]

    class NetworkModuleLoRaD(network.NetworkModule):
        """The angles of one layer."""

        def __init__(self, net: Any, weights: Any) -> None:
            super().__init__(net, weights)
            if not {FIRST, SECOND} <= weights.w.keys():
                raise ValueError(f"{weights.network_key}: of the two tensors of a layer one is missing")
            self.a, self.b = weights.w[FIRST], weights.w[SECOND]
            check_fits(weights.sd_key, self.sd_module, self.a, self.b)

        @property
        def factors(self) -> Factors:
            return self.a, self.b, self.multiplier()

        def calc_updown(self, orig_weight: Tensor) -> tuple[Tensor, None]:
            """What to add to the weight, and to the bias; the strength scales the angles."""
            rotated = turned(orig_weight, [self.factors])
            return rotated - orig_weight.to(rotated.dtype), None

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            """For the option of the old method, where each network adds to a layer's output and none sees the others.

            The angles of all LoRaDs are put together in the first of them.
            """
            modules = [net.modules.get(self.sd_key) for net in networks.loaded_networks]
            together = [module for module in modules if isinstance(module, NetworkModuleLoRaD)]
            if together[0] is not self:
                return y
            weight = self.sd_module.weight
            rotated = turned(weight, [module.factors for module in together])
            return y + torch.nn.functional.linear(x, (rotated - weight.to(rotated.dtype)).to(x.dtype))

    class NetworkModuleNothing(network.NetworkModule):
        """For a layer that the program has taken for another one."""

        def calc_updown(self, orig_weight: Tensor) -> tuple[Tensor, None]:
            return torch.zeros_like(orig_weight, dtype=working_dtype(orig_weight)), None

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y

    class ModuleTypeLoRaD(network.ModuleType):
        """Recognises a layer of a LoRaD file by the names of its tensors."""

        def create_module(self, net: Any, weights: Any) -> Any:
            """A layer's module; None where it is no LoRaD's. All of a file fits, or ValueError is raised."""
            if not weights.w.keys() & {FIRST, SECOND}:
                return None
            if not hasattr(net, "wadi_modules"):
                net.wadi_modules = modules_of_file(net)
                net.modules.update(net.wadi_modules)
            if not net.wadi_modules:
                return NetworkModuleLoRaD(net, weights)
            return net.wadi_modules.get(weights.sd_key) or NetworkModuleNothing(net, weights)

    def modules_of_file(net: Any) -> dict[str, NetworkModuleLoRaD]:
        """Modules by the program's names of layers, for a network whose layers it does not find itself; else none."""
        layout = host.layout()
        if program_knows(networks, layout):
            return {}
        lorad = LoRaD.load(net.network_on_disk.filename)
        names, layers = layer_names(layout), host.lora_layers()
        found = {}
        for key, path in layers_of_keys(lorad.factors, layout.network, layout.architecture).items():
            a, b = lorad.factors[key]
            weights = network.NetworkWeights(key, names[path], {FIRST: a, SECOND: b}, layers[names[path]])
            found[names[path]] = NetworkModuleLoRaD(net, weights)
        return found

    return ModuleTypeLoRaD
