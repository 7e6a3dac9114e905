"""An adversary for the last steps of a run: a small head on the teacher's middle features tells the student's pictures
from others (Sauer et al., 2023; DMD2, Yin et al., 2024), and the student learns to pass.

The others are the teacher's own pictures of several steps (``features``: the run stays image-free), or pictures of a
folder (``real``: it does not). Both are noised to the same t before the frozen teacher looks at them:

    L_head = softplus(D(x_t)) + softplus(-D(x'_t)),    L_student += adversary_weight softplus(-D(x_t))
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi_core.pictures import to_tensor
from wadi_core.thirdparty import DiffusersNetwork

from ..data.examples import Examples
from ..data.picture_files import middle_square
from ..models.base_models import Model
from ..models.condition import Condition
from ..models.diffusion import Noising
from .roles import TEACHER, Roles

ADVERSARY = "adversary"
MINI = "mini"
WIDTH = 64  # of the head


class Head(nn.Module):
    """Logits (n,) from features (n, c, h, w) or (n, tokens, c); zero before it has learned anything."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Linear(WIDTH, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDTH), nn.SiLU(), last)

    def forward(self, features: Tensor) -> Tensor:
        tokens = features.flatten(2).transpose(1, 2) if features.dim() == 4 else features
        return self.layers(tokens.to(next(self.parameters()).dtype)).mean(dim=(1, 2))


def middle_of(network: DiffusersNetwork) -> nn.Module:
    """The module whose output is looked at: the middle block of a U-Net, or the middle one of a transformer's blocks."""
    blocks = getattr(network, "transformer_blocks", None)
    return blocks[len(blocks) // 2] if blocks is not None else network.get_submodule("mid_block")


def width_of(network: DiffusersNetwork) -> int:
    """Channels of the features."""
    config = network.config  # of diffusers
    if getattr(network, "transformer_blocks", None) is not None:
        return config["num_attention_heads"] * config["attention_head_dim"]
    return config["block_out_channels"][-1]


@contextmanager
def _caught(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module returns inside."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output)

    hook = module.register_forward_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


class Adversary:
    """The head, and what it is called with.

    Args:
        roles: of the run; the teacher's features are looked at.
        wrap: averages the head's gradients over the processes.
        seed: of the head's first weights.
    """

    def __init__(
        self, roles: Roles, wrap: Callable[[nn.Module], nn.Module], device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = Head(width_of(roles.network)).to(device, dtype)
        self.roles, self.middle = roles, middle_of(roles.network)
        self.part = wrap(self.head)

    def state(self) -> dict[str, Tensor]:
        """The head's parameters, copied."""
        return {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()}

    def _features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with _caught(self.middle) as seen:
            self.roles.predict(TEACHER, x_t, t, condition)
        return seen[0]

    def judge(self, noising: Noising, x0: Tensor, condition: Condition, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """What is thought of the student's pictures (n, c, h, w).

        Returns:
            the logits (n,), and the gradient of the mean of softplus(-D) for a loss that is averaged over all numbers.
        """
        leaf = x0.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = self.head(self._features(noising.add_noise(leaf, eps, t), t, condition))
            per_number = x0[0].numel()
            self.roles.activate(TEACHER)  # what checkpointing computes again must be computed in this role
            (grad,) = torch.autograd.grad(F.softplus(-logits).sum() * per_number, leaf)
        return logits.detach().to(x0.dtype), grad

    def loss(
        self, noising: Noising, made: tuple[Tensor, Condition], others: tuple[Tensor, Condition], t: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The head's loss, and how often it is right; ``made`` and ``others`` are pictures and what they show."""
        with torch.no_grad():
            looked = [self._features(noising.add_noise(x0, eps, t), t, condition) for x0, condition in (made, others)]
        of_made, of_others = self.part(torch.cat(looked)).chunk(2)
        right = torch.cat([of_made < 0, of_others > 0]).double().mean()
        return F.softplus(of_made).mean() + F.softplus(-of_others).mean(), right


class RealPictures(Protocol):
    """Pictures that the student did not make."""

    def at(self, seed: int, numbers: range) -> tuple[Tensor, list[str]]:
        """Those of some samples: scaled latents (n, 4, h/8, w/8) on the CPU, and captions."""
        ...


class FolderPictures:
    """The pictures of a folder, with captions beside them; all latents are in memory."""

    def __init__(self, folder: str, model: Model, size: tuple[int, int]) -> None:
        self.examples = Examples.read(folder, (), lambda caption: None)
        self.latents, _ = self.examples.latents(model, size)

    def at(self, seed: int, numbers: range) -> tuple[Tensor, list[str]]:
        chosen, captions = self.examples.draw(seed, numbers)
        return self.latents[chosen], captions


class ScenePictures:
    """Scenes of wadi-mini, drawn as they are asked for."""

    def __init__(self, model: Model, size: tuple[int, int]) -> None:
        from ..mini import scenes

        self.scenes, self.model, self.side = scenes, model, size[0]

    @torch.no_grad()
    def at(self, seed: int, numbers: range) -> tuple[Tensor, list[str]]:
        plans = [self.scenes.draw_plan(random.Random(f"{ADVERSARY} {seed} {number}")) for number in numbers]
        pictures = [middle_square(self.scenes.draw(plan)).resize((self.side, self.side)) for plan in plans]
        with self.model.on_device(self.model.vae) as vae:
            pixels = to_tensor(pictures).to(self.model.device, self.model.dtype)
            latents = vae.encode(pixels).latent_dist.mean.float().cpu()
        return latents * self.model.vae.config.scaling_factor, [plan.caption for plan in plans]


def real_pictures(folder: str, model: Model, size: tuple[int, int]) -> RealPictures:
    """The pictures that ``adversary_pictures`` names.

    Raises:
        OSError, ValueError: they cannot be read, or one has no caption; one line.
    """
    return ScenePictures(model, size) if folder == MINI else FolderPictures(folder, model, size)
