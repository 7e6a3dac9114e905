"""U-Nets whose weights are set by hand, so that they answer noise as trained networks do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LATENT = 4
# Of the normalisation: each group needs three channels, which wadi-mini's have and small networks by these settings.
SETTINGS = {"norm_num_groups": 8}


@torch.no_grad()
def answer_as(unet: Any, prediction_type: str) -> None:
    """Let a U-Net return the noise it sees at every timestep (epsilon), or at all but the last ones (v_prediction).

    Latents go through the first skip connection to the output, each as itself and negated, as silu(n) - silu(-n) = n. For
    v a number that is large at late timesteps only is put beside them, before they are normalised.
    """
    for tensor in unet.parameters():
        tensor.zero_()
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(1.0)
    last = unet.up_blocks[-1].resnets[-1]
    width = unet.conv_in.out_channels
    skipped = last.conv_shortcut.in_channels - width  # where the skip connection begins
    groups = unet.config.norm_num_groups
    per_group = width // groups
    for channel in range(LATENT):
        for sign, place in ((1.0, channel * per_group), (-1.0, channel * per_group + 1)):
            unet.conv_in.weight[place, channel, 1, 1] = sign
            last.conv_shortcut.weight[place, skipped + place] = 1.0
            unet.conv_out.weight[channel, place, 1, 1] = sign
    if prediction_type == "v_prediction":
        embedding, half = unet.time_embedding, unet.time_proj.num_channels // 2
        slowest = 2 * half - 1 if unet.config.flip_sin_to_cos else half - 1  # its sine grows with t, up to 0.1
        embedding.linear_1.weight[0, slowest] = 2000.0
        embedding.linear_1.bias[0] = -120.0
        embedding.linear_2.weight[0, 0] = 1.0
        for group in range(groups):
            late = group * per_group + 2
            last.time_emb_proj.weight[late, 0] = 1.0
            last.conv2.weight[late, late, 1, 1] = 1000.0
