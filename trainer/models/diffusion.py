"""The diffusion process of a base: noising, what its teacher draws in several steps, and how far pictures are from that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Noising:
    """The forward process.

    Attributes:
        alphas_cumprod: (1000,) in float32 or better.
        prediction_type: what the networks predict, ``epsilon`` or ``v_prediction``.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each (n, 1, 1, 1), for timesteps (n,)."""
        squared = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return squared.sqrt().to(dtype), (1 - squared).sqrt().to(dtype)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps."""
        alpha, sigma = self.alpha_sigma(t, x0.dtype)
        return alpha * x0 + sigma * eps

    def eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction for x_t means."""
        if self.prediction_type == "epsilon":
            return prediction
        alpha, sigma = self.alpha_sigma(t, x_t.dtype)
        return alpha * prediction + sigma * x_t


@torch.no_grad()
def teacher_pictures(guided: Callable[[Tensor, Tensor], Tensor], noising: Noising, z: Tensor, steps: int) -> Tensor:
    """x0 that the teacher draws of z (n, 4, h, w), in DDIM steps evenly spaced from t = T.

    Args:
        guided: what it predicts for x (n, 4, h, w) and t (n,), by its guidance.
    """
    last = len(noising.alphas_cumprod) - 1
    x, times = z, [last - round(step * (last + 1) / steps) for step in range(steps)]
    for now, following in zip(times, [*times[1:], None], strict=True):
        t = torch.full((len(z),), now, device=z.device)
        alpha, sigma = noising.alpha_sigma(t, z.dtype)
        eps = noising.eps(guided(x, t), x, t)
        x = (x - sigma * eps) / alpha
        if following is not None:
            x = noising.add_noise(x, eps, torch.full_like(t, following))
    return x


def anchor_loss(x0: Tensor, teachers: Tensor, cells: int) -> Tensor:
    """How far pictures (n, 4, h, w) are from the teacher's, each divided into so many cells a side: (n,)."""
    coarse, wanted = (F.adaptive_avg_pool2d(pictures, cells) for pictures in (x0, teachers))
    return (coarse - wanted).square().mean(dim=(1, 2, 3))
