"""Small distillations for the tests: a base, prompts, settings, and the script started as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from networks import write_base

from trainer.settings import fields as settings
from trainer.settings.distillation import TrainConfig

SCRIPT = Path(__file__).parents[2] / "trainer" / "train.py"
PROMPTS = "a cat\na dog\n\na red apple\na boat on the sea\n"


def small_base(folder: Path, architecture: str = "sd15") -> Path:
    """A diffusers folder of a small network with random weights."""
    return write_base(folder, architecture)[0]


def write_prompts(path: Path) -> Path:
    path.write_text(PROMPTS)
    return path


def values(base: Path, prompts: Path, output: Path, /, **changes: object) -> dict[str, object]:
    """Settings of a run of seconds."""
    return {
        "base": str(base), "prompts": str(prompts), "output": str(output), "steps": 6, "batch": 2, "student_rank": 4,
        "fake_rank": 2, "save_every": 2, "sheet_every": 100, "precision": "fp32", "ema": 0.9, "device": "cpu",
        "tensorboard": False, "warmup": 2, "sheet_teacher_steps": 2, **changes,
    }  # fmt: skip


def tiny(base: Path, prompts: Path, output: Path, /, **changes: object) -> TrainConfig:
    return settings.build(TrainConfig, values(base, prompts, output, **changes))


def command(base: Path, prompts: Path, output: Path, /, **changes: object) -> list[str]:
    """The script with these settings."""
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in
             values(base, prompts, output, **changes).items()]  # fmt: skip
    return [str(SCRIPT), *words]


def start(words: list[str], *launcher: str) -> subprocess.Popen:
    """Start a script in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
