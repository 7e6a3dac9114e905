"""A U-Net with LDM's structure and names, made of the layers of a diffusers U-Net: what ComfyUI, A1111 and Forge run."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResBlock(nn.Module):
    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(resnet.norm1, nn.SiLU(), resnet.conv1)
        self.emb_layers = nn.Sequential(nn.SiLU(), resnet.time_emb_proj)
        self.out_layers = nn.Sequential(resnet.norm2, nn.SiLU(), nn.Identity(), resnet.conv2)
        self.skip_connection = resnet.conv_shortcut or nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    def __init__(self, sampler: nn.Module) -> None:
        super().__init__()
        self.op = sampler.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles, or goes straight to the size of the next skip connection, as ComfyUI does."""

    def __init__(self, sampler: nn.Module) -> None:
        super().__init__()
        self.conv = sampler.conv

    def forward(self, x: Tensor, output_shape: torch.Size | None = None) -> Tensor:
        size = output_shape[-2:] if output_shape else [2 * side for side in x.shape[-2:]]
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class LdmUNet(nn.Module):
    """The same network as a diffusers U-Net, with copies of its layers.

    Args:
        unet: the network.
        to_skip: double to the size of the skip connection that follows.
    """

    def __init__(self, unet: nn.Module, to_skip: bool = False) -> None:
        super().__init__()
        unet = copy.deepcopy(unet)
        self.time_proj, self.to_skip = unet.time_proj, to_skip
        self.time_embed = nn.Sequential(unet.time_embedding.linear_1, nn.SiLU(), unet.time_embedding.linear_2)
        self.input_blocks = nn.ModuleList([nn.ModuleList([unet.conv_in])])
        for block in unet.down_blocks:
            for layers in _rows(block):
                self.input_blocks.append(nn.ModuleList(layers))
            for sampler in block.downsamplers or ():
                self.input_blocks.append(nn.ModuleList([Downsample(sampler)]))
        first, last = unet.mid_block.resnets
        self.middle_block = nn.ModuleList([ResBlock(first), unet.mid_block.attentions[0], ResBlock(last)])
        self.output_blocks = nn.ModuleList()
        for block in unet.up_blocks:
            rows = _rows(block)
            rows[-1] += [Upsample(sampler) for sampler in block.upsamplers or ()]
            self.output_blocks.extend(nn.ModuleList(layers) for layers in rows)
        self.out = nn.Sequential(unet.conv_norm_out, nn.SiLU(), unet.conv_out)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, control: dict[str, list[Tensor | None]] | None = None
    ) -> Tensor:
        emb = self.time_embed(self.time_proj(timesteps.expand(len(x))).to(x.dtype))

        def run(layers: nn.ModuleList, h: Tensor, shape: torch.Size | None = None) -> Tensor:
            for layer in layers:
                if isinstance(layer, ResBlock):
                    h = layer(h, emb)
                elif isinstance(layer, (nn.Conv2d, Downsample)):
                    h = layer(h)
                elif isinstance(layer, Upsample):
                    h = layer(h, output_shape=shape if self.to_skip else None)
                else:
                    h = layer(h, encoder_hidden_states=context).sample
            return h

        def add(h: Tensor, part: str) -> Tensor:
            residual = control[part].pop() if control and control.get(part) else None
            return h if residual is None else h + residual

        skips = []
        for layers in self.input_blocks:
            x = run(layers, x)
            skips.append(x)
        x = add(run(self.middle_block, x), "middle")
        for layers in self.output_blocks:
            x = torch.cat([x, add(skips.pop(), "output")], dim=1)
            x = run(layers, x, skips[-1].shape if skips else None)
        return self.out(x)


def _rows(block: nn.Module) -> list[list[Any]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return [[ResBlock(r), *([a] if a is not None else [])] for r, a in zip(block.resnets, attentions, strict=True)]
