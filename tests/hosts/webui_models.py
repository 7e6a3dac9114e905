"""Checkpoints and adapters with random weights for A1111 and Forge, and the core's own pictures of them.

``Base`` keeps the same weights in the form that a program loads and in the one that the core does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from wadi_core import LoRaD, OneStepPipeline, configs, mini
from wadi_core.lorad import Metadata, layouts
from wadi_core.lorad.layers import student_layers
from wadi_core.lorad.merge import merged_tensors
from wadi_core.lorad.weights import Weights
from wadi_core.mini.export import export

# Stable Diffusion 1.5's levels and blocks, all 182 layers of a LoRaD, ten times narrower.
NARROW = {
    "unet": {"block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 32, "attention_head_dim": 4, "sample_size": 8},
    "vae": {"block_out_channels": [32, 32, 32, 64], "layers_per_block": 1, "sample_size": 64},
    "text_encoder": networks.SMALL["text_encoder"],
}
# Two levels of Stable Diffusion 1.5's own width: Forge knows no others. Its autoencoder and text encoder are the full ones.
WIDE = {
    "unet": {
        "block_out_channels": [320, 320],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "sample_size": 8,
    }
}
SPREAD = 3.0  # of random angles: pictures with and without an adapter differ plainly


@dataclass
class Base:
    """A base: ``folder`` for the core, ``name`` for the program, side in pixels, and its U-Net's module for adapters."""

    name: str
    folder: Path
    size: int
    unet: torch.nn.Module
    adapters: dict[str, Path] = field(default_factory=dict)
    _pipe: OneStepPipeline | None = None

    @property
    def lorad_layers(self) -> list[str]:
        """The layers that a LoRaD turns."""
        return student_layers(self.unet)

    @property
    def pipe(self) -> OneStepPipeline:
        """The core's pipeline of it."""
        if self._pipe is None:
            self._pipe = OneStepPipeline.from_pretrained(self.folder, device="cpu", precision="exact")
        return self._pipe

    def mixed(self, prompts: dict[str, float], seed: int) -> list[np.ndarray]:
        """A picture of several prompts with their shares: clean latents of one noise mix as the predictions do."""
        self.pipe.set_lorad(None)
        made = self.pipe(list(prompts), seeds=[seed] * len(prompts), return_latents=True).latents
        shares = torch.tensor(list(prompts.values())).reshape(-1, 1, 1, 1)
        return [np.asarray(image).astype(int) for image in self.pipe.decode((made * shares).sum(0, keepdim=True))]

    def pictures(
        self, prompt: str, seeds: list[int], lorad: Any = None, size: int | None = None, hires: str | bool = False
    ) -> list[np.ndarray]:
        """What the core draws, as (h, w, 3) numbers from 0 to 255."""
        self.pipe.set_lorad(lorad)
        side = size or self.size
        made = self.pipe(prompt, seeds=seeds, width=side, height=side, batch=len(seeds), hires=hires)
        return [np.asarray(image).astype(int) for image in made.images]


def make(folder: Path, architecture: str, changes: dict[str, Any] | None, prediction_type: str = "epsilon") -> torch.nn.Module:
    """A base with random weights in float16, in diffusers layout; returns its U-Net."""
    networks.write_settings(folder, architecture, changes)
    schedule = folder / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps({**configs.read(schedule), "prediction_type": prediction_type}))
    made = networks.make_networks(folder)
    # A1111 divides by the mean of the conditioning, which a fresh layer norm makes zero.
    for name, parameter in made["text_encoder"].named_parameters():
        if name.endswith("final_layer_norm.bias"):
            torch.nn.init.normal_(parameter)
    weights = {part: {key: t.half() for key, t in state.items()} for part, state in networks.states(made).items()}
    networks.write_folder(folder, weights)
    return made["unet"]


START = {"alpha_T_squared": 0.1378, "timestep": 625, "input_scale": "sigma"}


def add_adapters(base: Base, target: Path) -> None:
    """One-step, ordinary and foreign LoRaDs and an ordinary LoRA for a base; some of them damaged."""
    target.mkdir(parents=True, exist_ok=True)
    kind = base.unet
    one_step = networks.random_lorad(kind, rank=4, seed=1, spread=SPREAD)
    native = Metadata(**{**vars(one_step.metadata), "resolution": f"{base.size}x{base.size}"})
    made = {
        "one-step": LoRaD(one_step.factors, native),
        "style": networks.random_lorad(kind, rank=2, seed=2, spread=SPREAD, one_step=False),
        "other-alpha": LoRaD(one_step.factors, Metadata(**{**vars(native), "alpha_T_squared": 0.02})),
        "other-start": LoRaD(one_step.factors, Metadata(**{**vars(native), **START})),
        "velocity": LoRaD(one_step.factors, Metadata(**{**vars(native), "prediction_type": "v_prediction"})),
        "foreign": LoRaD(one_step.factors, Metadata(**{**vars(native), "architecture": "sd21"})),
    }
    for name, lorad in made.items():
        base.adapters[name] = target / f"{base.name}-{name}.safetensors"
        lorad.save(base.adapters[name], torch.float32)
    whole = base.adapters["one-step"].read_bytes()
    base.adapters["cut"] = target / f"{base.name}-cut.safetensors"
    base.adapters["cut"].write_bytes(whole[: len(whole) // 2])
    base.adapters["lora"] = target / f"{base.name}-lora.safetensors"
    save_file(ordinary_lora(kind), base.adapters["lora"])


def ordinary_lora(unet: torch.nn.Module, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA on some of the attention layers, as sd-scripts writes it."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for path, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and path.endswith(("attn1.to_q", "attn2.to_k")):
            key = "lora_unet_" + path.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.randn(rank, module.in_features, generator=generator) * 0.1
            tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.1
            tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    return tensors


def turned(bare: dict[str, Tensor], stack: list[tuple[Path, float]]) -> dict[str, Tensor]:
    """Weights as the core turns them."""
    weights = Weights.of(bare)
    return {**bare, **dict(merged_tensors(weights, [(LoRaD.load(path), strength) for path, strength in stack]))}


def with_lora(weights: dict[str, Tensor], lora: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    """Weights with an ordinary LoRA of alpha = rank added."""
    layout = layouts.detect({name: tuple(tensor.shape) for name, tensor in weights.items()})
    changed = dict(weights)
    for path, place in layout.places.items():
        key = "lora_unet_" + path.replace(".", "_")
        if f"{key}.lora_up.weight" in lora:
            change = lora[f"{key}.lora_up.weight"] @ lora[f"{key}.lora_down.weight"]
            changed[place.name] = weights[place.name] + strength * change
    return changed


def narrow(models: Path, work: Path, prediction_type: str = "epsilon") -> Base:
    """A base in Stable Diffusion 1.5's form for A1111, with its adapters."""
    name = "narrow" if prediction_type == "epsilon" else "narrow-v"
    unet = make(work / name, "sd15", NARROW, prediction_type)
    export(models / "Stable-diffusion", base=work / name, name=name)
    base = Base(name, work / name, 64, unet)
    add_adapters(base, models / "Lora")
    return base


def installed_mini(models: Path, folder: Path) -> Base:
    """wadi-mini of a folder as the installer has written it into a program's own, with an ordinary LoRaD for it."""
    unet = UNet2DConditionModel.from_config(configs.read(folder / "unet" / "config.json"))
    base = Base("wadi-mini", folder, 128, unet, {"one-step": models / "Lora" / mini.LORAD})
    base.adapters["style"] = models / "Lora" / "wadi-mini-style.safetensors"
    networks.random_lorad(unet, rank=2, seed=2, spread=0.1, one_step=False).save(base.adapters["style"], torch.float32)
    return base


def wide(models: Path, work: Path) -> Base:
    """A base of Stable Diffusion 1.5's width for Forge, with its adapters."""
    unet = make(work / "wide", "sd15", WIDE)
    export(models / "Stable-diffusion", base=work / "wide", name="wide")
    (models / "Stable-diffusion" / "wide.yaml").unlink()
    base = Base("wide", work / "wide", 64, unet)
    add_adapters(base, models / "Lora")
    return base


def wide_velocity(models: Path, base: Base, work: Path) -> Base:
    """The same weights as a network that returns v, as Forge reads from the settings file beside a checkpoint."""
    folder = work / "wide-v"
    folder.mkdir()
    for part in ("unet", "vae", "text_encoder", "tokenizer", "model_index.json"):
        (folder / part).symlink_to(base.folder / part)
    (folder / "scheduler").mkdir()
    schedule = configs.read(base.folder / "scheduler" / "scheduler_config.json")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**schedule, "prediction_type": "v_prediction"}))
    checkpoints = models / "Stable-diffusion"
    (checkpoints / "wide-v.safetensors").hardlink_to(checkpoints / "wide.safetensors")
    (checkpoints / "wide-v.yaml").write_text("model: {params: {parameterization: v}}\n")
    return Base("wide-v", folder, base.size, base.unet, base.adapters)
