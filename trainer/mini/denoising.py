"""Teaching a network to tell the noise in wadi-mini's latents: what the teacher and its ControlNet have in common.

One step from t = 999 multiplies an error of eps by sigma/alpha = 14.6, so the networks must be accurate there before
anything is distilled from them. Therefore a good part of the timesteps is drawn from the noisy end, and the error is
weighted like that of v = (eps error) / alpha, up to a cap.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from wadi_core import pictures
from wadi_core.thirdparty import DiffusersNetwork

from ..engine.checkpoints import Checkpoints, random_state, restore_random_state
from ..engine.logs import LossTable, Progress
from ..engine.muon import ENDS, MuonWithAdamW
from ..engine.signals import stop_signals
from ..settings.fields import FilePath
from .init import CentredSteps
from .sampling import make_scheduler

Told = TypeVar("Told")  # what a network is told of a batch: captions, maps
FIGURES = ("eps_loss", "eps_loss_999", "weighted")


@dataclass
class DenoisingConfig:
    """Settings that both trainings have."""

    output: FilePath = "runs/denoising"
    seed: int = 0
    steps: int = 40000
    batch: int = 64
    lr: float = 1e-3  # of Muon
    adam_rate: float = 5e-4
    warmup: int = 300
    decay_steps: int = 4000  # the learning rate falls to a twentieth over this many last steps
    high_noise_fraction: float = 0.3  # of the timesteps: drawn from 900 to 999
    last_share: float = 0.05  # of the timesteps: exactly 999
    weight_cap: float = 40.0  # of 1 / alpha_t^2
    uncond_prob: float = 0.1  # of the captions: empty
    mirror: bool = True  # mirror latents at random (the autoencoder was trained to allow it)
    ema: float = 0.999
    save_every: int = 250
    sheet_every: int = 1000


def draw_timesteps(count: int, config: DenoisingConfig) -> Tensor:
    """(count,) timesteps: uniform, with shares of 900 to 999 and of exactly 999."""
    t = torch.randint(0, 1000, (count,))
    lot = torch.rand(count)
    t = torch.where(lot < config.high_noise_fraction, torch.randint(900, 1000, (count,)), t)
    return torch.where(lot > 1 - config.last_share, torch.full_like(t, 999), t)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """One step of an exponential moving average of the parameters."""
    averaged: list[Tensor] = list(average.parameters())
    current: list[Tensor] = list(model.parameters())
    torch._foreach_mul_(averaged, decay)
    torch._foreach_add_(averaged, current, alpha=1 - decay)


class Denoising:
    """One training: the network, its average, the optimizer, and all that a checkpoint holds.

    Goes on from the newest checkpoint of ``config.output``.

    Args:
        model: the network, of which what requires gradients learns.
        unet: the part of it whose convolutions begin as the identity (:class:`~.init.CentredSteps`).
        ends: parts of the names of layers that AdamW takes instead of Muon.
    """

    def __init__(self, model: nn.Module, unet: DiffusersNetwork, config: DenoisingConfig, ends: tuple[str, ...] = ENDS) -> None:
        self.config = config
        self.output = Path(config.output)
        self.model = model
        self._centred = CentredSteps(unet)
        self.average: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self._optimizer = MuonWithAdamW(model, config.lr, config.adam_rate, ends)
        self._checkpoints = Checkpoints(self.output)
        self.step = 0
        if state := self._checkpoints.latest():
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self._optimizer.load_state_dict(state["optimizer"])
            restore_random_state(state["random"])
            self.step = state["step"]

    def _checkpoint(self) -> None:
        self._checkpoints.save(
            self.step,
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "random": random_state(),
            },
        )

    def run(
        self,
        draw: Callable[[], tuple[Tensor, Told]],
        predict: Callable[[Tensor, Tensor, Told], Tensor],
        sheet: Callable[[], tuple[Image.Image, dict[str, float]]],
        title: str,
        lesson: Callable[[Told], Tensor] | None = None,
    ) -> None:
        """Train to the last step, or until SIGTERM or Ctrl-C; a checkpoint is there in any case.

        Args:
            draw: clean latents (n, 4, h, w) of a step, and what the network is told of them.
            predict: eps from x_t, t and that.
            sheet: pictures of the average, and figures on them.
            title: of the plot of losses.
            lesson: another loss, asked for after each prediction with what the network was told; it is added.
        """
        config = self.config
        table = LossTable(self.output / "losses.csv", self.step)
        alpha_bar = make_scheduler().alphas_cumprod
        weights = (1 / alpha_bar).clamp(max=config.weight_cap)
        sums: dict[str, list[float]] = {name: [] for name in (*FIGURES, *(["lesson"] if lesson else []))}
        with stop_signals() as stop, Progress(config.steps, self.step) as progress:
            while self.step < config.steps and not stop:
                x0, told = draw()
                t = draw_timesteps(config.batch, config)
                eps = torch.randn_like(x0)
                a = alpha_bar[t].view(-1, 1, 1, 1)
                with torch.autocast("cpu", torch.bfloat16):
                    predicted = predict(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, told)
                errors = (predicted.float() - eps).square().mean(dim=(1, 2, 3))
                loss = (weights[t] * errors).mean()
                sums["weighted"].append(loss.item())
                if lesson:
                    besides = lesson(told)
                    sums["lesson"].append(besides.item())
                    loss = loss + besides
                loss.backward()
                self._update()
                progress.update(self.step)
                sums["eps_loss"].append(errors.mean().item())
                sums["eps_loss_999"] += errors[t == 999].tolist()
                values: dict[str, Any] = {}
                if self.step % 50 == 0:
                    values = {name: sum(entries) / max(1, len(entries)) for name, entries in sums.items()}
                    for entries in sums.values():
                        entries.clear()
                    progress.tell_numbers(values)
                if self.step % config.sheet_every == 0 or self.step == config.steps:
                    picture, figures = sheet()
                    values |= figures
                    pictures.save(picture, self.output / f"sheet-{self.step:06d}.png")
                if values:
                    table.add(self.step, values)
                if self.step % config.save_every == 0 or self.step == config.steps:
                    self._checkpoint()
                    table.plot(self.output / "losses.png", list(FIGURES), title)
        self._checkpoint()

    def _update(self) -> None:
        config = self.config
        left = (config.steps - self.step) / max(1, config.decay_steps)
        rate = min(1, (self.step + 1) / config.warmup) * max(0.05, min(1, left))
        self._centred.before()
        self._optimizer.step(rate)
        self._centred.after()
        self.step += 1
        update_average(self.average, self.model, min(config.ema, (1 + self.step) / (10 + self.step)))
