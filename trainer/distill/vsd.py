"""Variational score distillation of a one-step student (Wang et al., WaDi, 2026; ProlificDreamer, 2023; DMD2, 2024).

The student turns z into x0 with one call at t = T. Noised again to a random t, x0 is judged by the teacher and by a
fake-score model that knows only the student's pictures; the difference of their scores moves x0:

    grad = sigma_t^2 (eps_teacher(x_t) - eps_fake(x_t)),    L_student = 1/2 |x0 - stopgrad(x0 - grad)|^2
    L_fake = |alpha_t (eps_fake(x_t) - eps)|^2               with x0 detached

A network that predicts v is read as eps = alpha_t v + sigma_t x_t.

Where the distillation is of few steps or a small network, the student drops what its prompts leave open, all
backgrounds black. An anchor holds it: the coarse picture that the teacher draws of the same noise in several steps. It
is the regression of DMD (Yin et al., 2024), which prevents just this, on pictures so coarse that it blurs nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wadi_core.schedule import OneStep

from ..models.condition import Condition
from ..models.diffusion import Noising
from .roles import FAKE, STUDENT, TEACHER, Roles


def generate(roles: Roles, z: Tensor, condition: Condition, one_step: OneStep) -> Tensor:
    """The student's x0 from z, differentiable; shapes (n, 4, h, w)."""
    t = torch.full((len(z),), one_step.timestep, device=z.device)
    return one_step.x0(z, roles.predict(STUDENT, z, t, condition))


def student_loss(
    roles: Roles,
    noising: Noising,
    x0: Tensor,
    condition: Condition,
    null: Condition,
    t: Tensor,
    eps: Tensor,
    teacher_guidance: float,
    fake_guidance: float,
    normalize: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The VSD loss of the student's pictures and what to log.

    Args:
        x0: (n, 4, h, w), with the student's graph.
        condition, null: of the pictures, and of the empty prompt (one row).
        t, eps: where the pictures are noised to, and with what.
        teacher_guidance, fake_guidance: classifier-free guidance scales.
        normalize: divide a picture's gradient by its mean distance to the teacher's x0 (DMD, Yin et al. 2024).

    Returns:
        the loss, and its "vsd_grad" (mean size of what moves the pictures), "x0_std" and "nonfinite" (how many
        numbers of the gradient were NaN or Inf before they were set to zero).
    """
    with torch.no_grad():
        fixed = x0.detach()
        alpha, sigma = noising.alpha_sigma(t, x0.dtype)
        x_t = noising.add_noise(fixed, eps, t)
        real = noising.eps(roles.guided(TEACHER, x_t, t, condition, null, teacher_guidance), x_t, t)
        fake = noising.eps(roles.guided(FAKE, x_t, t, condition, null, fake_guidance), x_t, t)
        if normalize:
            # In x0 units: (x0_fake - x0_real) / |x0 - x0_real|.
            distance = (fixed - (x_t - sigma * real) / alpha).abs().mean(dim=(1, 2, 3), keepdim=True)
            grad = (sigma / alpha) * (real - fake) / distance.clamp(min=1e-3)
        else:
            grad = sigma.square() * (real - fake)
        nonfinite = grad.numel() - grad.isfinite().sum()
        grad = grad.nan_to_num()
    loss = 0.5 * F.mse_loss(x0, fixed - grad)
    return loss, {"vsd_grad": grad.abs().mean(), "x0_std": fixed.std(), "nonfinite": nonfinite}


def fake_loss(roles: Roles, noising: Noising, x0: Tensor, condition: Condition, t: Tensor, eps: Tensor) -> Tensor:
    """Denoising loss of the fake-score model on the student's (detached) pictures, weighted by alpha_t^2."""
    alpha, _ = noising.alpha_sigma(t, x0.dtype)
    x_t = noising.add_noise(x0.detach(), eps, t)
    predicted = noising.eps(roles.predict(FAKE, x_t, t, condition), x_t, t)
    return F.mse_loss(alpha * predicted, alpha * eps)
