"""Teaching wadi-mini's autoencoder: what the training of the whole and that of the decoder alone have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wadi_core import pictures
from wadi_core.sheets import contact_sheet
from wadi_core.thirdparty import DiffusersNetwork

from ..engine.checkpoints import Checkpoints
from ..engine.logs import LossTable, Progress
from ..engine.muon import MuonWithAdamW
from ..engine.signals import stop_signals
from .init import freeze_samplers
from .perception import Perception

Sheet = tuple[Sequence[Sequence[Image.Image]], Tensor]


class AutoencodingConfig(Protocol):
    """Settings that both trainings have."""

    output: str
    steps: int
    lr: float
    adam_rate: float
    warmup: int
    edge_weight: float
    perception_weight: float
    save_every: int


def reconstruction_loss(decoded: Tensor, target: Tensor, edge_weight: float) -> Tensor:
    """Mean absolute error of the pixels and of their differences to the right and downward."""
    loss = F.l1_loss(decoded, target)
    for axis in (2, 3):
        loss = loss + 0.5 * edge_weight * F.l1_loss(decoded.diff(dim=axis), target.diff(dim=axis))
    return loss


def keep_layout(vae: DiffusersNetwork) -> None:
    """Take out of training what must only pass a picture on: all that halves and doubles, and where the width changes."""
    freeze_samplers(vae)
    for name, layer in vae.named_modules():
        if name.endswith("conv_shortcut"):  # they copy, and training would move their level
            layer.requires_grad_(False)


class Autoencoding:
    """One training: the autoencoder, the optimizer, and all that a checkpoint holds.

    Goes on from the newest checkpoint of ``config.output``.

    Args:
        vae: what of it requires gradients learns.
        config: its settings.

    Attributes:
        found: the checkpoint that the training goes on from; empty at its start.
    """

    def __init__(self, vae: DiffusersNetwork, config: AutoencodingConfig) -> None:
        self.vae, self.config, self.output = vae, config, Path(config.output)
        self._perception = Perception() if config.perception_weight else None
        self._optimizer = MuonWithAdamW(vae, config.lr, config.adam_rate)
        self._checkpoints = Checkpoints(self.output)
        self.step = 0
        self.found: dict[str, Any] = self._checkpoints.latest() or {}
        if self.found:
            vae.load_state_dict(self.found["model"])
            self._optimizer.load_state_dict(self.found["optimizers"])
            self.step = self.found["step"]

    def picture_loss(self, decoded: Tensor, target: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss of pixels and, if there is one who sees, of what is seen; and what to log of both."""
        loss = reconstruction_loss(decoded, target, self.config.edge_weight)
        values = {"reconstruction": loss.item()}
        if self._perception:
            seen = self._perception(decoded, target)
            loss = loss + self.config.perception_weight * seen
            values["perception"] = seen.item()
        return loss, values

    def run(
        self,
        loss: Callable[[int], tuple[Tensor, dict[str, float]]],
        sheet: Callable[[], Sheet],
        title: str,
        more_state: Callable[[], dict[str, Any]] = dict,
    ) -> bool:
        """Train to the last step, or until SIGTERM or Ctrl-C; a checkpoint is there in any case.

        Args:
            loss: of a step, by its number, and what to log of it.
            sheet: rows of pictures to show, and the mean square error of the decoded ones.
            title: of the plot of losses.
            more_state: what a checkpoint holds besides the network and the optimizer.

        Returns:
            Whether the training has come to its end.
        """
        config = self.config
        table = LossTable(self.output / "losses.csv", self.step)

        def checkpoint() -> None:
            state = {"step": self.step, "model": self.vae.state_dict(), "optimizers": self._optimizer.state_dict()}
            self._checkpoints.save(self.step, state | more_state())
            with torch.no_grad():
                rows, error = sheet()
            table.add(self.step, {"psnr_of_sheet": float(10 * torch.log10(4 / error))})
            table.plot(self.output / "losses.png", ["reconstruction"], title)
            pictures.save(contact_sheet(rows), self.output / f"sheet-{self.step:06d}.png")

        with stop_signals() as stop, Progress(config.steps, self.step) as progress:
            while self.step < config.steps and not stop:
                rate = min(1, (self.step + 1) / config.warmup) * 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
                found, values = loss(self.step)
                found.backward()
                self._optimizer.step(max(rate, 0.01))
                self.step += 1
                progress.update(self.step)
                if self.step % 20 == 0:
                    progress.tell_numbers(values)
                    table.add(self.step, values)
                if self.step % config.save_every == 0 or self.step == config.steps:
                    checkpoint()
        if stop:
            checkpoint()
        return not stop
