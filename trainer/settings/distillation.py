"""The settings of a distillation: every name, unit and range in one place.

The defaults are the recipe of the paper (Wang et al., WaDi, 2026) at the scale of one small machine; the files in
``configs/`` hold what differs for each base.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from wadi_core.entries import check_file_name
from wadi_core.settings import INPUT_SCALES

from .fields import FilePath, setting

VERSION = 1
ADAPTERS = ("lorad", "lora", "dora", "oft", "full")
PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
LOSSES = ("vsd", "sid", "dmd")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "hellinger")
SCHEDULES = ("constant", "linear", "cosine")
BUCKET_STEP = 64  # pixels: what a U-Net can halve three times below its latents
SMALLEST_SIGNAL = 1e-6
LARGEST_RANK = 2560  # pairs of inputs of the largest layer of a Stable Diffusion: no adapter has more angles to tell apart
# Where a student starts, by name. An alpha_T_squared of 0 is the base's own at the timestep.
STARTS: dict[str, dict[str, int | float | str]] = {
    "wadi": {"timestep": 999, "alpha_T_squared": 0.0047, "input_scale": "one"},
    "625": {"timestep": 625, "alpha_T_squared": 0.0, "input_scale": "sigma"},  # SiD-LSG's
    "399": {"timestep": 399, "alpha_T_squared": 0.0, "input_scale": "one"},  # DMD2's for one step of SDXL
    "249": {"timestep": 249, "alpha_T_squared": 0.0, "input_scale": "one"},
}
STORAGE = ("fp32", "bf16", "fp16", "fp8", "nf4", "fp64")


def check_together(resolution: int, precision: str, base_weights: str, compile: bool) -> None:
    """Do nothing if these settings of any training go together.

    Raises:
        ValueError: they do not; one line.
    """
    if resolution % 8:
        raise ValueError(f"resolution: a multiple of 8 is expected, not {resolution}")
    if (precision == "fp64") != (base_weights == "fp64"):
        raise ValueError("precision: fp64 needs base_weights=fp64, and the other way round")
    if precision == "fp32" and base_weights in ("bf16", "fp16"):
        raise ValueError(f"base_weights: {base_weights} needs precision=bf16 or fp16, not fp32")
    if compile and base_weights in ("fp8", "nf4"):
        raise ValueError(f"compile: cannot be combined with base_weights={base_weights}")


def check_names(output: str, *files: str) -> None:
    """Do nothing if a run can write its files of these names at its end.

    Args:
        output: the folder.
        files: names without their ending.

    Raises:
        ValueError: it cannot; one line.
    """
    if not output.strip():
        raise ValueError("output: name the folder that the run writes to")
    for file in files:
        try:
            check_file_name(file, ".safetensors")
        except ValueError as error:
            raise ValueError(f"name: {error}") from None


@dataclass
class TrainConfig:
    """Settings of a distillation."""

    version: int = setting(VERSION, "version of these settings", low=VERSION, high=VERSION)

    # What is distilled, and into what.
    base: FilePath = setting("mini", "multi-step model: a diffusers folder, a .safetensors checkpoint, a hub id, or mini")
    base_config: FilePath = setting(
        "", "shape of an unknown checkpoint, or for an estimate: a diffusers folder, a hub id, sd15, sd21, wadi-mini or pixart"
    )
    prediction_type: str = setting("epsilon", "what the base predicts", choices=("epsilon", "v_prediction"))
    resolution: int = setting(0, "side of the pictures, a multiple of 8; 0: the base's own", "pixels", 0, 4096)
    buckets: tuple[str, ...] = setting((), "sizes such as 512x768, of which each step takes one; empty: the resolution alone")
    clip_skip: int = setting(
        0, "last layers of the CLIP text encoder that are left out; 1 is clip skip 2 of A1111", low=0, high=11
    )
    prompts: FilePath = setting(
        "mini", "file or folder of prompts; starter: those that ship with the trainer; mini: its scenes"
    )
    prompt_field: str = setting("", "key or column of the prompts; empty: detect it")
    embedding_cache: FilePath = setting("", "folder for cached prompt embeddings; empty: no cache")
    uncond_prob: float = setting(0.1, "share of the fake score's prompts that are replaced by the empty prompt", "share", 0, 1)
    output: FilePath = setting("runs/mini", "folder for all files of the run")
    name: str = setting("one-step", "name of the finished file, and its title")
    license: str = setting("", "licence of the finished file, as an SPDX name; empty: none stated")
    seed: int = setting(0, "random seed", low=0, high=2**63 - 1)

    # How long, and how much at a time.
    steps: int = setting(3000, "updates of the student", "steps", 1)
    batch: int = setting(32, "samples per update, over all processes", "samples", 1)
    micro_batch: int = setting(0, "samples per network call; 0: all of a process", "samples", 0)
    fake_updates: int = setting(1, "updates of the fake score per update of the student", low=1, high=10)
    fake_head_start: int = setting(0, "updates of the fake score before the student's first", "steps", 0)

    # The roles.
    adapter: str = setting("lorad", "kind of student: LoRaD, LoRA, DoRA or OFT (peft), or all weights", choices=ADAPTERS)
    fake_adapter: str = setting("lorad", "kind of fake score", choices=ADAPTERS)
    student_rank: int = setting(64, "rank of the student's adapter", low=1, high=LARGEST_RANK)
    fake_rank: int = setting(16, "rank of the fake score's adapter", low=1, high=LARGEST_RANK)
    start_from: FilePath = setting("", "LoRaD file or hub id of the same rank that the student starts from; empty: the base")

    # The recipe.
    student_lr: float = setting(1e-3, "learning rate of the student", low=0)
    fake_lr: float = setting(1e-2, "learning rate of the fake score", low=0)
    fake_lr_rule: str = setting(
        "same",
        "fake_lr of each of fake_updates: the same; sqrt or split divide it by the root of their number, or by it",
        choices=("same", "sqrt", "split"),
    )
    warmup: int = setting(20, "first steps, in which both learning rates rise to their values", "steps", 0)
    decay_steps: int = setting(0, "last steps, in which the learning rate falls to its end", "steps", 0)
    lr_schedule: str = setting("linear", "how the student's learning rate falls in decay_steps", choices=SCHEDULES)
    fake_lr_schedule: str = setting("constant", "how the fake score's learning rate falls in decay_steps", choices=SCHEDULES)
    lr_end: float = setting(0.1, "share of a learning rate that is left at its end", "share", 0, 1)
    student_beta1: float = setting(0.9, "beta1 of the student's AdamW, or momentum of its Muon", low=0, high=0.9999)
    fake_beta1: float = setting(0.9, "beta1 of the fake score's AdamW, or momentum of its Muon", low=0, high=0.9999)
    weight_decay: float = setting(0.0, "weight decay of both optimizers", low=0)
    max_grad_norm: float = setting(1.0, "norm to which gradients are clipped", low=1e-12)
    teacher_guidance: float = setting(1.5, "classifier-free guidance of the teacher; 1: none", low=0)
    fake_guidance: float = setting(1.5, "classifier-free guidance of the fake score; 1: none", low=0)
    loss: str = setting("vsd", "what moves the student: vsd as in WaDi, dmd, or sid through both networks", choices=LOSSES)
    normalize: bool = setting(
        False, "weigh each picture by its distance to the teacher's x0 in place of the loss's own weight, as DMD and SiD do"
    )
    sid_alpha: float = setting(1.0, "alpha of the loss sid", low=0, high=2)
    f_weight: str = setting(
        "reverse_kl",
        "f-divergence whose weight each picture's gradient gets; other than reverse_kl they need an adversary",
        choices=F_DIVERGENCES,
    )
    adversary: str = setting(
        "none",
        "opponent in the last steps: features compares with the teacher's pictures, real with others and is not image-free",
        choices=("none", "features", "real"),
    )
    adversary_steps: int = setting(200, "last steps, in which there is an adversary", "steps", 1)
    adversary_weight: float = setting(0.003, "weight of the adversary in the student's loss", low=0)
    adversary_lr: float = setting(1e-4, "learning rate of the adversary's head", low=0)
    adversary_pictures: FilePath = setting("", "folder of real pictures with captions for adversary=real; mini: its scenes")
    anchor_weight: float = setting(
        0.0, "weight of the anchor loss towards the teacher's coarse multi-step picture of the same noise; 0: off", low=0
    )
    anchor_end: float = setting(
        1.0, "share of anchor_weight left at the end; it falls with the student's learning rate", low=0, high=1
    )
    anchor_steps: int = setting(8, "guided sampling steps of the teacher for the anchor loss", "steps", 1, 1000)
    anchor_every: int = setting(4, "apply the anchor loss to every N-th sample", "samples", 1)
    anchor_cells: int = setting(4, "cells per side of the grid in which the anchor loss compares pictures", "cells", 1)
    timestep_low: int = setting(20, "smallest timestep of the VSD loss", low=0, high=999)
    timestep_high: int = setting(980, "largest timestep of the VSD loss", low=0, high=999)
    timestep_high_end: int = setting(
        0, "timestep_high falls to this value with the student's learning rate; 0: it stays", low=0, high=999
    )
    ema: float = setting(0.0, "decay of the student's moving average; 0: off", low=0, high=0.99999)
    start: str = setting(
        "",
        "start of the student by name: sets timestep, alpha_T_squared and input_scale; empty: as these say",
        choices=("", *STARTS),
    )
    alpha_T_squared: float = setting(
        0.0047, "share of the signal where the student starts; 0: the base's own at the timestep", low=0, high=0.999
    )
    timestep: int = setting(999, "timestep given to the student", low=0, high=999)
    input_scale: str = setting(
        "one", "what the noise is multiplied by that the student sees: one, or sigma_T", choices=INPUT_SCALES
    )

    # Memory and speed.
    device: str = setting("", "device such as cpu or cuda; empty: a GPU if there is one")
    precision: str = setting("bf16", "precision of the network calls; angles are always float32", choices=PRECISIONS)
    student_precision: str = setting(
        "", "fp32: exact calls of the student, as one step multiplies rounding by 15; empty: as precision", choices=("", "fp32")
    )
    base_weights: str = setting("fp32", "storage type of the frozen weights", choices=STORAGE)
    optimizer: str = setting(
        "adamw",
        "adamw8bit needs bitsandbytes and a GPU; muon moves all directions of a matrix equally",
        choices=("adamw", "adamw8bit", "muon"),
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in backward instead of storing them")
    recompute_rotation: bool = setting(False, "recompute rotated weights in backward instead of storing them")
    rotation_precision: str = setting(
        "fp32",
        "bf16: multiply the factors and their gradients in bf16, an error of 0.3 % of the angles; cosines stay float32",
        choices=("fp32", "bf16"),
    )
    compile_rotation: bool = setting(False, "compile the rotation of weights with torch.compile; needs a C++ compiler or a GPU")
    share_rotation: bool = setting(True, "keep a role's rotated weights for its further calls in the same step")
    attention: str = setting(
        "auto", "attention code; auto: plain for small latents on a CPU, else sdpa", choices=("auto", "sdpa", "plain", "sliced")
    )
    channels_last: bool = setting(False, "channels-last memory layout of the convolutions")
    compile: bool = setting(False, "compile the network with torch.compile")
    offload: bool = setting(True, "move the idle autoencoder and text encoder off the GPU")

    # Safety, and what there is to see.
    save_every: int = setting(100, "interval between checkpoints", "steps", 1)
    keep_last: int = setting(2, "number of newest checkpoints to keep", low=1)
    keep_every: int = setting(0, "keep checkpoints at multiples of this step permanently; 0: off", "steps", 0)
    resume: FilePath = setting(
        "latest", "latest: resume from the newest checkpoint in output; new: refuse if there is one; or a checkpoint's path"
    )
    save_lorad: bool = setting(True, "also write the student as a LoRaD with each checkpoint")
    max_skipped: int = setting(25, "consecutive updates with NaN or Inf before the run stops", low=1)
    log_every: int = setting(10, "interval between rows of losses", "steps", 1)
    sheet_every: int = setting(100, "interval between sample sheets with the sizes of the angles", "steps", 1)
    sheet_prompts: FilePath = setting("", "file of the sheets' prompts; empty: the first of the run's")
    sheet_teacher_steps: int = setting(25, "steps of the teacher's column in sheets; 0: no such column", "steps", 0, 1000)
    tensorboard: bool = setting(True, "also write event files if tensorboard is installed")
    wandb: str = setting(
        "off", "also log to Weights & Biases; offline: files for wandb sync", choices=("off", "offline", "online")
    )
    wandb_project: str = setting("wadi", "project of Weights & Biases")

    push_to_hub: str = setting("", "repository ORG/NAME that the finished student is sent to; a new one is private")
    webhook: str = setting("", "web address told of the end of the run, errors and better students; $NAME: of the environment")

    # How good the student is while it trains.
    evaluate_every: int = setting(0, "interval between evaluations of the student; 0: none", "steps", 0)
    evaluate_count: int = setting(500, "pictures of an evaluation", "pictures", 4)
    evaluate_prompts: FilePath = setting("", "file of their prompts; empty: the first of the run's, or mini's held-out scenes")
    reference: FilePath = setting(
        "",
        "real pictures for FID and KID: a folder, statistics of evaluate.py, .npz, or mini; empty: none, but for mini",
    )
    extractor: str = setting(
        "", "what looks at them: inception, mini, or MODULE:FUNCTION; empty: mini for mini, else inception"
    )
    inception: FilePath = setting("", "file with Inception's weights; empty: torch hub's folder")
    clip_model: FilePath = setting("", "folder of a CLIP model for the CLIP score; empty: none")
    best_by: str = setting("", "figure by which the best student is kept; empty: fid, or else clip_score")
    patience: int = setting(0, "evaluations without a better figure that end the run; 0: off", low=0)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each bucket.

        Raises:
            ValueError: one is no size that a network can draw; one line.
        """
        found = []
        for text in self.buckets:
            width, sign, height = text.lower().partition("x")
            if not (sign and width.strip().isdecimal() and height.strip().isdecimal()):
                raise ValueError(f"buckets: WIDTHxHEIGHT is expected, as in [512x768, 768x512], not {text[:40]!r}")
            size = int(width), int(height)
            if any(side % BUCKET_STEP or not BUCKET_STEP <= side <= 4096 for side in size):
                raise ValueError(f"buckets: multiples of {BUCKET_STEP} up to 4096 are expected, not {text[:40]}")
            found.append(size)
        return found

    @property
    def exact_weights(self) -> bool:
        """Whether some calls are made without autocast, or copies are trained: no frozen weight may be rounded beforehand."""
        return bool(self.student_precision) or "full" in (self.adapter, self.fake_adapter)

    def __post_init__(self) -> None:
        self._take_start()
        if 0 < self.alpha_T_squared < SMALLEST_SIGNAL:
            raise ValueError(f"alpha_T_squared: 0, or at least {SMALLEST_SIGNAL:g} is expected, not {self.alpha_T_squared:g}")
        if self.timestep_low > self.timestep_high:
            raise ValueError(f"timestep_low: at most timestep_high ({self.timestep_high}) is expected, not {self.timestep_low}")
        if self.timestep_high_end and not self.timestep_low <= self.timestep_high_end <= self.timestep_high:
            raise ValueError(
                f"timestep_high_end: 0, or {self.timestep_low} to {self.timestep_high} (timestep_low and timestep_high) is "
                f"expected, not {self.timestep_high_end}"
            )
        for name, falls in (("timestep_high_end", self.timestep_high_end > 0), ("anchor_end", self.anchor_end < 1)):
            if falls and not self.decay_steps:
                raise ValueError(f"{name}: it is reached over decay_steps, which has to be above 0")
        self._check_adversary()
        if self.sizes and self.adversary == "real":
            raise ValueError("buckets: adversary=real compares with pictures of one size, so it cannot be combined with them")
        if self.push_to_hub and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.push_to_hub, re.ASCII):
            raise ValueError(f"push_to_hub: ORG/NAME is expected, not {self.push_to_hub[:80]!r}")
        if self.patience and not self.evaluate_every:
            raise ValueError("patience: it counts evaluations, and evaluate_every is 0")
        check_together(self.resolution, self.precision, self.base_weights, self.compile)
        if self.base_weights in ("fp8", "nf4"):
            for kind, what in (
                ("full", "training all weights (full)"),
                ("dora", "dora, which needs the weights' norms"),
                ("oft", "oft"),
            ):
                if kind in (self.adapter, self.fake_adapter):
                    raise ValueError(f"base_weights: {self.base_weights} cannot be combined with {what}")
        if self.student_precision and self.base_weights != "fp32":
            raise ValueError(f"student_precision: fp32 needs base_weights=fp32, not {self.base_weights}")
        if self.start_from and self.adapter != "lorad":
            raise ValueError(f"start_from: a LoRaD can only begin a student that is one, not adapter: {self.adapter}")
        check_names(self.output, self.name)

    def _take_start(self) -> None:
        """What the named start stands for.

        Raises:
            ValueError: one of its settings is given too, and differs; one line.
        """
        for name, value in STARTS.get(self.start, {}).items():
            given, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if given not in (default, value):
                raise ValueError(
                    f"{name}: start={self.start} sets it to {value}, and {given} is given: leave out one of the two"
                )
            setattr(self, name, value)

    def _check_adversary(self) -> None:
        if self.adversary == "real" and not self.adversary_pictures:
            raise ValueError("adversary: real needs pictures to compare with: adversary_pictures=FOLDER")
        if self.adversary_pictures and self.adversary != "real":
            raise ValueError("adversary_pictures: they are looked at with adversary=real only")
        if self.f_weight != "reverse_kl" and self.adversary == "none":
            raise ValueError(f"f_weight: {self.f_weight} needs an adversary, whose opinion it weighs by: adversary=features")
        if self.adversary != "none" and self.compile:
            raise ValueError("adversary: it looks inside the network, which cannot be combined with compile=true")
