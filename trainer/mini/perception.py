"""How different two pictures look, to a network that has learned to see: a loss beside that of the pixels.

The mean absolute error of pixels is content with a blur where detail is hard to place, and objects lose what tells
them apart. Here the maps of EfficientNet-Lite1 at several scales are compared, each place's channels taken to length
one, as LPIPS does (Zhang et al., "The Unreasonable Effectiveness of Deep Features", CVPR 2018, there with VGG).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation.efficientnet import load_lite

STAGES = slice(1, 6)  # maps of the first stages: a half to a sixteenth of the side
ENLARGED = 2  # objects are small here, and the network was trained on pictures of 240 px
GRAIN = 2.0  # grey levels: perfectly flat areas are nothing that the network knows, see the benchmarks' features


class Perception(nn.Module):
    """Distance between pictures (n, 3, h, w) in [-1, 1], the mean over places and scales; 0 to 4.

    Raises:
        OSError: the package with Lite1's weights is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = load_lite("lite1")

    def forward(self, decoded: Tensor, target: Tensor) -> Tensor:
        grain = torch.randn_like(target) * (GRAIN / 127.5)
        with torch.no_grad():
            wanted = self._maps(target + grain)
        found = self._maps(decoded + grain)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(found, wanted, strict=True)]).mean()

    def _maps(self, pictures: Tensor) -> list[Tensor]:
        large = F.interpolate(pictures, scale_factor=ENLARGED, mode="bilinear")
        large = large.contiguous(memory_format=torch.channels_last)
        return [F.normalize(maps.float(), dim=1) for maps in self.network.stages(large)[STAGES]]
