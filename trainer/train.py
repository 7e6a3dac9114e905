"""Distil a multi-step model into a one-step LoRaD with VSD.

    python trainer/train.py --config trainer/configs/mini.yaml [key=value ...]

Stop it at any time (Ctrl-C, SIGTERM, a power cut): started again with the same output folder it goes on from the
newest checkpoint, bit for bit as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from trainer import config as settings
from trainer.prompts import Prompts
from trainer.roles import FAKE, STUDENT, Roles
from trainer.state import Checkpoints, random_state, restore_random_state
from trainer.vsd import Noising, fake_loss, generate, student_loss
from trainer.watch import LossTable, contact_sheet
from wadi_core import base as bases
from wadi_core import pictures
from wadi_core.lorad import LoRaD, Metadata
from wadi_core.lorad.layers import fake_score_layers, network_sha256, student_layers
from wadi_core.pipeline import OneStepPipeline, noise
from wadi_core.schedule import OneStep


@dataclass
class TrainConfig:
    """Settings of a distillation. Lengths in steps, angles in radians, sizes in pixels."""

    version: int = 1
    base: str = "mini"  # a diffusers folder, or "mini"
    prompts: str = "mini"  # a text file, one prompt a line, or "mini" for captions of the embedded model's scenes
    output: str = "runs/mini"
    name: str = "one-step"
    seed: int = 0
    steps: int = 3000
    batch: int = 32
    student_rank: int = 64
    fake_rank: int = 16
    student_rate: float = 1e-3
    fake_rate: float = 1e-2
    warmup: int = 20
    decay_steps: int = 0  # the student's rate falls to a tenth over this many last steps
    student_beta1: float = 0.9
    fake_beta1: float = 0.9
    fake_updates: int = 1  # per student update
    fake_head_start: int = 0  # fake-score updates before the student's first
    teacher_guidance: float = 1.5
    fake_guidance: float = 1.5
    normalize: bool = False
    timestep_low: int = 20
    timestep_high: int = 980
    null_share: float = 0.1
    clip: float = 1.0
    ema: float = 0.0  # 0 switches the average off
    alpha_T_squared: float = 0.0047
    timestep: int = 999
    bf16: bool = True
    save_every: int = 100
    sheet_every: int = 100
    keep: int = 2


def _by_path(lorad: LoRaD, network: torch.nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of an adapter by the paths of a network's layers."""
    return {path: lorad.factors[key] for key, path in lorad.matched(network).paths.items()}


class Distillation:
    """A run: the network in its three roles, two optimizers, and everything a checkpoint must hold."""

    def __init__(self, config: TrainConfig) -> None:
        from diffusers import DDPMScheduler

        self.config = config
        self.output = Path(config.output)
        torch.manual_seed(config.seed)
        source = bases.find(config.base)
        self.base = bases.load(config.base, torch.device("cpu"), torch.float32)
        self.pipeline = OneStepPipeline(self.base, torch.device("cpu"), torch.float32)
        unet, architecture = self.base.unet, self.base.architecture
        self.base_sha256 = network_sha256(unet, architecture)
        start = torch.Generator().manual_seed(config.seed)
        student = LoRaD.create(unet, config.student_rank, layers=student_layers(unet, architecture), generator=start)
        fake = LoRaD.create(unet, config.fake_rank, layers=fake_score_layers(unet, architecture), generator=start)
        self.roles = Roles(unet, *(_by_path(lorad, unet) for lorad in (student, fake)))
        self.student_parameters = list(self.roles.parameters(STUDENT))
        self.fake_parameters = list(self.roles.parameters(FAKE))
        options = {"weight_decay": 0.0}
        self.student_optimizer = torch.optim.AdamW(
            self.student_parameters, lr=config.student_rate, betas=(config.student_beta1, 0.999), **options
        )
        self.fake_optimizer = torch.optim.AdamW(
            self.fake_parameters, lr=config.fake_rate, betas=(config.fake_beta1, 0.999), **options
        )
        self.average = self.roles.state(STUDENT) if config.ema else {}
        self.one_step = OneStep(config.alpha_T_squared, config.timestep)
        self.noising = Noising(DDPMScheduler.from_pretrained(source.settings, subfolder="scheduler").alphas_cumprod)
        side = [size // bases.FACTOR for size in self.base.native_size]
        self.latent_shape = (4, side[1], side[0])
        self.prompts = Prompts(config.prompts, config.seed)
        self.null = self.pipeline.encode([""])
        self.step = 0

    def state(self) -> dict:
        """All that the run needs to go on bit for bit."""
        return {
            "step": self.step,
            "settings": dataclasses.asdict(self.config),
            "student": self.roles.state(STUDENT),
            "fake": self.roles.state(FAKE),
            "average": self.average,
            "student_optimizer": self.student_optimizer.state_dict(),
            "fake_optimizer": self.fake_optimizer.state_dict(),
            "random": random_state(),
            "prompts": self.prompts.state(),
        }

    def load_state(self, state: dict) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it belongs to a run of another shape.
        """
        for name in ("base", "student_rank", "fake_rank", "prompts", "seed", "batch"):
            before, now = state["settings"][name], getattr(self.config, name)
            if before != now:
                raise ValueError(f"{self.output} holds a run with {name}={before}, not {now}; choose another output folder")
        self.step = state["step"]
        self.roles.load_state(STUDENT, state["student"])
        self.roles.load_state(FAKE, state["fake"])
        self.average = state["average"]
        self.student_optimizer.load_state_dict(state["student_optimizer"])
        self.fake_optimizer.load_state_dict(state["fake_optimizer"])
        self.prompts.load_state(state["prompts"])
        restore_random_state(state["random"])

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Noise z and text embeddings of one batch."""
        text = self.pipeline.encode(self.prompts.take(self.config.batch))
        return torch.randn(len(text), *self.latent_shape), text

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16)

    def _update(self, loss: Tensor, parameters: list, optimizer: torch.optim.Optimizer) -> float:
        """One optimizer step; returns the gradient's norm before clipping."""
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def update_fake(self, x0: Tensor, text: Tensor) -> dict[str, float]:
        """One update of the fake-score model on pictures of the student."""
        count = len(x0)
        t = torch.randint(0, 1000, (count,))
        dropped = (torch.rand(count) < self.config.null_share)[:, None, None]
        with self._autocast():
            loss = fake_loss(self.roles, self.noising, x0, torch.where(dropped, self.null, text), t, torch.randn_like(x0))
        norm = self._update(loss, self.fake_parameters, self.fake_optimizer)
        return {"fake_loss": loss.item(), "fake_norm": norm}

    def train_step(self) -> dict[str, float]:
        """One update of the student and ``fake_updates`` of the fake score; returns what to log."""
        config = self.config
        left = (config.steps - self.step) / max(1, config.decay_steps)
        factor = min(1.0, (self.step + 1) / max(1, config.warmup))
        for optimizer, rate in ((self.student_optimizer, config.student_rate), (self.fake_optimizer, config.fake_rate)):
            final = max(0.1, min(1.0, left)) if optimizer is self.student_optimizer else 1.0
            for group in optimizer.param_groups:
                group["lr"] = rate * factor * final
        z, text = self._batch()
        log: dict[str, float] = {}
        learning = self.step >= config.fake_head_start
        with self._autocast(), torch.set_grad_enabled(learning):
            x0 = generate(self.roles, z, text, self.one_step)
        if learning:
            t = torch.randint(config.timestep_low, config.timestep_high + 1, (len(z),))
            with self._autocast():
                loss, log = student_loss(
                    self.roles, self.noising, x0, text, self.null, t, torch.randn_like(z),
                    config.teacher_guidance, config.fake_guidance, config.normalize,
                )  # fmt: skip
            log["student_norm"] = self._update(loss, self.student_parameters, self.student_optimizer)
            log["student_loss"] = loss.item()
        x0 = x0.detach()
        log |= self.update_fake(x0, text)
        for _ in range(config.fake_updates - 1):
            z, text = self._batch()
            with torch.no_grad(), self._autocast():
                x0 = generate(self.roles, z, text, self.one_step)
            log |= self.update_fake(x0, text)
        self.step += 1
        if config.ema:
            decay = min(config.ema, (1 + self.step) / (10 + self.step))
            for name, value in self.roles.state(STUDENT).items():
                self.average[name].lerp_(value, 1 - decay)
        return log

    def adapter(self) -> LoRaD:
        """The student (its average, if one is kept) as a LoRaD."""
        metadata = Metadata(
            architecture=self.base.architecture,
            alpha_T_squared=self.config.alpha_T_squared,
            timestep=self.config.timestep,
            prediction_type=self.base.prediction_type,
            base_sha256=self.base_sha256,
            title=self.config.name,
        )
        with self._averaged():
            return LoRaD.from_module(self.base.unet, STUDENT, metadata)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The student's average in its place, where one is kept."""
        live = self.roles.state(STUDENT)
        self.roles.load_state(STUDENT, self.average or live)
        try:
            yield
        finally:
            self.roles.load_state(STUDENT, live)

    def sheet(self) -> object:
        """One-step pictures of fixed captions, two seeds each."""
        captions = self.prompts.shown
        text = self.pipeline.encode(captions)
        rows = []
        with self._averaged(), torch.no_grad():
            for seed in (0, 100):
                z = noise(range(seed, seed + len(captions)), *self.base.native_size)
                rows.append(self.pipeline.decode(generate(self.roles, z, text, self.one_step)))
        return contact_sheet(rows)

    def run(self) -> None:
        """Train to the end, or to a signal; both leave a checkpoint."""
        config = self.config
        checkpoints = Checkpoints(self.output, config.keep)
        if state := checkpoints.latest():
            self.load_state(state)
        table = LossTable(self.output / "losses.csv", self.step)
        stop: list[int] = []
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda number, _: stop.append(number))
        sums: dict[str, list[float]] = {}
        began = time.monotonic()
        with tqdm(total=config.steps, initial=self.step, unit="step", mininterval=2) as bar:
            while self.step < config.steps and not stop:
                for name, value in self.train_step().items():
                    sums.setdefault(name, []).append(value)
                bar.update()
                last = self.step == config.steps
                if self.step % 10 == 0 or last:
                    means = {name: sum(values) / len(values) for name, values in sums.items()}
                    sums.clear()
                    bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()})
                    table.add(self.step, means | {"seconds": time.monotonic() - began})
                if self.step % config.save_every == 0 or last:
                    checkpoints.save(self.step, self.state())
                if self.step % config.sheet_every == 0 or last:
                    table.plot(self.output / "losses.png", ["fake_loss", "vsd_grad", "x0_std"], "distillation")
                    pictures.save(self.sheet(), self.output / f"sheet-{self.step:06d}.png")
        checkpoints.save(self.step, self.state())
        self.adapter().save(self.output / f"{config.name}.safetensors")


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arguments = settings.parser(__doc__.splitlines()[0]).parse_args()
    try:
        Distillation(settings.load(TrainConfig, arguments.config, arguments.overrides)).run()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
