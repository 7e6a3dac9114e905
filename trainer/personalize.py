"""Learn a subject or a style from a few pictures, as a LoRaD or a LoRA (DreamBooth, Ruiz et al., 2023).

    python trainer/personalize.py --config trainer/configs/personalize-sd15.yaml base=PATH pictures=FOLDER
    python trainer/personalize.py --config ... --print-config            all settings with their meanings, and no more

The adapter is learned on the multi-step base and plugged into the one-step student: its angles are added to those of
the one-step LoRaD. Its file is that of an ordinary adapter, which says nothing of sampling.
Stop it at any time: started again with the same output folder it goes on bit for bit as if it had never stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the package's folder is this file's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "trainer"
    from wadi_core.packages import TRAINER, require

    require("train", *TRAINER)

import torch
from torch import Tensor, nn

from wadi_core.lorad import LoRaD, Metadata
from wadi_core.lorad.convert import LoRA
from wadi_core.lorad.layers import student_layers
from wadi_core.pictures import thumbnail

from .data.random_draws import shuffled
from .data.tensor_cache import Store
from .engine.processes import Processes
from .finetune.finetuning import PRIOR, ROLE, TEACHER, FinetuningRun
from .finetune.session import learn
from .models.adapters import LoRaDAdapter, PeftAdapter
from .models.base_models import StableDiffusion
from .models.condition import Condition
from .settings import cli
from .settings.finetuning import PersonalizeConfig

if TYPE_CHECKING:
    from PIL.Image import Image

PRIOR_SEED = 1 << 40  # far from those of sheets


class Personalization(FinetuningRun):
    """An adapter on the layers that the one-step student's takes, or some of these, learned on the multi-step base."""

    config: PersonalizeConfig

    def __init__(self, config: PersonalizeConfig, processes: Processes | None = None) -> None:
        super().__init__(config, processes)
        self._told: dict[str, Condition] = {}
        self.prior = self._draw_prior() if config.prior_count else None

    def prepare(self) -> list[str]:
        config, architecture = self.config, self.model.architecture
        if config.embeddings:
            if not isinstance(self.model, StableDiffusion):
                raise ValueError(f"embeddings: words are for CLIP's text encoder, which {architecture} has not")
            self.model.pipeline.set_embeddings(config.embeddings)
        self.layers = chosen_layers(student_layers(self.network, architecture), config.layers)
        if config.adapter == "lora":
            return []
        start = torch.Generator().manual_seed(config.seed)
        lorad = LoRaD.create(self.network, config.rank, architecture, self.layers, start)
        self.start = {path: lorad.factors[key] for key, path in lorad.matched(self.network).paths.items()}
        return list(self.start)

    @property
    def words(self) -> tuple[str, ...]:
        known = self.model.pipeline.vocabulary.learned if isinstance(self.model, StableDiffusion) else ()
        return tuple(word.sha256 for word in known)

    def attach(self) -> dict[str, nn.Parameter]:
        config = self.config
        if config.adapter == "lora":
            self.adapter = PeftAdapter(ROLE, self.network, self.layers, config.rank, config.seed)
        else:
            share = not config.compile
            self.adapter = LoRaDAdapter(ROLE, self.network, self.start, share, config.recompute_rotation)
            del self.start
        return self.adapter.parameters

    def activate(self, who: str) -> None:
        super().activate(who)
        if isinstance(self.adapter, PeftAdapter):
            self.adapter.switch(True)

    def condition(self, captions: Sequence[str]) -> Condition:
        # There are few of them: each is encoded once.
        for caption in dict.fromkeys(captions):
            if caption not in self._told:
                self._told[caption] = self.model.encode([caption])
        return joined([self._told[caption] for caption in captions])

    def more_loss(self, captions: Sequence[str], numbers: range) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The loss on pictures of the classes: what the teacher would have drawn is to stay as it is."""
        if self.prior is None:
            return 0.0, {}
        config, drawn, chosen = self.config, self.draw(PRIOR, numbers), []
        for number in numbers:
            time, place = divmod(number, len(self.prior))
            chosen.append(int(shuffled(len(self.prior), config.seed, PRIOR, time)[place]))
        x0 = self.prior[chosen].to(self.device, self.dtype)
        told = self.condition([self._class_prompt(row) for row in chosen])
        loss = self.denoising_loss(x0, drawn.eps, drawn.t, told).mean()
        return config.prior_weight * loss, {"prior": loss.detach()}

    def _class_prompt(self, row: int) -> str:
        """What a row of the prior shows."""
        return self.config.class_prompts[row % len(self.config.class_prompts)]

    @torch.no_grad()
    def _draw_prior(self) -> Tensor:
        """Clean latents (n, 4, h, w) of the classes, by the teacher without the adapter; kept in the output folder."""
        config = self.config
        recipe = {"base": self.model.base_sha256, "prompts": config.class_prompts, "seed": config.seed, "size": self.size}
        recipe |= {"steps": config.sheet_steps, "guidance": config.sheet_guidance, "precision": config.precision}
        store = Store(self.output, "prior", recipe)

        def make(rows: range) -> Tensor:
            with self.generator(TEACHER) as generator:
                self.adapter.switch(False)
                first = PRIOR_SEED + config.seed
                made = [generator.latents([self._class_prompt(row)], [first + row]).float().cpu() for row in rows]
            return torch.cat(made)

        return store.collect("latents", config.prior_count, make)

    def write(self, folder: Path, picture: Image) -> list[Path]:
        config, path = self.config, folder / f"{self.config.name}.safetensors"
        width, height = self.size
        metadata = Metadata(
            architecture=self.model.architecture,
            prediction_type=config.prediction_type,
            base_sha256=self.model.base_sha256,
            title=config.name,
            resolution=f"{width}x{height}",
            license=config.license or None,
            thumbnail=thumbnail(picture),
            extra={
                "ss_steps": str(self.step),
                "ss_seed": str(config.seed),
                "ss_learning_rate": f"{config.lr:g}",
                "ss_total_batch_size": str(config.batch),
                "ss_mixed_precision": config.precision,
            },
        )
        if isinstance(self.adapter, LoRaDAdapter):
            self.adapter.lorad(metadata).save(path)
        else:
            LoRA(lora_factors(self.adapter), {}, metadata).save(path)
        return [path]


def chosen_layers(paths: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Those of some layers whose names hold one of the parts, in which * is anything; without parts all.

    Raises:
        ValueError: a part is in no name; one line.
    """
    found = {part: [path for path in paths if fnmatchcase(path, f"*{part}*")] for part in parts or ("",)}
    for part, those in found.items():
        if not those:
            begin = ", ".join(dict.fromkeys(path.partition(".")[0] for path in paths))
            raise ValueError(f"layers: {part!r} is in no layer's name; they begin with {begin}")
    return [path for path in paths if any(path in those for those in found.values())]


def joined(rows: Sequence[Condition]) -> Condition:
    """Conditions one after the other."""
    masks = [row.mask for row in rows if row.mask is not None]
    return Condition(torch.cat([row.text for row in rows]), torch.cat(masks) if masks else None)


def lora_factors(adapter: PeftAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of a layer -> (up (out, rank), down (rank, in)), as float16."""
    found = {}
    for path in adapter.layers:
        up, down = (adapter.parameters[f"{path}.lora_{part}"].detach() for part in "BA")
        found[path] = (up.to("cpu", torch.float16).contiguous(), down.to("cpu", torch.float16).contiguous())
    return found


def personalize(config: PersonalizeConfig) -> Path | None:
    """A whole run; returns the adapter's file, None where it was stopped.

    Raises:
        OSError, ValueError: with one line.
    """
    return learn(config, Personalization)


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, PersonalizeConfig, personalize))
