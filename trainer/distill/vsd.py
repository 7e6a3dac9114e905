"""Score distillation of a one-step student (Wang et al., WaDi, 2026; ProlificDreamer, 2023; DMD2, 2024; SiD-LSG, 2024).

The student turns z into x0 with one call at its start timestep. Noised again to a random t, x0 is judged by the teacher
and by a fake-score model that knows only the student's pictures; what they say moves x0, by one of :mod:`.losses`:

    grad = sigma_t^2 (eps_teacher(x_t) - eps_fake(x_t)),    L_student = 1/2 |x0 - stopgrad(x0 - grad)|^2        (vsd)
    L_fake = |alpha_t (eps_fake(x_t) - eps)|^2               with x0 detached

A network that predicts v is read as eps = alpha_t v + sigma_t x_t.

Where the distillation is of few steps or a small network, the student drops what its prompts leave open, all
backgrounds black. An anchor holds it: the coarse picture that the teacher draws of the same noise in several steps. It
is the regression of DMD (Yin et al., 2024), which prevents just this, on pictures so coarse that it blurs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wadi_core.schedule import OneStep

from ..models.condition import Condition
from ..models.diffusion import Noising
from .losses import LOSSES, THROUGH_NETWORKS, Scores, clean
from .roles import FAKE, STUDENT, TEACHER, Roles


@dataclass(frozen=True)
class Recipe:
    """How teacher and fake score move the student.

    Attributes:
        teacher_guidance, fake_guidance: classifier-free guidance scales.
        normalize: weigh a picture by its mean distance to the teacher's x0 (DMD, Yin et al. 2024).
        loss: one of :data:`.losses.LOSSES`.
        sid_alpha: of the loss ``sid``.
    """

    teacher_guidance: float
    fake_guidance: float
    normalize: bool = False
    loss: str = "vsd"
    sid_alpha: float = 1.0


def generate(roles: Roles, z: Tensor, condition: Condition, one_step: OneStep) -> Tensor:
    """The student's x0 from z, differentiable; shapes (n, 4, h, w)."""
    x, t = one_step.network_input(z), torch.full((len(z),), one_step.timestep, device=z.device)
    return one_step.x0(x, roles.predict(STUDENT, x, t, condition))


def student_loss(
    roles: Roles,
    noising: Noising,
    x0: Tensor,
    condition: Condition,
    null: Condition,
    t: Tensor,
    eps: Tensor,
    recipe: Recipe,
    weight: Tensor | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the student's pictures and what to log.

    Args:
        x0: (n, 4, h, w), with the student's graph.
        condition, null: of the pictures, and of the empty prompt (one row).
        t, eps: where the pictures are noised to, and with what.
        weight: (n, 1, 1, 1) of each picture's gradient.
        more: (n, 4, h, w) another gradient, added to that of the loss.

    Returns:
        the loss, and its "vsd_grad" (mean size of what moves the pictures), "x0_std" and "nonfinite" (how many
        numbers of the gradient were NaN or Inf before they were set to zero).
    """
    fixed = x0.detach()
    grad = _gradient(roles, noising, fixed, condition, null, t, eps, recipe)
    grad = grad if weight is None else weight * grad
    grad = grad if more is None else grad + more
    nonfinite = grad.numel() - grad.isfinite().sum()
    grad = grad.nan_to_num()
    loss = 0.5 * F.mse_loss(x0, fixed - grad)
    return loss, {"vsd_grad": grad.abs().mean(), "x0_std": fixed.std(), "nonfinite": nonfinite}


def _gradient(
    roles: Roles,
    noising: Noising,
    x0: Tensor,
    condition: Condition,
    null: Condition,
    t: Tensor,
    eps: Tensor,
    recipe: Recipe,
) -> Tensor:
    """The gradient of the recipe's loss with respect to pictures x0 that have no graph."""
    alpha, sigma = noising.alpha_sigma(t, x0.dtype)
    through = recipe.loss in THROUGH_NETWORKS
    leaf = x0.clone().requires_grad_(through)

    def said(role: str, guidance: float) -> tuple[Tensor, Tensor]:
        """What a role says of the noised pictures, as noise and as clean pictures, with a graph of its own."""
        x_t = noising.add_noise(leaf, eps, t)
        noise = noising.eps(roles.guided(role, x_t, t, condition, null, guidance), x_t, t)
        return noise, clean(x_t, noise, alpha, sigma)

    with torch.set_grad_enabled(through), roles.frozen(FAKE):
        real, y_real = said(TEACHER, recipe.teacher_guidance)
        fake, y_fake = said(FAKE, recipe.fake_guidance)
        with torch.no_grad():
            scores = Scores(x0, noising.add_noise(x0, eps, t), alpha, sigma, real, fake)
            found = LOSSES[recipe.loss](scores, recipe.normalize, recipe.sid_alpha)
        grad = found.x0
        for role, y, outer in ((TEACHER, y_real, found.y_real), (FAKE, y_fake, found.y_fake)):
            if outer is not None:
                roles.activate(role)  # what checkpointing computes again must be computed in this role
                grad = grad + torch.autograd.grad(y, leaf, outer)[0]
    return grad


def fake_loss(roles: Roles, noising: Noising, x0: Tensor, condition: Condition, t: Tensor, eps: Tensor) -> Tensor:
    """Denoising loss of the fake-score model on the student's (detached) pictures, weighted by alpha_t^2."""
    alpha, _ = noising.alpha_sigma(t, x0.dtype)
    x_t = noising.add_noise(x0.detach(), eps, t)
    predicted = noising.eps(roles.predict(FAKE, x_t, t, condition), x_t, t)
    return F.mse_loss(alpha * predicted, alpha * eps)
