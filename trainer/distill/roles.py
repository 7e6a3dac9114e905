"""One frozen network in three roles: teacher (bare), student and fake score (each an adapter switched in)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from wadi_core.lorad import LoRaD
from wadi_core.lorad.layers import fake_score_layers, student_layers

from ..models.adapters import Adapter, Factors, LoRaDAdapter, factors_of_file
from ..models.base_models import call_unet
from ..models.condition import Condition
from ..settings.distillation import TrainConfig

STUDENT, FAKE, TEACHER = "student", "fake", "teacher"

Call = Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]


class Part(nn.Module):
    """A trained role as a module of its own: its parameters are the role's alone, whatever else the network holds.

    That is what data-parallel training wraps: it must see neither the frozen weights nor the other role.
    """

    def __init__(self, adapter: Adapter, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(adapter.parameters.values())
        self._call = call

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._call(x, t, condition)


class Roles:
    """A noise-predicting network whose weights exist once.

    Args:
        network: a diffusers U-Net or PixArt transformer; its parameters are frozen here.
        student, fake: the two adapters, or the initial factors of two LoRaDs, path -> (theta_a, theta_b).
        call: how the network is called.
        autocast: the type in which it computes; None for that of its weights.
        exact_student: no autocast for the student, whose weights must be in the type of its input.
    """

    def __init__(
        self,
        network: nn.Module,
        student: Adapter | Factors,
        fake: Adapter | Factors,
        call: Call = call_unet,
        autocast: torch.dtype | None = None,
        exact_student: bool = False,
    ) -> None:
        self.network = network
        if not isinstance(student, Adapter):
            network.requires_grad_(False)
        self.adapters = {
            name: given if isinstance(given, Adapter) else LoRaDAdapter(name, network, given)
            for name, given in ((STUDENT, student), (FAKE, fake))
        }
        self.call, self.autocast, self.exact_student = call, autocast, exact_student
        self._frozen: set[str] = set()
        self.parts: dict[str, nn.Module] = {name: Part(adapter, self._caller(name)) for name, adapter in self.adapters.items()}

    def _caller(self, role: str) -> Callable[..., Tensor]:
        network = self.adapters[role].network

        def run(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            self.activate(role)
            return self.call(network, x, t, condition)

        return run

    def activate(self, role: str) -> None:
        """Make the network compute as a role.

        Calls do so by themselves. Before ``backward`` it is the caller's part: what gradient checkpointing computes
        again must be computed in the role in which it was computed first.
        """
        for name, adapter in self.adapters.items():
            if name != role:
                adapter.switch(False)
        if role in self.adapters:
            self.adapters[role].switch(True)

    def predict(self, role: str, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What a role predicts (noise, or v for such a base), in the type of x: x (n, 4, h, w), t (n,)."""
        exact = role == STUDENT and self.exact_student
        if exact:
            condition = condition.to(x.dtype)
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None and not exact):
            if role != TEACHER:
                # The data-parallel wrapper is for calls after which the role's own gradients will be wanted.
                part = self.parts[role]
                wanted = torch.is_grad_enabled() and role not in self._frozen
                inner = part if wanted else getattr(part, "module", part)
                return inner(x, t, condition).to(x.dtype)
            self.activate(TEACHER)
            return self.call(self.network, x, t, condition).to(x.dtype)

    def guided(self, role: str, x: Tensor, t: Tensor, condition: Condition, null: Condition, scale: float) -> Tensor:
        """Classifier-free guidance, both branches in one batch; ``null`` is one row."""
        if scale == 1.0:
            return self.predict(role, x, t, condition)
        both = self.predict(role, x.repeat(2, 1, 1, 1), t.repeat(2), condition.joined(null))
        cond, uncond = both.chunk(2)
        return uncond + scale * (cond - uncond)

    @contextlib.contextmanager
    def frozen(self, role: str) -> Iterator[None]:
        """Gradients go through a role inside, to its input, and not to its parameters."""
        trained = [parameter for parameter in self.parameters(role) if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        self._frozen.add(role)
        try:
            yield
        finally:
            self._frozen.discard(role)
            for parameter in trained:
                parameter.requires_grad_(True)

    def parameters(self, role: str) -> Iterator[nn.Parameter]:
        """The trained parameters of a role."""
        return iter(self.adapters[role].parameters.values())

    def forget(self, role: str) -> None:
        """Let go of a role's rotated weights, which its next update makes stale."""
        if role in self.adapters:
            self.adapters[role].forget()

    def state(self, role: str) -> dict[str, Tensor]:
        """A role's parameters as a flat state dict, copied."""
        return {name: parameter.detach().clone() for name, parameter in self.adapters[role].parameters.items()}

    @torch.no_grad()
    def load_state(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` returned."""
        for name, parameter in self.adapters[role].parameters.items():
            parameter.copy_(state[name])


def layers_of_roles(network: nn.Module, architecture: str) -> dict[str, list[str]]:
    """Paths of the layers that student and fake score train."""
    return {STUDENT: student_layers(network, architecture), FAKE: fake_score_layers(network, architecture)}


def first_factors(network: nn.Module, architecture: str, config: TrainConfig) -> dict[str, Factors]:
    """Initial factors of the roles that are LoRaDs; each has a generator of its own, so neither depends on the other.

    Raises:
        OSError, ValueError: the LoRaD to start from cannot be read, or is none for these layers and this rank; one line.
    """
    kinds = {STUDENT: (config.adapter, config.student_rank), FAKE: (config.fake_adapter, config.fake_rank)}
    factors: dict[str, Factors] = {}
    for index, (role, layers) in enumerate(layers_of_roles(network, architecture).items()):
        kind, rank = kinds[role]
        if role == STUDENT and config.start_from:
            factors[role] = factors_of_file(config.start_from, network, layers, rank)
        elif kind == "lorad":
            start = torch.Generator().manual_seed((2 * config.seed + index) % 2**63)
            lorad = LoRaD.create(network, rank, architecture, layers, start)
            factors[role] = {path: lorad.factors[key] for key, path in lorad.matched(network).paths.items()}
    return factors
