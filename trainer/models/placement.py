"""Where the frozen network lies and in what form: types, memory layout, attention, checkpointing, compilation."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from wadi_core.lorad import kernels
from wadi_core.thirdparty import DiffusersNetwork

from ..settings.distillation import TrainConfig
from .quantise import QuantisedLinear, quantise_linears

if TYPE_CHECKING:
    from ..settings.finetuning import FinetuningConfig

logger = logging.getLogger("wadi")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
PLAIN_TOKENS = 1024  # up to so many latent pixels plain attention trains faster on a CPU than the fused kernel


def autocast_type(config: TrainConfig | FinetuningConfig) -> torch.dtype | None:
    """The type of autocast; None where the network computes in the type of its weights."""
    return DTYPES[config.precision] if config.precision in ("bf16", "fp16") else None


def working_type(config: TrainConfig | FinetuningConfig) -> torch.dtype:
    """The type of latents and losses: float32, or float64 where all is float64."""
    return torch.float64 if config.precision == "fp64" else torch.float32


def place(
    network: DiffusersNetwork,
    config: TrainConfig | FinetuningConfig,
    device: torch.device,
    turned: Iterable[str],
    latent_pixels: int,
    exact: bool,
) -> None:
    """Prepare a frozen network for training, in place, before any adapter is on it.

    Args:
        turned: paths of the linear layers that adapters will turn: their weights keep the precision of the settings.
        latent_pixels: height times width of the latents.
        exact: some calls are made without autocast, or copies are trained: no weight may be rounded beforehand.
    """
    quantised = config.base_weights in ("fp8", "nf4")
    autocast = autocast_type(config)
    if quantised:
        # Layers that stay as they are keep the type in which the network computes.
        quantise_linears(network, config.base_weights)
        rest = autocast or torch.float32
    else:
        rest = DTYPES[config.base_weights]
    network.to(device, rest)
    if autocast is not None and not exact:
        round_once(network, autocast, set(turned))
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):  # train mode is for gradient checkpointing, not for noise
            module.p = 0.0
    set_attention(network, config.attention, device, latent_pixels)
    choose_rotation(config, device)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.compile:
        network.compile()


def choose_rotation(config: TrainConfig | FinetuningConfig, device: torch.device) -> None:
    """Let the process compute rotations as the settings say; where they cannot be compiled, this is told once."""
    products = torch.bfloat16 if config.rotation_precision == "bf16" else None
    # A network that is compiled as a whole has the rotation's loops in it already.
    why_not = kernels.choose(config.compile_rotation and not config.compile, products, device)
    if why_not:
        logger.warning("compile_rotation: the rotation is not compiled, which only costs time: %s", why_not)


def round_once(network: nn.Module, dtype: torch.dtype, turned: set[str]) -> None:
    """Store what autocast would round at every use as it would be rounded: the results are the same bit for bit."""
    for path, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and path not in turned and not isinstance(module, QuantisedLinear):
            module.to(dtype)


def set_attention(network: DiffusersNetwork, kind: str, device: torch.device, latent_pixels: int) -> None:
    """Choose how attention is computed: ``sdpa``, ``plain`` or ``sliced``; ``auto`` is the faster of the first two."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

    if kind == "auto":
        kind = "plain" if device.type == "cpu" and latent_pixels <= PLAIN_TOKENS else "sdpa"
    processors = {"sdpa": AttnProcessor2_0, "plain": AttnProcessor, "sliced": lambda: SlicedAttnProcessor(1)}
    network.set_attn_processor(processors[kind]())
