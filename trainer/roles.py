"""One frozen network in three roles: teacher (bare), student and fake score (each a LoRaD set switched in)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from wadi_core.lorad.linear import RotatedLinear, attach, factors_of, rotated_layers

Factors = Mapping[str, tuple[Tensor, Tensor]]

STUDENT, FAKE, TEACHER = "student", "fake", "teacher"


class Roles:
    """A noise-predicting network whose weights exist once.

    Args:
        network: a diffusers U-Net; its parameters are frozen here.
        student, fake: initial factors of the two LoRaD sets, path -> (theta_a, theta_b).
    """

    def __init__(self, network: nn.Module, student: Factors, fake: Factors) -> None:
        self.network = network.requires_grad_(False)
        attach(network, student, STUDENT, trainable=True)
        attach(network, fake, FAKE, trainable=True)
        self._layers: list[RotatedLinear] = [layer for _, layer in rotated_layers(network)]

    def eps(self, role: str, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The role's noise prediction in float32; x (n, 4, h, w), t (n,), text (n, tokens, width)."""
        for layer in self._layers:
            layer.active = (role,) if role in layer.strengths else ()
        return self.network(x, t, text).sample.float()

    def guided_eps(self, role: str, x: Tensor, t: Tensor, text: Tensor, null: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance, both branches in one batch; ``null`` (1, tokens, width)."""
        if scale == 1.0:
            return self.eps(role, x, t, text)
        both = self.eps(role, x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([text, null.expand_as(text)]))
        eps, eps_null = both.chunk(2)
        return eps_null + scale * (eps - eps_null)

    def factors(self, role: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """The live factors of a role."""
        return factors_of(self.network, role)

    def parameters(self, role: str) -> Iterator[nn.Parameter]:
        """The trained parameters of a role."""
        return (parameter for pair in self.factors(role).values() for parameter in pair)

    def state(self, role: str) -> dict[str, Tensor]:
        """The factors as a flat state dict, copied."""
        pairs = self.factors(role).items()
        return {
            f"{path}.{part}": value.detach().clone() for path, pair in pairs for part, value in zip("ab", pair, strict=True)
        }

    @torch.no_grad()
    def load_state(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` returned."""
        for path, pair in self.factors(role).items():
            for part, value in zip("ab", pair, strict=True):
                value.copy_(state[f"{path}.{part}"])
