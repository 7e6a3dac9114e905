"""Stand-ins for what the extension imports of A1111 and Forge, so that its own logic can be tested without them.

Only names that it uses, and only as much behaviour as it relies on. The programs themselves are in ``tests/hosts``.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made


class NetworkModule:
    """A layer's part of an adapter, as the program's extension for LoRA has it."""

    def __init__(self, net: Any, weights: Any) -> None:
        self.network, self.network_key = net, weights.network_key
        self.sd_key, self.sd_module = weights.sd_key, weights.sd_module

    def multiplier(self) -> float:
        return self.network.unet_multiplier


class NetworkOnDisk:
    def __init__(self, name: str, filename: str) -> None:
        from wadi_core.lorad.checkpoint import read_header

        self.name, self.filename = name, filename
        self.metadata = read_header(filename).metadata
        self.alias = self.metadata.get("ss_output_name", name)


def lora_modules(folder: Path) -> dict[str, ModuleType]:
    """``networks`` and ``network``, with one folder of files."""
    weights = SimpleNamespace
    network = module(
        "network",
        NetworkModule=NetworkModule,
        NetworkOnDisk=NetworkOnDisk,
        ModuleType=type("ModuleType", (), {}),
        NetworkWeights=lambda key, sd_key, w, sd_module: weights(network_key=key, sd_key=sd_key, w=w, sd_module=sd_module),
    )
    networks = module(
        "networks",
        module_types=["the program's own"],
        loaded_networks=[],
        available_networks={},
        available_network_aliases={},
        forbidden_network_aliases={"none": 1},
        extra_network_lora=object(),
    )

    def listed(names: list[str] | None = None) -> None:
        for path in sorted(folder.glob("*.safetensors")):
            if names is None or path.stem in names:
                try:
                    entry = NetworkOnDisk(path.stem, str(path))
                except ValueError:  # the program keeps a damaged file in its table
                    entry = SimpleNamespace(name=path.stem, filename=str(path), metadata={}, alias=path.stem)
                networks.available_networks[path.stem] = networks.available_network_aliases[path.stem] = entry

    def listed_anew() -> None:
        for table in (networks.available_networks, networks.available_network_aliases):
            table.clear()
        listed()

    networks.update_available_networks_by_names = listed
    networks.list_available_networks = listed_anew
    listed()
    return {"network": network, "networks": networks}


class Samplers(ModuleType):
    """``modules.sd_samplers``: lists, and the calls that make them known."""

    def __init__(self) -> None:
        super().__init__("modules.sd_samplers")
        self.all_samplers = [SimpleNamespace(name="Euler", aliases=[])]
        self.all_samplers_map: dict[str, Any] = {"Euler": self.all_samplers[0]}
        self.names: list[str] = []
        self.get_sampler_and_scheduler = SimpleNamespace(cache_clear=lambda: None)

    def set_samplers(self) -> None:
        self.names = [one.name for one in self.all_samplers]


class Params:
    """What the program hands to callbacks: whatever it is made with."""

    def __init__(self, *values: Any) -> None:
        self.x, self.values = values[0], values
        if len(values) == 8:
            _, self.image_cond, self.sigma, _, _, self.text_cond, self.text_uncond, self.denoiser = values


def host_modules(models: Path, sd_model: Any) -> dict[str, ModuleType]:
    """The package ``modules`` of A1111."""
    info = SimpleNamespace(filename=str(models / "Stable-diffusion" / "base.safetensors"))
    data = SimpleNamespace(sd_model=sd_model)
    state = SimpleNamespace(interrupted=False, skipped=False, sampling_step=0, sampling_steps=1)
    shared = module(
        "modules.shared",
        opts=SimpleNamespace(sd_model_checkpoint="base.safetensors"),
        state=state,
        sd_model=sd_model,
        cmd_opts=SimpleNamespace(no_gradio_queue=False),
    )
    samplers = Samplers()
    seen: dict[str, list[Any]] = {"denoiser": [], "denoised": [], "after": [], "latent": []}
    denoiser = type("CFGDenoiserTimesteps", (torch.nn.Module,), {"__init__": _init_denoiser})
    common = module(
        "modules.sd_samplers_common",
        SamplerData=lambda name, constructor, aliases, options: SimpleNamespace(
            name=name, constructor=constructor, aliases=aliases, options=options
        ),
        InterruptedException=type("InterruptedException", (BaseException,), {}),
        store_latent=seen["latent"].append,
        Sampler=type("Sampler", (), {}),
    )
    parts = {
        "paths": module("modules.paths", models_path=str(models)),
        "shared": shared,
        "sd_models": module(
            "modules.sd_models",
            model_data=data,
            checkpoint_aliases={"base.safetensors": info},
            checkpoints_list={"base.safetensors": info},
            list_models=lambda: None,
        ),
        "sd_samplers": samplers,
        "sd_samplers_common": common,
        "sd_samplers_timesteps": module(
            "modules.sd_samplers_timesteps",
            CFGDenoiserTimesteps=denoiser,
            CompVisSampler=type("CompVisSampler", (common.Sampler,), {}),
            CompVisTimestepsDenoiser=lambda model: model,
        ),
        "devices": module("modules.devices", dtype_unet=torch.float32),
        "scripts": module("modules.scripts", scripts_data=[]),
        "extra_networks": module("modules.extra_networks", TAG=re.compile("")),
        "prompt_parser": module(
            "modules.prompt_parser",
            reconstruct_multicond_batch=lambda cond, step: cond,
            reconstruct_cond_batch=lambda cond, step: cond,
        ),
        "script_callbacks": module(
            "modules.script_callbacks",
            CFGDenoiserParams=Params,
            CFGDenoisedParams=Params,
            AfterCFGCallbackParams=Params,
            cfg_denoiser_callback=seen["denoiser"].append,
            cfg_denoised_callback=seen["denoised"].append,
            cfg_after_cfg_callback=seen["after"].append,
        ),
    }
    package = module("modules", seen=seen, **parts)
    package.__path__ = []  # type: ignore[attr-defined]
    return {"modules": package, **{f"modules.{name}": part for name, part in parts.items()}}


def _init_denoiser(self: Any, sampler: Any) -> None:
    torch.nn.Module.__init__(self)
    self.sampler, self.model_wrap, self.step = sampler, None, 0
    self.p = SimpleNamespace()  # the generation, which the program sets when a pass begins


@contextmanager
def standing_in(modules: dict[str, ModuleType]) -> Iterator[Callable[[str], ModuleType]]:
    """Import modules of the extension with these in place; afterwards neither they nor it are known any more.

    Yields:
        A function that imports ``a1111_extension.<name>``.
    """
    ours = {name: found for name, found in sys.modules.items() if name.split(".")[0] in ("a1111_extension", *modules)}
    for name in ours:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        yield lambda name: importlib.import_module(f"a1111_extension.{name}")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("a1111_extension", *modules)]:
            del sys.modules[name]
        sys.modules.update(ours)
