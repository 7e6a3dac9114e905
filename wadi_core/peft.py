"""LoRaD as a method of peft, so that ``get_peft_model`` and ``add_adapter`` train and load it on any linear layers.

    import wadi_core.peft
    from wadi_core.peft import LoRaDConfig

    unet.add_adapter(LoRaDConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))

Importing the module enters the method into peft's tables of configs, models and prefixes; nothing of peft is changed.
The layers rotate with the functions of :mod:`.lorad`, and angles stay in float32 whatever the network's type.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import __version__ as peft_version
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    set_peft_model_state_dict,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from . import configs, entries
from .files import atomic_write, existing_file, refusal
from .lorad import LoRaD, Metadata
from .lorad.adapter import finite
from .lorad.checkpoint import read_header, read_tensors, write_safetensors
from .lorad.format import LORAD_ENDINGS, architecture_of_paths, pairs_of_names
from .lorad.layers import Network, adapter_key
from .lorad.linear import FactorDict, RotatedLinear, rotated_linear, turned
from .lorad.rotation import Factors, rotate_, working_dtype

if not hasattr(BaseTuner, "_get_adapter_state_dict"):  # without it peft saves those methods alone that it knows by name
    raise ImportError(f"LoRaD as a method of peft needs peft 0.21 or newer, this is {peft_version}: update peft")

_PEFT_PREFIX = "base_model.model."  # what peft puts before the names of a network's layers
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # what diffusers' save_lora_adapter writes, its config inside
_DIFFUSERS_CONFIG = "lora_adapter_metadata"


class LoRaDType(str, Enum):
    """The method's name, in the form of a member of peft's own ``PeftType``, which is closed."""

    LORAD = "LORAD"


@dataclass
class LoRaDConfig(PeftConfig):
    """The settings of one LoRaD adapter.

    Args:
        r: rank of the angles.
        target_modules: names of the linear layers to turn, or endings of names; a string is a regular expression, or
            ``all-linear``. By default those that peft gives a LoRA of a language model.
        exclude_modules: names, endings or a regular expression of layers to leave out.
        layers_to_transform: of the numbered blocks of a network only these.
        layers_pattern: the name of the list of blocks, where it is not found by itself.
        rank_pattern: name of a layer or regular expression -> its own rank.
        init_weights: start as an adapter that turns nothing; otherwise with random angles.
        modules_to_save: layers that are trained and saved whole beside the adapter.
        bias: ``none``; biases are never trained.
        metadata: what a LoRaD file says of itself, as :func:`to_peft` keeps it.

    Raises:
        ValueError: settings that no adapter can have; one line.
    """

    r: int = field(default=8, metadata={"help": "Rank of the angles"})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Linear layers to turn"})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Layers to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Blocks to take, by number"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Layers that have a rank of their own"})
    init_weights: bool = field(default=True, metadata={"help": "Start as an adapter that turns nothing"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Layers trained and saved whole"})
    bias: str = field(default="none", metadata={"help": "Always none: biases are never trained"})
    metadata: dict[str, str] | None = field(default=None, metadata={"help": "Metadata of a LoRaD file"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LoRaDType.LORAD
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        for rank in (self.r, *self.rank_pattern.values()):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"the rank r of a LoRaD has to be a whole number from 1 on, not {rank!r}")
        if self.bias != "none":
            raise ValueError(f"a LoRaD trains no biases: bias has to be 'none', not {self.bias!r}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list of names, not as a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says nothing without layers_to_transform: give both or neither")


class LoRaDLayer(BaseTunerLayer):
    """The adapters of one linear layer: theta_a (out, r) and theta_b (r, in/2) by name, and how far they are turned."""

    adapter_layer_names = ("lorad_a", "lorad_b")
    other_param_names = ("r", "scaling")

    def __init__(self, base_layer: nn.Linear) -> None:
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lorad_a, self.lorad_b = FactorDict(), FactorDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._original: Tensor | None = None  # the weight as it was before merging, in main memory
        self._disable_adapters = False

    def update_layer(self, adapter_name: str, r: int, config: LoRaDConfig) -> None:
        """Add an adapter of rank ``r``."""
        dtype = working_dtype(self.weight)
        self.r[adapter_name] = r
        self.scaling[adapter_name] = 1.0
        self.lorad_a[adapter_name] = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype))
        self.lorad_b[adapter_name] = nn.Parameter(torch.empty(r, self.in_features // 2, dtype=dtype))
        nn.init.xavier_uniform_(self.lorad_b[adapter_name])
        if not config.init_weights:
            nn.init.xavier_uniform_(self.lorad_a[adapter_name])
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """What peft calls after loading too; the type stays one in which small angles are not lost."""
        weight = self.weight
        for table in (self.lorad_a, self.lorad_b):
            if adapter_name in table and not table[adapter_name].is_meta:
                factor = table[adapter_name]
                factor.data = factor.data.to(device or weight.device, working_dtype(weight))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength, which multiplies its angles."""
        if adapter in self.scaling:
            self.scaling[adapter] = entries.strength(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strengths of the active adapters."""
        for name in self.active_adapters:
            self.set_scale(name, self.scaling.get(name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strengths of the active adapters, or set them to 1."""
        for name in self.active_adapters:
            self.set_scale(name, self.scaling.get(name, 1.0) / scale if scale else 1.0)

    def factors(self, names: Sequence[str]) -> list[Factors]:
        """(theta_a, theta_b, strength) of those of these adapters that are here and turn anything."""
        return [(self.lorad_a[n], self.lorad_b[n], self.scaling[n]) for n in names if self.scaling.get(n, 0.0) != 0.0]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Turn the layer's own weight, which is rounded to its type once, however many adapters there are.

        The weight as it was is kept in main memory until :meth:`unmerge`: as many bytes as the weight has.

        Args:
            safe_merge: check first that the turned weight is finite.
            adapter_names: by default the active ones.

        Raises:
            ValueError: ``safe_merge``, and it is not finite; nothing has been changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling]
        if not names:
            return
        weight = self.weight
        original = weight.detach().to("cpu", copy=True) if self._original is None else self._original
        factors = self.factors([*self.merged_adapters, *names])
        if safe_merge and not rotate_(original.to(weight.device, copy=True), factors).isfinite().all():
            # In peft's own words, which programs look for.
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        if self._original is not None:
            weight.copy_(original)
        rotate_(weight, factors)
        self._original = original
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the very bits of the weight back that it had before :meth:`merge`."""
        if self._original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.weight.copy_(self._original)
        self._original = None
        self.merged_adapters.clear()


class LoRaDLinear(nn.Module, LoRaDLayer):
    """A linear layer whose frozen weight is turned by the active adapters as it is used."""

    def __init__(self, base_layer: nn.Linear, adapter_name: str, r: int, config: LoRaDConfig) -> None:
        super().__init__()
        LoRaDLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        factors = [] if self.disable_adapters or self.merged else self.factors(self.active_adapters)
        if not factors:
            return self.base_layer(x, *args, **kwargs)
        return rotated_linear(x, self.weight, self.bias, factors, partial(turned, self.weight, factors))

    def __repr__(self) -> str:
        return "lorad." + super().__repr__()


class LoRaDModel(BaseTuner):
    """A network with LoRaD adapters on its linear layers, as peft makes it."""

    prefix = "lorad_"
    tuner_layer_cls = LoRaDLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: LoRaDConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        pattern = get_pattern_key(list(peft_config.rank_pattern), current_key)
        rank = peft_config.rank_pattern.get(pattern, peft_config.r)
        if isinstance(target, LoRaDLinear):
            target.update_layer(adapter_name, rank, peft_config)
            return
        layer = LoRaDLinear(_usable(current_key, target), adapter_name, rank, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _usable(name: str, layer: nn.Module) -> nn.Linear:
    """The layer, if it is one that a LoRaD can turn.

    Raises:
        ValueError: it is not; one line that names it.
    """
    if isinstance(layer, RotatedLinear):
        raise ValueError(f"{name}: this layer carries a LoRaD of LoRaD.apply_to: take it off before peft adds another")
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name}: a LoRaD turns torch.nn.Linear layers only, this is a {type(layer).__name__}")
    if not layer.weight.is_floating_point():
        raise ValueError(f"{name}: a LoRaD turns weights of floating-point numbers, this one is quantised")
    if layer.in_features % 2:
        raise ValueError(f"{name}: {layer.in_features} inputs do not make pairs, leave this layer out")
    return layer


def to_peft(lorad: LoRaD | str | os.PathLike[str], folder: str | os.PathLike[str], network: Network) -> None:
    """Write a LoRaD as a folder that ``PeftModel.from_pretrained`` reads.

    Args:
        lorad: the adapter, or its file.
        folder: made where it is not there; peft's two files in it are replaced.
        network: the network it is for, or the names and shapes of its tensors: keys of a LoRaD hold no dots.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the file is no LoRaD, or does not fit the network. Both with a message of one line.
    """
    folder = Path(folder)
    config, tensors = _in_peft_form(lorad, network, folder.name)
    config.inference_mode = True
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    named = {_PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}
    write_safetensors(folder / SAFETENSORS_WEIGHTS_NAME, named, {"format": "pt"})
    with atomic_write(folder / CONFIG_NAME) as file:
        file.write(json.dumps(settings, indent=2, sort_keys=True).encode())


def add_lorad(network: Any, lorad: LoRaD | str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Put a LoRaD on a network of diffusers as an adapter of peft, the only active one; its ``load_lora_adapter`` reads
    LoRA alone.

    Args:
        network: a U-Net or PixArt of diffusers, with such adapters or without.
        lorad: the adapter, its file, or a folder as :func:`from_peft` takes it.
        adapter_name: for ``set_adapters``, ``delete_adapters`` and the like.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is no LoRaD, does not fit the network, or the name is taken; nothing has been changed then.
    """
    if not isinstance(lorad, LoRaD) and Path(lorad).is_dir():
        lorad = from_peft(lorad)
    config, tensors = _in_peft_form(lorad, network, adapter_name)
    network.add_adapter(config, adapter_name)
    set_peft_model_state_dict(network, tensors, adapter_name)


def _in_peft_form(lorad: LoRaD | str | os.PathLike[str], network: Network, title: str) -> tuple[LoRaDConfig, dict[str, Tensor]]:
    """The config and the tensors of a LoRaD for this network, under the paths of its layers."""
    lorad = lorad if isinstance(lorad, LoRaD) else LoRaD.load(lorad)
    if isinstance(network, nn.Module) and any(isinstance(layer, BaseTunerLayer) for layer in network.modules()):
        weights = network.state_dict()  # peft puts a layer of its own around each that has adapters already
        network = {name.replace(".base_layer.", "."): tuple(tensor.shape) for name, tensor in weights.items()}
    match = lorad.matched(network)
    match.check()
    pairs = {match.paths[key]: pair for key, pair in lorad.factors.items()}
    config = LoRaDConfig(
        r=lorad.rank,
        target_modules=list(pairs),
        # Anchored: peft also takes a name for the ending of longer ones.
        rank_pattern={f"^{path}": b.shape[0] for path, (_, b) in pairs.items() if b.shape[0] != lorad.rank},
        metadata=lorad.metadata.to_strings(lorad.rank, title),
    )
    return config, {f"{path}{end}": pair[i] for path, pair in pairs.items() for end, i in LORAD_ENDINGS.items()}


def from_peft(folder: str | os.PathLike[str], metadata: Metadata | None = None) -> LoRaD:
    """The LoRaD in a folder that peft's ``save_pretrained`` or diffusers' ``save_lora_adapter`` has written.

    Args:
        folder: with peft's two files, or diffusers' one.
        metadata: of the adapter; by default what :func:`to_peft` has kept, or the architecture that the layers show.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: it is damaged, of another method, or no adapter of a U-Net or PixArt. Both with one line.
    """
    path = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    by_diffusers = Path(folder, _DIFFUSERS_FILE)
    path = existing_file(by_diffusers if by_diffusers.exists() and not path.exists() else path)
    header = read_header(path)
    config = {} if path == by_diffusers else configs.read(path.with_name(CONFIG_NAME))
    try:
        if path == by_diffusers:
            config = _object(header.metadata.get(_DIFFUSERS_CONFIG))
        if config.get("peft_type") != LoRaDType.LORAD:
            raise ValueError(f"this is no LoRaD but a peft adapter of the type {config.get('peft_type')!r}")
        strings = config.get("metadata") or {}
        if not isinstance(strings, dict) or not all(isinstance(text, str) for text in strings.values()):
            raise ValueError("the metadata in its config is no table of texts")
        names = {k.removeprefix(_PEFT_PREFIX): pair for k, pair in pairs_of_names(header.places, LORAD_ENDINGS).items()}
        metadata = metadata or Metadata.from_strings(strings, architecture_of_paths(names, header.shapes))
        tensors = read_tensors(header)
        factors = {adapter_key(path, metadata.architecture): (tensors[a], tensors[b]) for path, (a, b) in names.items()}
        return finite(LoRaD(factors, metadata))
    except ValueError as error:
        raise refusal(path, str(error)) from error


def _object(text: str | None) -> dict[str, Any]:
    """The JSON object in a text; empty where there is neither."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


PEFT_TYPE_TO_CONFIG_MAPPING[LoRaDType.LORAD] = LoRaDConfig  # pyright: ignore[reportArgumentType]
PEFT_TYPE_TO_TUNER_MAPPING[LoRaDType.LORAD] = LoRaDModel  # pyright: ignore[reportArgumentType]
PEFT_TYPE_TO_PREFIX_MAPPING[LoRaDType.LORAD] = LoRaDModel.prefix  # pyright: ignore[reportArgumentType]
