"""Variational score distillation of a one-step student (Wang et al., WaDi, 2026; ProlificDreamer, 2023; DMD2, 2024).

The student turns z into x0 with one call at t = T. Noised again to a random t, x0 is judged by the teacher and by a
fake-score model that knows only the student's pictures; the difference of their scores moves x0:

    grad = sigma_t^2 (eps_teacher(x_t) - eps_fake(x_t)),    L_student = 1/2 |x0 - stopgrad(x0 - grad)|^2
    L_fake = |alpha_t (eps_fake(x_t) - eps)|^2               with x0 detached
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wadi_core.schedule import OneStep

from .roles import FAKE, STUDENT, TEACHER, Roles


@dataclass(frozen=True)
class Noising:
    """The forward process: ``alphas_cumprod`` (1000,) in float32 or better."""

    alphas_cumprod: Tensor

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each (n, 1, 1, 1), for timesteps (n,)."""
        squared = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return squared.sqrt().float(), (1 - squared).sqrt().float()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * eps


def generate(roles: Roles, z: Tensor, text: Tensor, one_step: OneStep) -> Tensor:
    """The student's x0 from z, differentiable; shapes (n, 4, h, w)."""
    t = torch.full((len(z),), one_step.timestep, device=z.device)
    return one_step.x0(z, roles.eps(STUDENT, z, t, text))


def student_loss(
    roles: Roles,
    noising: Noising,
    x0: Tensor,
    text: Tensor,
    null: Tensor,
    t: Tensor,
    eps: Tensor,
    teacher_guidance: float,
    fake_guidance: float,
    normalize: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """The VSD loss of the student's pictures and what to log.

    Args:
        x0: (n, 4, h, w), with the student's graph.
        text, null: (n, tokens, width) and (1, tokens, width).
        t, eps: where the pictures are noised to, and with what.
        teacher_guidance, fake_guidance: classifier-free guidance scales.
        normalize: divide a picture's gradient by its mean distance to the teacher's x0 (DMD, Yin et al. 2024).
    """
    with torch.no_grad():
        alpha, sigma = noising.alpha_sigma(t)
        x_t = noising.add_noise(x0.detach(), eps, t)
        real = roles.guided_eps(TEACHER, x_t, t, text, null, teacher_guidance)
        fake = roles.guided_eps(FAKE, x_t, t, text, null, fake_guidance)
        if normalize:
            # In x0 units: (x0_fake - x0_real) / |x0 - x0_real|.
            distance = (x0.detach() - (x_t - sigma * real) / alpha).abs().mean(dim=(1, 2, 3), keepdim=True)
            grad = (sigma / alpha) * (real - fake) / distance.clamp(min=1e-3)
        else:
            grad = sigma.square() * (real - fake)
        grad = grad.nan_to_num()
    loss = 0.5 * F.mse_loss(x0.float(), x0.detach().float() - grad)
    return loss, {"vsd_grad": grad.abs().mean().item(), "x0_std": x0.detach().std().item()}


def fake_loss(roles: Roles, noising: Noising, x0: Tensor, text: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Denoising loss of the fake-score model on the student's (detached) pictures, weighted by alpha_t^2."""
    alpha, _ = noising.alpha_sigma(t)
    predicted = roles.eps(FAKE, noising.add_noise(x0.detach(), eps, t), t, text)
    return F.mse_loss(alpha * predicted, alpha * eps)
