"""How long a run will take on some GPUs, calculated from the operations of its network calls before it begins.

The network runs once on the meta device, where operations are counted and none is done. What a GPU makes of its peak in a
training like this one is taken as a third; kernels, memory and the angles' own arithmetic decide about the rest. So the hours
are good to a factor of about two, and a run's own log knows better after a few steps.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from wadi_core import base as bases
from wadi_core.thirdparty import DiffusersNetwork

from ..models.base_models import LATENT_CHANNELS, T5_TOKENS, call_pixart, call_unet
from ..models.condition import Condition
from ..settings.distillation import TrainConfig
from .losses import THROUGH_NETWORKS

# Dense operations a second in half precision with sums in float32, by NVIDIA's data sheets.
PEAKS = {"RTX 3090": 71e12, "RTX 4090": 165e12, "A100": 312e12, "L40S": 362e12, "H100": 989e12}
SHARE = 1 / 3  # of the peak
BACKWARD, THROUGH = 2, 1  # forward passes that a backward costs: to weights and input, or to the input alone


def operations_of_call(network: DiffusersNetwork, side: int) -> int:
    """Operations of one forward pass for one picture, on the meta device.

    Args:
        side: of the latent.
    """
    pixart = hasattr(network, "transformer_blocks")
    tokens = T5_TOKENS if pixart else bases.TOKENS
    width = network.config.caption_channels if pixart else network.config.cross_attention_dim
    dtype = next(network.parameters()).dtype
    x = torch.empty(1, LATENT_CHANNELS, side, side, device="meta", dtype=dtype)
    condition = Condition(
        torch.empty(1, tokens, width, device="meta", dtype=dtype),
        torch.empty(1, tokens, device="meta") if pixart else None,
    )
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        (call_pixart if pixart else call_unet)(network, x, torch.zeros(1, device="meta", dtype=torch.long), condition)
    return counter.get_total_flops()


def passes_of_step(config: TrainConfig) -> float:
    """Forward passes of the network, or what costs as much, for each picture of a step."""
    again = 1 if config.gradient_checkpointing else 0
    trained = 1 + BACKWARD + again
    through = 1 + THROUGH + again if config.loss in THROUGH_NETWORKS else 1
    guided = sum(1 if scale == 1.0 else 2 for scale in (config.teacher_guidance, config.fake_guidance))
    student = trained + through * guided
    fake = config.fake_updates * trained + (config.fake_updates - 1)
    teacher = 1 if config.teacher_guidance == 1.0 else 2
    anchor = config.anchor_steps * teacher / config.anchor_every if config.anchor_weight else 0
    return student + fake + anchor


def hours_of_run(network: DiffusersNetwork, config: TrainConfig) -> dict[str, float]:
    """GPU -> hours on one of them."""
    side = config.resolution // bases.FACTOR or network.config.sample_size
    total = operations_of_call(network, side) * passes_of_step(config) * config.steps * config.batch
    return {name: total / (peak * SHARE) / 3600 for name, peak in PEAKS.items()}
