"""One run of variational score distillation: the roles, their optimizers, a step, and all that a checkpoint holds."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wadi_core import base as bases
from wadi_core.pipeline import noise
from wadi_core.schedule import OneStep

from ..data import random_draws
from ..data.prompts import MINI, Prompts
from ..engine.optim import (
    NonFiniteGuard,
    OptimizerStep,
    all_finite,
    decay_left,
    make_optimizer,
)
from ..engine.processes import Processes
from ..engine.signals import StepAbandoned, go_on
from ..models import base_models
from ..models.adapters import Adapter, FullAdapter, LoRaDAdapter, PeftAdapter
from ..models.condition import Condition
from ..models.diffusion import Noising, anchor_loss, teacher_pictures
from ..models.placement import autocast_type, place, working_type
from ..settings.distillation import TrainConfig
from .adversary import ADVERSARY, Adversary, real_pictures
from .buckets import latent_shape
from .embedding_cache import EmbeddingCache
from .losses import f_weight
from .rates import learning_rate
from .resuming import Resumable
from .roles import FAKE, STUDENT, TEACHER, Roles, first_factors, layers_of_roles
from .vsd import Recipe, fake_loss, generate, student_loss

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("wadi")


def read_prompts(config: TrainConfig) -> Prompts:
    """The prompts of a run.

    Raises:
        OSError, ValueError: they cannot be read; one line.
    """
    if config.prompts != MINI:
        return Prompts(config.prompts, config.seed, field=config.prompt_field)
    from ..mini.captions import SceneCaptions  # which needs what draws scenes

    return Prompts(MINI, config.seed, drawn=SceneCaptions())


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one network call of a process works on: the student's clean latents and what they were asked to show."""

    numbers: range
    x0: Tensor
    condition: Condition


class Distillation(Resumable):
    """A run: the network in its three roles, two optimizers, and everything a checkpoint must hold.

    Args:
        config: its settings.
        processes: those that train together; found out if not given.

    Raises:
        OSError, ValueError: a file is missing or wrong, or settings do not go together; one line.
    """

    def __init__(self, config: TrainConfig, processes: Processes | None = None) -> None:
        self.config = config
        self.output = Path(config.output)
        self.processes = processes or Processes(config.device)
        self.processes.share(range(config.batch), config.micro_batch)  # refused here rather than after loading
        self.prompts = read_prompts(config)
        if config.embedding_cache and self.prompts.count is None:
            raise ValueError("embedding_cache: captions of mini's scenes never come again, so there is nothing to keep")
        torch.manual_seed(config.seed)
        self.device, self.dtype = self.processes.device, working_type(config)
        self.model = base_models.load(config.base, config.base_config, config.prediction_type)
        self.model.skip_layers(config.clip_skip)
        width, height = [config.resolution] * 2 if config.resolution else self.model.native_size
        self.size = width, height
        self.latent_shape = (base_models.LATENT_CHANNELS, height // bases.FACTOR, width // bases.FACTOR)
        self.model.place_helpers(self.device, self._helper_type(), config.offload)
        self.roles = self._make_roles()
        self.updaters = {
            role: OptimizerStep(
                list(self.roles.parameters(role)),
                make_optimizer(config.optimizer, list(self.roles.parameters(role)), rate, beta1, config.weight_decay),
                config.max_grad_norm,
                scaled=config.precision == "fp16" and self.device.type == "cuda",
            )
            for role, rate, beta1 in (
                (STUDENT, config.student_lr, config.student_beta1),
                (FAKE, config.fake_lr, config.fake_beta1),
            )
        }
        self.average = self.roles.state(STUDENT) if config.ema else {}
        own = float(f"{float(self.model.alphas_cumprod[config.timestep]):.6g}")
        alpha_T_squared = config.alpha_T_squared or own
        self.one_step = OneStep(alpha_T_squared, config.timestep, config.prediction_type, config.input_scale)
        self.recipe = Recipe(config.teacher_guidance, config.fake_guidance, config.normalize, config.loss, config.sid_alpha)
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # Apple's GPUs know no float64
        self.noising = Noising(self.model.alphas_cumprod.to(self.device, exact), config.prediction_type)
        self.guard = NonFiniteGuard(config.max_skipped)
        self.cache = self._open_cache()
        self.null = self.encode([""])
        self.adversary = self._make_adversary()
        self.step = 0

    def _helper_type(self) -> torch.dtype:
        """The type of text encoder and autoencoder: half precision is for GPUs."""
        return torch.float32 if self.device.type == "cpu" else autocast_type(self.config) or torch.float32

    def _make_roles(self) -> Roles:
        config, network, architecture = self.config, self.model.network, self.model.architecture
        layers = layers_of_roles(network, architecture)
        _, height, width = self.latent_shape
        kinds = {STUDENT: (config.adapter, config.student_rank), FAKE: (config.fake_adapter, config.fake_rank)}
        factors = first_factors(network, architecture, config)
        turned = {path for pairs in factors.values() for path in pairs}
        place(network, config, self.device, turned, height * width, config.exact_weights)
        adapters: dict[str, Adapter] = {}
        # First copies of the bare network, then rotations inside it, then what peft wraps around them.
        for role, (kind, _) in kinds.items():
            if kind == "full":
                adapters[role] = FullAdapter(role, network)
        for role, pairs in factors.items():
            share = config.share_rotation and not config.compile
            adapters[role] = LoRaDAdapter(role, network, pairs, share, config.recompute_rotation)
        for role, (kind, rank) in kinds.items():
            if kind in ("lora", "dora", "oft"):
                adapters[role] = PeftAdapter(role, network, layers[role], rank, config.seed, kind)
        roles = Roles(
            network, adapters[STUDENT], adapters[FAKE], self.model.call, autocast_type(config), bool(config.student_precision)
        )
        for role in kinds:
            roles.activate(role)
            roles.parts[role] = self.processes.wrap(roles.parts[role])
        return roles

    def _open_cache(self) -> EmbeddingCache | None:
        config = self.config
        if not config.embedding_cache:
            return None
        return EmbeddingCache(config.embedding_cache, self.model.encoder_key)

    def _make_adversary(self) -> Adversary | None:
        config = self.config
        if config.adversary == "none":
            return None
        found = Adversary(self.roles, self.processes.wrap, self.device, self.dtype, config.seed)
        self.roles.parts[ADVERSARY] = found.part
        parameters = list(found.head.parameters())
        optimizer = make_optimizer("adamw", parameters, config.adversary_lr, 0.0, config.weight_decay)
        self.updaters[ADVERSARY] = OptimizerStep(parameters, optimizer, config.max_grad_norm)
        if config.adversary == "real":
            self.real_pictures = real_pictures(config.adversary_pictures, self.model, self.size)
        return found

    # What a step needs

    def _fit(self, condition: Condition) -> Condition:
        """A condition in the type that the network wants, where autocast does not see to it."""
        return condition if self.roles.autocast is not None else condition.to(self.dtype)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """What the network is told for some prompts."""
        embedded = self.model.embed(prompts) if self.cache is None else self.cache.encode(prompts, self.model.embed)
        return self._fit(self.model.condition(embedded))

    def _draw(self, purpose: int, numbers: range, low: int, high: int) -> random_draws.Draw:
        shape = latent_shape(self.config, self.size, self.step)
        drawn = random_draws.draw(self.config.seed, purpose, numbers, shape, low, high)
        z, eps = (noise.to(self.device, self.dtype) for noise in (drawn.z, drawn.eps))
        return random_draws.Draw(z, eps, drawn.t.to(self.device), drawn.lot)

    def _calls(self, numbers: range) -> list[range]:
        return self.processes.share(numbers, self.config.micro_batch)

    def _told(self, calls: list[range]) -> list[tuple[range, Condition]]:
        """Network calls and what each is told; a text encoder that rests elsewhere is fetched once for all of them."""
        condition = self.encode(self.prompts.at([number for call in calls for number in call]))
        starts = range(0, len(condition), len(calls[0]))
        return [(call, condition[start : start + len(call)]) for call, start in zip(calls, starts, strict=True)]

    @contextlib.contextmanager
    def _accumulating(self, role: str, last: bool) -> Iterator[None]:
        """Gradients are averaged over the processes with the last of several calls."""
        part: Any = self.roles.parts[role]
        with part.no_sync() if hasattr(part, "no_sync") and not last else contextlib.nullcontext():
            yield

    def _backward(self, role: str, loss: Tensor) -> None:
        self.roles.activate(role)  # what checkpointing computes again must be computed in this role
        self.updaters[role].backward(loss)

    def _update(self, role: str, log: list[dict[str, Tensor]]) -> dict[str, float]:
        """Take the step of a role, unless a number is NaN or Inf; returns what to log, averaged over all samples."""
        updater = self.updaters[role]
        updater.set_lr(learning_rate(self.config, role, self.step))
        values = {name: torch.stack([entry[name] for entry in log]).cpu().double().mean() for name in log[0]}
        means = self.processes.mean(values | {f"{role}_norm": updater.clipped_norm()})
        finite = means.pop("nonfinite", 0.0) == 0.0 and all_finite(list(means.values()))
        scale = updater.scale
        updater.finish(finite)
        self.roles.forget(role)
        self.guard.note(self.step, role, finite, scale)
        return means

    # A step

    def update_student(self, numbers: range, look: Callable[[], None] = go_on) -> tuple[list[Sample], dict[str, float]]:
        """One update of the student; returns its pictures, from before the update, and what to log.

        ``look`` is called before each network call of the process, and may raise.
        """
        config, samples, logs = self.config, [], []
        learning = self.step >= config.fake_head_start
        left = decay_left(self.step, config.steps, config.decay_steps)
        end = config.timestep_high_end or config.timestep_high
        high = round(end + (config.timestep_high - end) * left)
        calls = self._calls(numbers)
        for call, condition in self._told(calls):
            look()
            drawn = self._draw(random_draws.STUDENT, call, config.timestep_low, high)
            with self._accumulating(STUDENT, call is calls[-1]):
                with torch.set_grad_enabled(learning):
                    x0 = generate(self.roles, drawn.z, condition, self.one_step)
                if learning:
                    weight, more = self._judged(x0, condition, drawn)
                    loss, log = student_loss(
                        self.roles, self.noising, x0, condition, self.null, drawn.t, drawn.eps, self.recipe, weight, more
                    )
                    if config.anchor_weight:
                        log["anchor_loss"] = anchor = self._anchor(call, drawn.z, x0, condition)
                        held = config.anchor_end + (1 - config.anchor_end) * left
                        loss = loss + config.anchor_weight * held * anchor
                    self._backward(STUDENT, loss / len(calls))
                    logs.append({**{name: value.detach() for name, value in log.items()}, "student_loss": loss.detach()})
            samples.append(Sample(call, x0.detach(), condition))
        return samples, self._update(STUDENT, logs) if learning else {}

    def _anchor(self, numbers: range, z: Tensor, x0: Tensor, condition: Condition) -> Tensor:
        """The mean over those samples that are held to the teacher's coarse pictures, for a batch of many calls."""
        config = self.config
        chosen = slice(-numbers.start % config.anchor_every, None, config.anchor_every)
        if not len(z[chosen]):
            return x0.new_zeros(())
        drawn = self._teachers(z[chosen], condition[chosen], config.anchor_steps)
        return anchor_loss(x0[chosen], drawn, config.anchor_cells).sum() * config.anchor_every / len(z)

    def _teachers(self, z: Tensor, condition: Condition, steps: int) -> Tensor:
        """What the teacher draws of noise z in several guided steps."""

        def guided(x: Tensor, t: Tensor) -> Tensor:
            return self.roles.guided(TEACHER, x, t, condition, self.null, self.config.teacher_guidance)

        return teacher_pictures(guided, self.noising, z, steps)

    def _judged(self, x0: Tensor, condition: Condition, drawn: random_draws.Draw) -> tuple[Tensor | None, Tensor | None]:
        """What an adversary adds to the loss of pictures: weights of their gradients, and a gradient of its own."""
        if self.adversary is None or not self.adversarial:
            return None, None
        logits, grad = self.adversary.judge(self.noising, x0, condition, drawn.t, drawn.eps)
        return f_weight(self.config.f_weight, logits), self.config.adversary_weight * grad

    @property
    def adversarial(self) -> bool:
        """Whether this step is one of the last, which have an adversary."""
        return self.adversary is not None and self.step >= self.config.steps - self.config.adversary_steps

    def update_adversary(self, adversary: Adversary, samples: list[Sample]) -> dict[str, float]:
        """One update of the adversary's head on pictures of the student and as many others."""
        config, logs = self.config, []
        for sample in samples:
            drawn = self._draw(random_draws.ADVERSARY, sample.numbers, config.timestep_low, config.timestep_high)
            if config.adversary == "real":
                latents, captions = self.real_pictures.at(config.seed, sample.numbers)
                others = latents.to(self.device, self.dtype), self.encode(captions)
            else:
                others = self._teachers(drawn.z, sample.condition, config.anchor_steps), sample.condition
            with self._accumulating(ADVERSARY, sample is samples[-1]):
                loss, right = adversary.loss(self.noising, (sample.x0, sample.condition), others, drawn.t, drawn.eps)
                self._backward(ADVERSARY, loss / len(samples))
            logs.append({"adversary_loss": loss.detach(), "adversary_right": right})
        return self._update(ADVERSARY, logs)

    @torch.no_grad()
    def more_samples(self, numbers: range) -> list[Sample]:
        """Further pictures of the student, for further updates of the fake score."""
        samples = []
        for call, condition in self._told(self._calls(numbers)):
            drawn = self._draw(random_draws.STUDENT, call, 0, random_draws.TIMESTEPS - 1)
            samples.append(Sample(call, generate(self.roles, drawn.z, condition, self.one_step), condition))
        return samples

    def update_fake(self, samples: list[Sample]) -> dict[str, float]:
        """One update of the fake-score model on pictures of the student."""
        config, logs = self.config, []
        for sample in samples:
            drawn = self._draw(random_draws.FAKE, sample.numbers, 0, random_draws.TIMESTEPS - 1)
            condition = sample.condition.where((drawn.lot < config.uncond_prob).to(self.device), self.null)
            with self._accumulating(FAKE, sample is samples[-1]):
                loss = fake_loss(self.roles, self.noising, sample.x0, condition, drawn.t, drawn.eps)
                self._backward(FAKE, loss / len(samples))
            logs.append({"fake_loss": loss.detach()})
        return self._update(FAKE, logs)

    def train_step(self, look: Callable[[], None] = go_on) -> dict[str, float]:
        """One update of the student and ``fake_updates`` of the fake score; returns what to log.

        Args:
            look: called between network calls up to the student's update; it may raise ``StepAbandoned``.

        Raises:
            StepAbandoned: by ``look``; the run is as it was before the step.
        """
        batch, start = self.config.batch, self.prompts.position
        try:
            samples, log = self.update_student(range(start, start + batch), look)
        except StepAbandoned:
            self.updaters[STUDENT].stash_grads()
            for role in (STUDENT, FAKE):
                self.roles.forget(role)
            raise
        log |= self.update_fake(samples)
        if self.adversary is not None and self.adversarial:
            log |= self.update_adversary(self.adversary, samples)
        for update in range(1, self.config.fake_updates):
            samples = self.more_samples(range(start + update * batch, start + (update + 1) * batch))
            log |= self.update_fake(samples)
        self.roles.forget(STUDENT)
        self.prompts.position = start + self.config.fake_updates * batch
        self.step += 1
        self._follow()
        return log

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average of the student a little towards it."""
        if self.average:
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            live = self.roles.adapters[STUDENT].parameters
            torch._foreach_lerp_(list(self.average.values()), [live[name].detach() for name in self.average], 1 - decay)

    # What it knows

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The student's average in its place, where one is kept."""
        if not self.average:
            yield
            return
        live = self.roles.state(STUDENT)
        self.roles.load_state(STUDENT, self.average)
        try:
            yield
        finally:
            self.roles.load_state(STUDENT, live)

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """One-step pictures of some prompts, each from the noise of its seed."""
        with self.averaged():
            made = self._drawn(prompts, seeds, lambda z, condition: generate(self.roles, z, condition, self.one_step))
        self.roles.forget(STUDENT)
        return made

    def teacher_pictures(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[Image]:
        """The same of the teacher, in so many guided steps."""
        return self._drawn(prompts, seeds, lambda z, condition: self._teachers(z, condition, steps))

    @torch.no_grad()
    def _drawn(self, prompts: Sequence[str], seeds: Sequence[int], draw: Callable[[Tensor, Condition], Tensor]) -> list[Image]:
        made, size = [], len(self._calls(range(self.config.batch))[0])
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            z = noise(seeds[part], *self.size).to(self.device, self.dtype)
            made += self.model.decode(draw(z, self.encode(prompts[part])))
        return made

    def student(self) -> Adapter:
        """The student's adapter."""
        return self.roles.adapters[STUDENT]
