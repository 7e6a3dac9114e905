"""What moves the student's pictures: the losses as functions of what teacher and fake score say, in numbers alone.

A picture x0 is noised to x_t = alpha x0 + sigma eps. Teacher and fake score answer with their noise, eps_real and eps_fake,
or with the clean pictures that this means, y = (x_t - sigma eps) / alpha. Each loss returns its gradient with respect to
x0, and where it goes through the networks those with respect to y_real and y_fake:

    vsd   sigma^2 (eps_real - eps_fake)               Wang et al., WaDi, 2026; ProlificDreamer, 2023
    dmd   y_fake - y_real                             Yin et al., DMD, 2024, as its code has it
    sid   gradient of d . (y_fake - x0) + (1 - a) |d|^2,  d = y_real - y_fake      Zhou et al., SiD-LSG, 2024

``normalize`` weighs a picture by 1 / mean |x0 - y_real| in place of the loss's own weight. DMD and SiD are published so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_DISTANCE = 1e-3
LARGEST_LOGIT = 5.0  # of a discriminator; beyond, a single picture would outweigh all others


@dataclass(frozen=True)
class Scores:
    """What is said of noised pictures; all of shape (n, c, h, w), alpha and sigma (n, 1, 1, 1), nothing with a graph."""

    x0: Tensor
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    eps_real: Tensor
    eps_fake: Tensor

    @property
    def y_real(self) -> Tensor:
        """The clean picture of the teacher."""
        return clean(self.x_t, self.eps_real, self.alpha, self.sigma)

    @property
    def y_fake(self) -> Tensor:
        """The clean picture of the fake score."""
        return clean(self.x_t, self.eps_fake, self.alpha, self.sigma)

    @property
    def distance(self) -> Tensor:
        """mean |x0 - y_real| of each picture, (n, 1, 1, 1)."""
        return (self.x0 - self.y_real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=SMALLEST_DISTANCE)


@dataclass(frozen=True)
class Gradient:
    """The gradient of a loss, summed over a picture's numbers: with respect to x0 itself, and to y_real and y_fake."""

    x0: Tensor
    y_real: Tensor | None = None
    y_fake: Tensor | None = None


def clean(x_t: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """y = (x_t - sigma eps) / alpha."""
    return (x_t - sigma * eps) / alpha


def vsd(said: Scores, normalize: bool, sid_alpha: float) -> Gradient:
    """Variational score distillation; normalised it is DMD's gradient."""
    if normalize:
        return Gradient((said.sigma / said.alpha) * (said.eps_real - said.eps_fake) / said.distance)
    return Gradient(said.sigma.square() * (said.eps_real - said.eps_fake))


def dmd(said: Scores, normalize: bool, sid_alpha: float) -> Gradient:
    """Distribution matching distillation."""
    moved = said.y_fake - said.y_real
    return Gradient(moved / said.distance if normalize else moved)


def sid(said: Scores, normalize: bool, sid_alpha: float) -> Gradient:
    """Score identity distillation. Its gradient goes through teacher and fake score."""
    d, rest = said.y_real - said.y_fake, said.y_fake - said.x0
    weight = 1 / said.distance if normalize else torch.ones_like(said.alpha)
    both = rest + 2 * (1 - sid_alpha) * d
    return Gradient(-weight * d, weight * both, weight * (d - both))


LossFunction = Callable[[Scores, bool, float], Gradient]
LOSSES: dict[str, LossFunction] = {"vsd": vsd, "dmd": dmd, "sid": sid}
THROUGH_NETWORKS = {"sid"}  # whose gradient needs the graphs of teacher and fake score


# f''(r) r^2 of an f-divergence, r the density of the teacher's pictures over that of the student's at x_t (Xu et al.,
# f-distill, 2025), divided by its value at r = 1: where the discriminator cannot tell, every divergence weighs the same.
F_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: 2 * r / (r + 1),
    "hellinger": torch.sqrt,
}


def f_weight(name: str, logits: Tensor) -> Tensor:
    """The weight (n, 1, 1, 1) of pictures by the logits (n,) of a discriminator that holds real ones for positive."""
    return F_WEIGHTS[name](logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp()).view(-1, 1, 1, 1)
