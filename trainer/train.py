"""Distil a multi-step model into a one-step LoRaD with VSD.

    python trainer/train.py --config trainer/configs/sd15.yaml base=PATH prompts=FILE [key=value ...]
    accelerate launch trainer/train.py --config ...                      on several GPUs, or several processes
    python trainer/train.py --config ... --print-config                  all settings with their meanings, and no more
    python trainer/train.py --config ... --dry-run                       parameters, memory and steps, and no more

Stop it at any time (Ctrl-C, SIGTERM, a power cut): started again with the same output folder it goes on from the
newest checkpoint, bit for bit as if it had never stopped. Exit status: 0 at its end or when it was asked to stop, 2 for
bad usage, 3 if losses or gradients were NaN or Inf too often, 1 for anything else, with one line that says what.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # advice to developers, in the middle of a bar
        os.environ.setdefault(name, "error")

from trainer import config as settings
from trainer.schema import TrainConfig

DIVERGED = 3  # exit status


def main() -> int:
    # Read once, when diffusers is imported: nothing is ever fetched.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = settings.parser(__doc__.splitlines()[0])
    parser.add_argument("--print-config", action="store_true", help="print all settings and what they mean, then leave")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory and steps, then leave")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("wadi").setLevel(logging.INFO)
    try:
        config = settings.load(TrainConfig, arguments.config, arguments.overrides)
        if arguments.print_config:
            sys.stdout.write(settings.as_yaml(config, explain=True))
        elif arguments.dry_run:
            from trainer.estimate import estimate

            sys.stdout.write(f"{estimate(config)}\n")
        else:
            from trainer.session import train

            train(config)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; started again it goes on from its newest checkpoint, if there is one\n")
        return 130
    except (ValueError, OSError) as error:
        if arguments.debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return DIVERGED if type(error).__name__ == "Diverged" else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
