"""Starting values for small networks in Stable Diffusion's layout, so that they need not learn to pass a picture on.

The layout has 32 groups in every GroupNorm, and a group loses two numbers: its mean and its spread over the whole
picture. With 64 channels, two a group, every level (a flat background's colour, the mean of a noise) is lost on the
way out; with 96 channels, three a group, one level a group survives. A one-step model needs the amplitude of its
output to a fraction of a per cent, so this matters here. Widths are multiples of 96, and training starts from this:

- Of the three channels of a group, two start with a constant offset, +c and -c, larger than the signal. They set the
  statistics of the group, so that a GroupNorm begins as (nearly) the identity with the signal's level shared out
  among the three; its affine part takes the offset off again.
- The input passes through unchanged: it is written as p and -p into two groups, layers that change size or width
  begin as averaging, copying and repeating, residual branches begin small, and the output is read back with
  silu(p) - silu(-p) = p. So an autoencoder begins as the means of 8x8 blocks, and a U-Net with eps = x_t, which is
  all but right at t = 999.
- Inputs with a large mean make a layer hard to train: every step on its weights moves its output's level. Of the
  few convolutions that see the offset, those that halve and double stay what they begin as, averaging and copying,
  and the 1x1 shortcuts are trained as if they saw the signal alone (:class:`CentredSteps`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wadi_core.thirdparty import DiffusersNetwork

OFFSET = 3.0  # the constant in each channel
SIGNAL = 0.5  # by which the input is scaled on its way in: small against the offset


def _offsets(channels: int) -> Tensor:
    return OFFSET * torch.tensor((1.0, -1.0, 0.0)).repeat(channels // 3)


def _sees_offset(name: str) -> bool:
    return name.endswith("conv_shortcut") or "samplers" in name


def freeze_samplers(network: nn.Module) -> None:
    """Take the convolutions that halve and double out of training."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and "samplers" in name:
            layer.requires_grad_(False)


@torch.no_grad()
def skip_copying(unet: DiffusersNetwork) -> None:
    """Leave out the convolutions behind enlarging wherever they only copy: the same numbers, a tenth sooner."""
    for name, layer in unet.named_modules():
        if name.rpartition(".")[0].endswith("upsamplers"):
            copying = torch.zeros_like(layer.conv.weight)
            copying[:, :, 1, 1] = torch.eye(layer.channels)
            layer.use_conv = bool((layer.conv.weight != copying).any() or layer.conv.bias.any())


class CentredSteps:
    """Optimizer steps on 1x1 convolutions that see the offset, taken in the parameters of ``W (x - offset) + b``.

    These are the shortcuts, and in a ControlNet those that read its streams out.

    Call :meth:`before` between backward and the optimizer's step, and :meth:`after` after it.
    """

    def __init__(self, network: nn.Module) -> None:
        readers = ("controlnet_down_blocks.", "controlnet_mid_block")
        named = network.named_modules()
        convs: list[Any] = [layer for name, layer in named if name.endswith("conv_shortcut") or name.startswith(readers)]
        self._convs: list[tuple[Any, Tensor]] = [(conv, _offsets(int(conv.in_channels))) for conv in convs]
        self._arrived: list[Tensor] = []

    @torch.no_grad()
    def before(self) -> None:
        """Take out of each weight's gradient what is only the offset times the bias's gradient."""
        self._arrived = [conv.weight.sum(dim=(2, 3)) @ offsets for conv, offsets in self._convs]
        for conv, offsets in self._convs:
            conv.weight.grad -= conv.bias.grad[:, None, None, None] * offsets[None, :, None, None]

    @torch.no_grad()
    def after(self) -> None:
        """Keep the output's level where it was."""
        for (conv, offsets), arrived in zip(self._convs, self._arrived, strict=True):
            conv.bias += arrived - conv.weight.sum(dim=(2, 3)) @ offsets


def _layers(network: nn.Module, *kinds: type[nn.Module]) -> list[tuple[str, Any]]:
    """Names and layers of these kinds, all of which have a bias here, which their annotations leave open."""
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, kinds)]


@torch.no_grad()
def calm_group_norms(network: nn.Module) -> None:
    """Give every stream of channels its offset and every GroupNorm the values that take it off again."""
    for _, norm in _layers(network, nn.GroupNorm):
        norm.weight.fill_(OFFSET * (2 / 3) ** 0.5)
        norm.bias.copy_(-_offsets(norm.num_channels))
    for name, conv in _layers(network, nn.Conv2d):
        last = name.rpartition(".")[2]
        if last in ("conv_in", "conv1"):  # their input carries no offset
            conv.bias.copy_(_offsets(conv.out_channels))
        elif _sees_offset(name):  # what becomes of it is taken off first
            arrived = conv.weight.sum(dim=(2, 3)) @ _offsets(conv.in_channels)
            conv.bias.copy_(_offsets(conv.out_channels) - arrived)


def _signal_channels(k: int) -> tuple[int, int]:
    """Where +p and -p of input k live: the third channels of two groups; the first ones are their anchors."""
    return 6 * k + 2, 6 * k + 5


def _write_pairs(conv: Any) -> None:
    """Input k goes to its two channels as +SIGNAL and -SIGNAL; the other channels keep their random features."""
    for k in range(conv.in_channels):
        for channel, sign in zip(_signal_channels(k), (1.0, -1.0), strict=True):
            conv.weight[channel - 2 : channel + 1].zero_()
            conv.weight[channel, k, 1, 1] = sign * SIGNAL


def _read_pairs(conv: Any, count: int) -> None:
    """Output k < count is read from its two channels, less what their anchors took; the rest begins small."""
    conv.weight.mul_(0.1)
    conv.bias.zero_()
    for k in range(count):
        conv.weight[k].zero_()
        for channel, sign in zip(_signal_channels(k), (1.0, -1.0), strict=True):
            conv.weight[k, channel, 1, 1] = sign / SIGNAL
            conv.weight[k, channel - 2, 1, 1] = -sign / SIGNAL


def _copy(conv: Any, source: int, count: int) -> None:
    """The first ``count`` output channels copy input channels from ``source`` on."""
    side = conv.kernel_size[0] // 2
    for k in range(count):
        conv.weight[k].zero_()
        conv.weight[k, source + k, side, side] = 1.0


def _average(conv: Any) -> None:
    """A strided 3x3 convolution that halves: each channel is the mean of the 2x2 pixels it stands for."""
    # Diffusers' autoencoder pads on the far sides only, before the convolution, and its U-Net on all sides, in it.
    first = conv.padding[0]
    for k in range(min(conv.in_channels, conv.out_channels)):
        conv.weight[k].zero_()
        conv.weight[k, k, first : first + 2, first : first + 2] = 0.25


@torch.no_grad()
def start_as_block_means(vae: DiffusersNetwork) -> None:
    """Begin an ``AutoencoderKL`` as the codec of block means (three latent channels; the fourth is free)."""
    for name, layer in _layers(vae, nn.Conv2d, nn.Linear):
        last = name.rpartition(".")[2]
        if last == "conv_in":
            _write_pairs(layer)
        elif "downsamplers" in name:
            _average(layer)
        elif "upsamplers" in name or last == "conv_shortcut":
            _copy(layer, 0, min(layer.in_channels, layer.out_channels))
        elif last == "conv2" or "to_out" in name:
            layer.weight.mul_(0.1)
            layer.bias.zero_()
    _read_pairs(vae.encoder.conv_out, 3)
    _read_pairs(vae.decoder.conv_out, 3)
    channels = vae.config.latent_channels
    vae.quant_conv.weight.copy_(torch.eye(2 * channels)[:, :, None, None])
    vae.quant_conv.bias.zero_()
    vae.quant_conv.bias[channels:] = -6.0  # of the logarithm of the variance: hardly any noise
    vae.post_quant_conv.weight.copy_(torch.eye(channels)[:, :, None, None])
    vae.post_quant_conv.bias.zero_()
    calm_group_norms(vae)


@torch.no_grad()
def start_as_identity(unet: DiffusersNetwork) -> None:
    """Begin a ``UNet2DConditionModel`` with eps = x_t, carried by the outermost skip connection."""
    _write_pairs(unet.conv_in)
    for name, layer in unet.named_modules():
        if name.endswith(("conv2", "proj_out")):
            layer.weight.mul_(0.1)
            layer.bias.zero_()
        elif isinstance(layer, nn.Conv2d) and "downsamplers" in name:
            _average(layer)
        elif isinstance(layer, nn.Conv2d) and "upsamplers" in name:
            _copy(layer, 0, layer.out_channels)
    outermost = unet.up_blocks[-1].resnets[-1]
    width = unet.conv_in.out_channels
    _copy(outermost.conv_shortcut, outermost.conv_shortcut.in_channels - width, 6 * unet.conv_in.in_channels)
    _read_pairs(unet.conv_out, unet.conv_out.out_channels)
    calm_group_norms(unet)
