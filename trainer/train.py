"""Distil a multi-step model into a one-step LoRaD with VSD.

    python trainer/train.py --config trainer/configs/sd15.yaml base=PATH prompts=FILE [key=value ...]
    accelerate launch trainer/train.py --config ...                      on several GPUs, or several processes
    python trainer/train.py --config ... --print-config                  all settings with their meanings, and no more
    python trainer/train.py --config ... --dry-run                       parameters, memory and steps, and no more

Stop it at any time (Ctrl-C, SIGTERM, a power cut): started again with the same output folder it goes on from the
newest checkpoint, bit for bit as if it had never stopped. Exit status: 0 at its end, when it was asked to stop and has
saved, and where a run is finished already; 130 (Ctrl-C) or 143 (SIGTERM) when a second signal ended it without saving,
or a first one before it trained; 2 for bad usage, 3 if losses or gradients were NaN or Inf too often, 1 for anything
else, with one line that says what.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: the package's folder is this file's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "trainer"
    from wadi_core.packages import TRAINER, require

    require("train", *TRAINER)

from .settings import cli
from .settings.distillation import TrainConfig


def estimated(config: TrainConfig) -> object:
    """What a run with these settings will need."""
    from .distill.estimate import estimate

    return estimate(config)


def distil(config: TrainConfig) -> None:
    """A whole run."""
    from .distill.session import train

    train(config)


def main() -> int:
    return cli.main(__doc__, TrainConfig, distil, estimated)


if __name__ == "__main__":
    sys.exit(main())
