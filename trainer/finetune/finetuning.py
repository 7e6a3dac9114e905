"""Learning from a few pictures with the multi-step teacher, and looking at the one-step student on the way.

The frozen network exists once. What is learned (a word, an adapter) is trained with the ordinary loss of the teacher,
|eps - eps(x_t, t, c)|^2; a one-step LoRaD on the same network is switched on for the sheets alone. So what the student
shows was never trained on it: it is plugged in unchanged.

That carries over in part. With an anchor, as a distillation has it, the student with what is being learned is held to
the picture that the teacher with it draws of the same noise. Its own LoRaD stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi_core import base as bases
from wadi_core import hub, mini
from wadi_core.lorad import LoRaD
from wadi_core.lorad.linear import attach, rotated_layers, set_active
from wadi_core.schedule import OneStep
from wadi_core.sheets import contact_sheet

from ..data import random_draws
from ..data.examples import Examples
from ..engine.checkpoints import (
    DamagedCheckpoint,
    check_like,
    check_same,
    damage_told,
    random_state,
    restore_random_state,
)
from ..engine.optim import NonFiniteGuard, OptimizerStep, all_finite, make_optimizer, scheduled_lr
from ..engine.processes import Processes
from ..engine.signals import StepAbandoned, go_on
from ..models import base_models
from ..models.condition import Condition
from ..models.diffusion import Noising, anchor_loss, teacher_pictures
from ..models.generators import ModelGenerator
from ..models.placement import autocast_type, place, working_type
from ..settings.fields import settings_before
from ..settings.finetuning import FinetuningConfig

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("wadi")

FINETUNING, PRIOR, ANCHOR = 3, 4, 5  # purposes of random numbers; a distillation has others
ROLE, ONE_STEP = "finetuned", "one-step"
TEACHER, STUDENT = "teacher", "student"
SHEET_SEED, SHEET_ROWS = 0, 4

# Settings with which a run cannot go on if they change.
FIXED = ("seed", "resolution", "prediction_type", "optimizer", "adapter", "rank")
FIXED += ("tokens", "vectors", "class_prompts", "prior_count")
C = TypeVar("C", bound=FinetuningConfig)


class FinetuningRun:
    """A run: the base, what is trained on it, an optimizer, and everything that a checkpoint must hold.

    Args:
        config: its settings.
        processes: found out if not given; a finetuning run has one.

    Raises:
        OSError, ValueError: a file is missing or wrong, or settings do not go together; one line.
    """

    def __init__(self, config: FinetuningConfig, processes: Processes | None = None) -> None:
        self.config, self.output = config, Path(config.output)
        self.processes = processes or Processes(config.device)
        if self.processes.count > 1:
            raise ValueError("finetuning runs in one process: start it without accelerate launch")
        self.processes.share(range(config.batch), config.micro_batch)  # refused here rather than after loading
        self.examples = Examples.read(config.pictures, config.templates, self.wrong_caption)
        torch.manual_seed(config.seed)
        self.device, self.dtype = self.processes.device, working_type(config)
        self.model = base_models.load(config.base, config.base_config, config.prediction_type)
        self.size = (config.resolution, config.resolution) if config.resolution else self.model.native_size
        self.latent_shape = (base_models.LATENT_CHANNELS, self.size[1] // bases.FACTOR, self.size[0] // bases.FACTOR)
        self.one_step, factors = self._read_student()
        turned = {*factors, *self.prepare()}
        self.place_helpers()
        place(self.network, config, self.device, turned, self.latent_shape[1] * self.latent_shape[2], exact=False)
        attach(self.network, factors, ONE_STEP)
        self.parameters = self.attach()
        self.reset()
        trained = list(self.parameters.values())
        self.updater = OptimizerStep(
            trained,
            make_optimizer(config.optimizer, trained, config.lr, config.beta1, config.weight_decay),
            config.max_grad_norm,
            scaled=config.precision == "fp16" and self.device.type == "cuda",
        )
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # Apple's GPUs know no float64
        self.noising = Noising(self.model.alphas_cumprod.to(self.device, exact), config.prediction_type)
        self.guard = NonFiniteGuard(config.max_skipped, "lr")
        self.means, self.deviations = self.examples.latents(self.model, self.size, getattr(config, "mirror", False))
        self.step = 0

    @property
    def network(self) -> nn.Module:
        """The frozen network."""
        return self.model.network

    @property
    def words(self) -> tuple[str, ...]:
        """Hashes of the words that captions may say and that were learned before."""
        return ()

    # What a kind of finetuning fills in

    def wrong_caption(self, caption: str) -> str | None:
        """What is wrong with a caption, if anything is."""
        return None

    def prepare(self) -> Iterable[str]:
        """What has to be found out or refused before the network is placed; returns the layers that will be turned."""
        return ()

    def attach(self) -> dict[str, nn.Parameter]:
        """Put what is trained on the placed network: name -> parameter."""
        raise NotImplementedError

    def place_helpers(self) -> None:
        """Put text encoder and autoencoder where they are to be."""
        half = torch.float32 if self.device.type == "cpu" else autocast_type(self.config) or torch.float32
        self.model.place_helpers(self.device, half, self.config.offload)

    def activate(self, who: str) -> None:
        """Make the network the teacher or the student, with what has been learned so far."""
        set_active(self.network, (ONE_STEP, ROLE) if who == STUDENT else (ROLE,))

    def condition(self, captions: Sequence[str]) -> Condition:
        """What the network is told for the captions of a call, with a graph where that is trained."""
        return self.model.encode(captions)

    def more_loss(self, captions: Sequence[str], numbers: range) -> tuple[Tensor | float, dict[str, Tensor]]:
        """What is added to the loss of a call, and what to log of it."""
        return 0.0, {}

    def write(self, folder: Path, picture: Image) -> list[Path]:
        """Write what has been learned; returns the files."""
        raise NotImplementedError

    # A step

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the network predicts, in the type of x (n, 4, h, w)."""
        autocast = autocast_type(self.config)
        if autocast is None:
            condition = condition.to(self.dtype)
        with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
            return self.model.call(self.network, x, t, condition).to(x.dtype)

    def denoising_loss(self, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Mean square error of what is predicted for x_t, for each sample (n,), weighted if that is wanted."""
        x_t = self.noising.add_noise(x0, eps, t)
        alpha, sigma = self.noising.alpha_sigma(t, x0.dtype)
        velocity = self.config.prediction_type == "v_prediction"
        target = alpha * eps - sigma * x0 if velocity else eps
        loss = F.mse_loss(self.predict(x_t, t, condition), target, reduction="none").mean(dim=(1, 2, 3))
        # An error of eps is one of v times alpha: weighted by 1 / alpha^2, up to the cap, it counts as that of v does.
        return loss if velocity else loss * (1 / alpha.flatten() ** 2).clamp(max=self.config.weight_cap)

    def draw(self, purpose: int, numbers: Sequence[int]) -> random_draws.Draw:
        """The random numbers of some samples, on the device."""
        drawn = random_draws.draw(self.config.seed, purpose, numbers, self.latent_shape, 0, random_draws.TIMESTEPS - 1)
        z, eps = (noise.to(self.device, self.dtype) for noise in (drawn.z, drawn.eps))
        t = random_draws.importance_timesteps(drawn.lot, self.config.importance, self.config.high_noise_fraction)
        return random_draws.Draw(z, eps, t.to(self.device), drawn.lot)

    def loss(self, numbers: range) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a network call, and what to log of it."""
        drawn = self.draw(FINETUNING, numbers)
        chosen, captions = self.examples.draw(self.config.seed, numbers)
        if len(self.means) > len(self.examples):  # every second time the mirrored picture
            rounds = [number // len(self.examples) % 2 for number in numbers]
            chosen = [index + len(self.examples) * turn for index, turn in zip(chosen, rounds, strict=True)]
        mean, deviation = (part[chosen].to(self.device, self.dtype) for part in (self.means, self.deviations))
        # A sample of the autoencoder's posterior, as the teacher saw its pictures.
        shown = self.denoising_loss(mean + deviation * drawn.z, drawn.eps, drawn.t, self.condition(captions)).mean()
        added, log = self.more_loss(captions, numbers)
        return shown + added, {"denoising": shown.detach(), **log}

    def anchor_step(self, numbers: range, calls: int) -> Tensor:
        """Add the gradient of the student's distance to the teacher's pictures; returns that distance.

        The samples are every ``anchor_every``-th of a call's, of which a step has so many.
        """
        config, one_step = self.config, self.one_step
        chosen = [number for number in numbers if number % config.anchor_every == 0]
        if not chosen or one_step is None:  # the settings ask for a student where there is an anchor
            return torch.zeros((), device=self.device)
        drawn, captions = self.draw(ANCHOR, chosen), self.anchor_captions(chosen)
        with torch.no_grad():
            both = self.condition(captions).joined(self.condition([""]))

        def guided(x: Tensor, t: Tensor) -> Tensor:
            cond, uncond = self.predict(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            return uncond + config.anchor_guidance * (cond - uncond)

        wanted = teacher_pictures(guided, self.noising, drawn.z, config.anchor_steps)
        self.forget()  # rotated weights of the teacher, before those of the student are made
        self.activate(STUDENT)  # and backward with it: checkpointing computes the calls again
        t = torch.full((len(chosen),), one_step.timestep, device=self.device)
        x = one_step.network_input(drawn.z)
        x0 = one_step.x0(x, self.predict(x, t, self.condition(captions)))
        loss = anchor_loss(x0, wanted, config.anchor_cells).sum() * config.anchor_every / len(numbers)
        self.updater.backward(config.anchor_weight * loss / calls)
        self.forget()
        self.activate(TEACHER)
        return loss.detach()

    def anchor_captions(self, numbers: Sequence[int]) -> list[str]:
        """For which the student is held to the teacher: the captions of the pictures, or prompts in a shuffled order."""
        seed, prompts = self.config.seed, self.config.anchor_prompts
        if not prompts:
            return self.examples.draw(seed, numbers)[1]
        rounds = [divmod(number // self.config.anchor_every, len(prompts)) for number in numbers]
        return [prompts[random_draws.shuffled(len(prompts), seed, ANCHOR, time)[place]] for time, place in rounds]

    def train_step(self, look: Callable[[], None] = go_on) -> dict[str, float]:
        """One update; returns what to log.

        Args:
            look: called before each network call; it may raise ``StepAbandoned``.

        Raises:
            StepAbandoned: by ``look``; the run is as it was before the step.
        """
        config = self.config
        numbers = range(self.step * config.batch, (self.step + 1) * config.batch)
        self.activate(TEACHER)
        try:
            values = self._gradients(self.processes.share(numbers, config.micro_batch), look)
        except StepAbandoned:
            self.updater.stash_grads()
            self.reset()
            raise
        self.updater.set_lr(scheduled_lr(config.lr, self.step, config.steps, config.warmup, config.decay_steps))
        values = self.processes.mean(values | {"norm": self.updater.clipped_norm()})
        finite, scale = all_finite(list(values.values())), self.updater.scale
        self.updater.finish(finite)
        self.forget()
        self.guard.note(self.step, ROLE, finite, scale)
        self.step += 1
        return values

    def _gradients(self, calls: Sequence[range], look: Callable[[], None]) -> dict[str, Tensor]:
        """Add up the gradients of a step's calls; returns what to log."""
        config, logs = self.config, []
        for call in calls:
            look()
            loss, log = self.loss(call)
            self.updater.backward(loss / len(calls))
            logs.append({"loss": loss.detach(), **log})
        values = {name: torch.stack([entry[name] for entry in logs]).mean() for name in logs[0]}
        if config.anchor_weight and self.step >= config.steps - (config.anchor_last or config.steps):
            # The student's gradient is many times as long as the teacher's. AdamW, which measures its steps by those that
            # went before, would go as many times too far where it sets in, and the teacher would have no say any more.
            stashed, anchors = self.updater.stash_grads(), []
            for call in calls:
                look()
                anchors.append(self.anchor_step(call, len(calls)))
            values["anchor"] = torch.stack(anchors).mean()
            self.updater.merge_grads(stashed)
        return values

    # What it shows

    def reset(self) -> None:
        """Leave the network as it is trained."""
        self.activate(TEACHER)
        self.forget()

    def forget(self) -> None:
        """Let go of rotated weights that were kept between calls."""
        for _, layer in rotated_layers(self.network):
            layer.forget()

    @contextlib.contextmanager
    def generator(self, who: str) -> Iterator[ModelGenerator]:
        """What draws pictures of the teacher or of the student, for as long as it is open."""
        autocast, config = autocast_type(self.config), self.config
        steps = 1 if who == STUDENT else config.sheet_steps
        self.activate(who)
        try:
            with torch.no_grad(), torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                one_step = self.one_step or OneStep(prediction_type=config.prediction_type)
                yield ModelGenerator(self.model, one_step, self.size, steps, config.sheet_guidance, self.dtype)
        finally:
            self.reset()

    def pictures(self, prompts: Sequence[str], seed: int, who: str) -> list[Image]:
        """Pictures of some prompts, one network call a step each; picture i from the noise of seed ``seed + i``."""
        with self.generator(who) as generator:
            return [picture for i, prompt in enumerate(prompts) for picture in generator.pictures([prompt], [seed + i])]

    @property
    def shown(self) -> list[str]:
        """The prompts of the sheets."""
        return list(self.config.sheet_prompts) or self.examples.all_captions[:SHEET_ROWS]

    def sheet(self) -> Image:
        """A row for each prompt, the same noise for teacher and student."""
        titles = {TEACHER: f"teacher, {self.config.sheet_steps} steps"}
        if self.one_step is not None:
            titles[STUDENT] = "student, 1 step"
        columns = [self.pictures(self.shown, SHEET_SEED, who) for who in titles]
        return contact_sheet(list(zip(*columns, strict=True)), self.shown, list(titles.values()))

    # What it knows

    def state(self) -> dict[str, Any]:
        """All that the run needs to go on bit for bit."""
        return {
            "step": self.step,
            "settings": dataclasses.asdict(self.config),
            "base_sha256": self.model.base_sha256,
            "examples": self.examples.digest,
            "order": random_draws.ORDER,
            "words": self.words,
            "learned": {name: parameter.detach().clone() for name, parameter in self.parameters.items()},
            "updater": self.updater.state(),
            "skipped": self.guard.state(),
            "random": random_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            DamagedCheckpoint: something in it is missing, or of another type or shape than here.
            ValueError: it belongs to another run. Both with one line.
        """
        with damage_told():
            if set(state["learned"]) != set(self.parameters):
                raise DamagedCheckpoint("this checkpoint is of another kind of run; choose another output folder")
            before = settings_before(self.config, state["settings"])
            base, examples, words = state["base_sha256"], state["examples"], tuple(state.get("words", ()))
        if base != self.model.base_sha256:
            raise ValueError(f"{self.output} holds a run on another base; choose another output folder")
        if state.get("order") != random_draws.ORDER:
            raise ValueError(f"{self.output} {random_draws.OTHER_ORDER}")
        if examples != self.examples.digest:
            raise ValueError(f"{self.output} holds a run on other pictures or captions; choose another output folder")
        if words != self.words:
            raise ValueError(f"{self.output} holds a run with other learned words; choose another output folder")
        now = dataclasses.asdict(self.config)
        check_same(before, now, FIXED, self.output)
        with damage_told(), torch.no_grad():
            check_like(state["learned"], self.parameters, "learned")
            for name, parameter in self.parameters.items():
                parameter.copy_(state["learned"][name])
            self.updater.load_state(state["updater"])
            self.guard.load_state(state["skipped"])
            self.step = state["step"]
            restore_random_state(state["random"])

    def _read_student(self) -> tuple[OneStep | None, dict[str, tuple[Tensor, Tensor]]]:
        """The schedule of the one-step LoRaD for the sheets, and its factors by layer; none without one.

        Raises:
            OSError, ValueError: it is missing, damaged, for another network, or no one-step LoRaD; one line.
        """
        if not self.config.lorad:
            return None, {}
        path = mini.lorad_path() if self.config.lorad == "mini" else Path(hub.local(self.config.lorad))
        lorad = LoRaD.load(path)
        match = lorad.matched(self.network)
        match.check()
        if lorad.one_step is None:
            raise ValueError(f"{path}: lorad: this is an ordinary adapter; a one-step LoRaD is needed to show the student")
        return lorad.one_step, {layer: lorad.factors[key] for key, layer in match.paths.items()}
