"""The settings of a distillation: every name, unit and range in one place.

The defaults are the recipe of the paper (Wang et al., WaDi, 2026) at the scale of one small machine; the files in
``configs/`` hold what differs for each base.
"""

from __future__ import annotations

from dataclasses import dataclass

from .fields import setting

VERSION = 1
ADAPTERS = ("lorad", "lora", "dora", "full")
PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
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


@dataclass
class TrainConfig:
    """Settings of a distillation."""

    version: int = setting(VERSION, "of these settings", low=VERSION, high=VERSION)

    # What is distilled, and into what.
    base: str = setting("mini", "the multi-step model: a diffusers folder, a .safetensors checkpoint, a hub id, or mini")
    base_config: str = setting("", "for a checkpoint of unknown shape: a diffusers folder with its settings")
    prediction_type: str = setting("epsilon", "what the base returns", choices=("epsilon", "v_prediction"))
    resolution: int = setting(0, "side of the pictures, a multiple of 8; 0 is the base's own", "pixels", 0, 4096)
    prompts: str = setting("mini", "a file or folder of prompts, starter for those that ship, or mini for its scenes")
    prompt_field: str = setting("", "key or column that holds the prompts; empty finds it")
    embedding_cache: str = setting("", "a folder that keeps the embeddings of prompts; empty keeps none")
    null_share: float = setting(0.1, "of the fake score's prompts are empty", "share", 0, 1)
    output: str = setting("runs/mini", "folder of everything that the run writes")
    name: str = setting("one-step", "of the finished file, and its title")
    license: str = setting("", "of the finished file, as an SPDX name; empty says nothing")
    seed: int = setting(0, "of all random numbers", low=0, high=2**63 - 1)

    # How long, and how much at a time.
    steps: int = setting(3000, "updates of the student", "steps", 1)
    batch: int = setting(32, "samples of one update, over all processes", "samples", 1)
    micro_batch: int = setting(0, "samples of one network call; 0 is all that a process has", "samples", 0)
    fake_updates: int = setting(1, "updates of the fake score for one of the student", low=1)
    fake_head_start: int = setting(0, "updates of the fake score before the student's first", "steps", 0)

    # The roles.
    adapter: str = setting("lorad", "what the student is: LoRaD, LoRA or DoRA (peft), or all weights", choices=ADAPTERS)
    fake_adapter: str = setting("lorad", "what the fake score is", choices=ADAPTERS)
    student_rank: int = setting(64, "of the student's adapter", low=1)
    fake_rank: int = setting(16, "of the fake score's adapter", low=1)
    start_from: str = setting("", "a LoRaD file that the student begins with, of its rank; empty begins with the base")

    # The recipe.
    student_rate: float = setting(1e-3, "learning rate of the student", low=0)
    fake_rate: float = setting(1e-2, "learning rate of the fake score", low=0)
    warmup: int = setting(20, "in which both rates rise to their values", "steps", 0)
    decay_steps: int = setting(0, "the student's rate falls to a tenth over this many last steps", "steps", 0)
    student_beta1: float = setting(0.9, "of the student's AdamW, or its momentum of Muon", low=0, high=0.9999)
    fake_beta1: float = setting(0.9, "of the fake score's AdamW, or its momentum of Muon", low=0, high=0.9999)
    weight_decay: float = setting(0.0, "of both", low=0)
    clip: float = setting(1.0, "largest norm of a gradient", low=1e-12)
    teacher_guidance: float = setting(1.5, "classifier-free guidance on the teacher; 1 is none", low=0)
    fake_guidance: float = setting(1.5, "classifier-free guidance on the fake score; 1 is none", low=0)
    normalize: bool = setting(False, "divide each picture's gradient by its distance to the teacher's x0, as DMD does")
    anchor_weight: float = setting(0.0, "pull towards the coarse picture that the teacher draws of the same noise in "
                                   "several steps; 0 is none", low=0)  # fmt: skip
    anchor_end: float = setting(1.0, "share of anchor_weight that is left at the end; it falls as the student's rate falls",
                                low=0, high=1)  # fmt: skip
    anchor_steps: int = setting(8, "of the teacher for such a picture, with its guidance", "steps", 1, 1000)
    anchor_every: int = setting(4, "so many-th sample is held to one", "samples", 1)
    anchor_cells: int = setting(4, "a side, in which they are compared", "cells", 1)
    timestep_low: int = setting(20, "smallest timestep at which the student's pictures are judged", low=0, high=999)
    timestep_high: int = setting(980, "largest one", low=0, high=999)
    timestep_high_end: int = setting(0, "timestep_high falls to it as the student's rate falls; 0 leaves it", low=0, high=999)
    ema: float = setting(0.0, "decay of the student's moving average; 0 switches it off", low=0, high=0.99999)
    alpha_T_squared: float = setting(0.0047, "share of the signal where the student starts", low=1e-6, high=0.999)
    timestep: int = setting(999, "that the student is told", low=0, high=999)

    # Memory and speed.
    device: str = setting("", "such as cpu or cuda; empty takes a GPU if there is one")
    precision: str = setting("bf16", "of the network calls; angles are float32 in any case", choices=PRECISIONS)
    student_precision: str = setting("", "fp32 keeps the student's own calls exact: one step multiplies rounding by 15, "
                                     "which is a grain in bf16; empty is as precision", choices=("", "fp32"))  # fmt: skip
    base_weights: str = setting("fp32", "how the frozen weights are stored", choices=STORAGE)
    optimizer: str = setting("adamw", "adamw8bit needs bitsandbytes and a GPU; muon moves all directions of a matrix alike",
                             choices=("adamw", "adamw8bit", "muon"))  # fmt: skip
    gradient_checkpointing: bool = setting(False, "compute activations again in backward instead of keeping them")
    recompute_rotation: bool = setting(False, "rotate weights again in backward instead of keeping them")
    share_rotation: bool = setting(True, "keep a role's rotated weights for its further calls in the same step")
    attention: str = setting("auto", "auto is plain for small latents on a CPU, else sdpa",
                             choices=("auto", "sdpa", "plain", "sliced"))  # fmt: skip
    channels_last: bool = setting(False, "memory layout of the convolutions")
    compile: bool = setting(False, "torch.compile the network")
    offload: bool = setting(True, "keep autoencoder and text encoder off the GPU while they are idle")

    # Safety, and what there is to see.
    save_every: int = setting(100, "a checkpoint", "steps", 1)
    keep: int = setting(2, "newest checkpoints that stay", low=1)
    keep_every: int = setting(0, "checkpoints of these multiples stay for good; 0 is none", "steps", 0)
    resume: str = setting("latest", "latest goes on from the newest checkpoint of the output folder; new refuses to "
                          "start where there are any; or the path of a checkpoint")  # fmt: skip
    max_skipped: int = setting(25, "updates in a row with NaN or Inf before the run stops", low=1)
    log_every: int = setting(10, "a row of losses", "steps", 1)
    sheet_every: int = setting(100, "a sheet of samples, and the sizes of the angles", "steps", 1)
    tensorboard: bool = setting(True, "write event files as well, if tensorboard is installed")

    @property
    def exact_weights(self) -> bool:
        """Whether some calls are made without autocast, or copies are trained: no frozen weight may be rounded beforehand."""
        return bool(self.student_precision) or "full" in (self.adapter, self.fake_adapter)

    def __post_init__(self) -> None:
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
        check_together(self.resolution, self.precision, self.base_weights, self.compile)
        if self.base_weights in ("fp8", "nf4"):
            for kind, what in (("full", "training all weights (full)"), ("dora", "dora, which needs the weights' norms")):
                if kind in (self.adapter, self.fake_adapter):
                    raise ValueError(f"base_weights: {self.base_weights} cannot be combined with {what}")
        if self.student_precision and self.base_weights != "fp32":
            raise ValueError(f"student_precision: fp32 needs base_weights=fp32, not {self.base_weights}")
        if self.start_from and self.adapter != "lorad":
            raise ValueError(f"start_from: a LoRaD can only begin a student that is one, not adapter: {self.adapter}")
        if any(sign in self.name for sign in "/\\") or not self.name.strip(". "):
            raise ValueError(f"name: a file name without folders is expected, not {self.name!r}")
