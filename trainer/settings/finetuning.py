"""The settings of learning from a few pictures: a word (``invert.py``), or a subject or style (``personalize.py``).

What means the same as in a distillation is taken from there, with its range.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from .distillation import LARGEST_RANK, VERSION, TrainConfig, check_names, check_together
from .fields import FilePath, setting

_SHARED = {field.name: field for field in dataclasses.fields(TrainConfig)}


def same(name: str, default: Any = None) -> Any:
    """A field as a distillation has it, with another default where one is given."""
    field = _SHARED[name]
    return dataclasses.field(default=field.default if default is None else default, metadata=field.metadata)


@dataclass
class FinetuningConfig:
    """Settings that both kinds of finetuning share."""

    version: int = setting(VERSION, "version of these settings", low=VERSION, high=VERSION)

    base: FilePath = same("base")
    base_config: FilePath = same("base_config")
    prediction_type: str = same("prediction_type")
    resolution: int = same("resolution")
    pictures: FilePath = setting(
        "", "folder of training pictures; a .txt or .caption beside a picture holds its captions, one per line"
    )
    templates: tuple[str, ...] = setting((), "captions for pictures without their own")
    lorad: FilePath = setting("", "one-step LoRaD, for the student's sheets and for anchor_weight; mini: wadi-mini's")
    output: FilePath = same("output", "runs/finetuning")
    name: str = setting("finetuned", "name of the finished file, and its title")
    license: str = same("license")
    seed: int = same("seed")

    steps: int = setting(1000, "updates", "steps", 1)
    batch: int = setting(8, "samples per update", "samples", 1)
    micro_batch: int = setting(0, "samples per network call; 0: all", "samples", 0)
    lr: float = setting(2e-3, "learning rate", low=0)
    warmup: int = setting(0, "first steps, in which the learning rate rises to its value", "steps", 0)
    decay_steps: int = setting(0, "last steps, in which the learning rate falls to a tenth", "steps", 0)
    beta1: float = setting(0.9, "beta1 of AdamW", low=0, high=0.9999)
    weight_decay: float = setting(0.0, "weight decay of AdamW", low=0)
    max_grad_norm: float = same("max_grad_norm")
    importance: float = setting(0.0, "0 samples timesteps evenly, 0.5 prefers large ones as in ReVersion", "share", 0, 1)
    high_noise_fraction: float = setting(
        0.0, "share of timesteps drawn from 900 to 999, where a one-step student is sampled", "share", 0, 1
    )
    weight_cap: float = setting(1.0, "upper limit of the loss weight 1 / alpha^2; 1: unweighted", low=1)
    anchor_weight: float = setting(
        0.0, "weight of the anchor loss towards the teacher's picture of the same noise; 0: off", low=0
    )
    anchor_last: int = setting(0, "last steps, in which the anchor loss applies; 0: all steps", "steps", 0)
    anchor_every: int = same("anchor_every")
    anchor_steps: int = same("anchor_steps")
    anchor_guidance: float = setting(3.0, "classifier-free guidance of the teacher for the anchor loss", low=0)
    anchor_cells: int = same("anchor_cells", 8)
    anchor_prompts: tuple[str, ...] = setting((), "prompts of the anchor loss; none: captions of the training pictures")

    device: str = same("device")
    precision: str = setting("bf16", "precision of the network calls", choices=_SHARED["precision"].metadata["meaning"].choices)
    base_weights: str = same("base_weights")
    optimizer: str = same("optimizer")
    gradient_checkpointing: bool = same("gradient_checkpointing")
    recompute_rotation: bool = same("recompute_rotation")
    rotation_precision: str = same("rotation_precision")
    compile_rotation: bool = same("compile_rotation")
    attention: str = same("attention")
    channels_last: bool = same("channels_last")
    compile: bool = same("compile")
    offload: bool = same("offload")

    save_every: int = same("save_every")
    keep_last: int = same("keep_last")
    keep_every: int = same("keep_every")
    resume: FilePath = same("resume")
    max_skipped: int = same("max_skipped")
    log_every: int = same("log_every")
    sheet_every: int = same("sheet_every", 250)
    sheet_prompts: tuple[str, ...] = setting((), "prompts of the sheets; none: captions of the training pictures")
    sheet_steps: int = setting(25, "sampling steps of the teacher on the sheets", "steps", 1)
    sheet_guidance: float = setting(3.0, "classifier-free guidance of the teacher on the sheets", low=0)
    tensorboard: bool = same("tensorboard")

    def __post_init__(self) -> None:
        check_together(self.resolution, self.precision, self.base_weights, self.compile)
        if self.anchor_weight and not self.lorad:
            raise ValueError("anchor_weight: the one-step LoRaD is missing, which it anchors: lorad=PATH")
        # ComfyUI takes what follows a bracket for the next word of a prompt.
        if any(sign in self.name for sign in "<[ "):
            raise ValueError(f"name: a file name without folders, spaces and brackets is expected, not {self.name!r}")
        check_names(self.output, *self.files())

    def files(self) -> list[str]:
        """Names of the files that the run writes at its end, without their ending."""
        return [self.name]


@dataclass
class InvertConfig(FinetuningConfig):
    """Settings of a textual or relation inversion."""

    adapter: ClassVar[str] = "embedding"

    tokens: tuple[str, ...] = setting(("<R>",), "new words, which the captions contain")
    vectors: int = setting(1, "vectors of each word: how many tokens of a prompt it takes", low=1, high=32)
    initial: tuple[str, ...] = setting(("and",), "known words whose vectors they start from: one for all, or one for each")
    steering: float = setting(0.0, "weight of the steering loss, which a relation needs; 0.01 in ReVersion", low=0)
    steering_temperature: float = setting(0.07, "temperature of the steering loss", low=1e-3, high=10)
    positive: tuple[str, ...] = setting((), "words similar to the new one; none: a list of prepositions")
    positives: int = setting(4, "number of these words drawn per sample", low=1)

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("tokens: name the word to learn, as in tokens=['<R>']")
        super().__post_init__()
        if any(not token.strip() or len(token.split()) > 1 for token in self.tokens):
            raise ValueError(f"tokens: words without spaces are expected, not {list(self.tokens)}")
        same = [file for file in self.files() if [other.lower() for other in self.files()].count(file.lower()) > 1]
        if same:
            raise ValueError(f"tokens: {' and '.join(self.tokens)} would be written to one file, {same[0]}.safetensors")
        if len(self.initial) not in (1, len(self.tokens)):
            raise ValueError(f"initial: one word, or {len(self.tokens)} as there are tokens, not {len(self.initial)}")

    def files(self) -> list[str]:
        # One for each word: other programs read no more than one word from a file.
        if len(self.tokens) == 1:
            return [self.name]
        words = [re.sub(r"\W+", "-", token).strip("-") or str(number) for number, token in enumerate(self.tokens)]
        return [f"{self.name}-{word}" for word in words]


@dataclass
class PersonalizeConfig(FinetuningConfig):
    """Settings of learning a subject, a style or, beside its word, a relation."""

    adapter: str = setting("lorad", "kind of adapter: LoRaD, or LoRA (peft)", choices=("lorad", "lora"))
    rank: int = setting(16, "rank of the adapter", low=1, high=LARGEST_RANK)
    layers: tuple[str, ...] = setting((), "parts of the names of layers to adapt, such as down_blocks*attn1; none: all")
    lr: float = setting(1e-3, "learning rate", low=0)
    mirror: bool = setting(False, "train on mirrored pictures as well")
    embeddings: tuple[FilePath, ...] = setting((), "files of learned words that captions contain")
    class_prompts: tuple[str, ...] = setting(
        (), "prompts that the teacher samples for prior preservation, such as: a photo of a dog"
    )
    prior_count: int = setting(0, "pictures that the teacher samples of these before training; 0: none", low=0)
    prior_weight: float = setting(1.0, "weight of the loss on these pictures", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.class_prompts) != bool(self.prior_count):
            raise ValueError("class_prompts and prior_count go together, as in class_prompts=['a dog'] prior_count=100")
        if 0 < self.prior_count < len(self.class_prompts):
            raise ValueError(f"prior_count: at least {len(self.class_prompts)} are needed, one for each of class_prompts")
