"""Nothing is lost: runs that are killed or stopped at random moments end with the bits of one that never was.

    python benchmarks/robustness/interruptions.py                               200 SIGKILLs and 50 SIGINTs, about half an hour
    python benchmarks/robustness/interruptions.py --kills 6 --interrupts 2      a look at whether it works

Short runs of a small network, distillations and personalisations in turn. Each is interrupted again and again, while it loads,
trains, writes a checkpoint or draws, started again with the same settings until it is at its end, and compared with an
uninterrupted one: every tensor and number of the last checkpoint, and the finished file. Every second SIGINT is followed
by another one within half a second, which leaves at once. What has been tried is kept in ``interruptions.json``: started
again, the script goes on from there.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # noqa: F401  children begin with them imported
from matplotlib import pyplot  # noqa: F401
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

from benchmarks import report
from benchmarks.speed import training
from trainer import personalize
from trainer.distill import session
from trainer.engine.checkpoints import Checkpoints, read_checkpoint
from trainer.mini import scenes, teacher  # noqa: F401
from trainer.settings import cli
from trainer.settings.distillation import TrainConfig
from trainer.settings.finetuning import PersonalizeConfig
from wadi_core.files import one_line
from wadi_core.output import take_any_text

logger = logging.getLogger("benchmark")

ROOT = Path(__file__).resolve().parents[2]
EACH = 12  # interruptions of one run, at most
FINISHED = "finished.safetensors"
STEPS = 24
SHARED = ("device=cpu", "precision=fp32", "batch=2", "micro_batch=1", "save_every=2", "tensorboard=false")
SHARED += ("name=finished", "log_every=5", "sheet_every=9", "resolution=64")
KINDS = {
    "distillation": ("mini.yaml", ("ema=0.9", "student_rank=8", "fake_adapter=lorad", "fake_rank=4", "anchor_steps=2")),
    "personalisation": ("personalize-mini.yaml", ("sheet_steps=2", "anchor_last=8", "anchor_steps=2")),
}
WAYS = {"SIGKILL": signal.SIGKILL, "SIGINT": signal.SIGINT}
STATUS = {"SIGKILL": (-signal.SIGKILL,), "SIGINT": (0, 128 + signal.SIGINT)}


def work(kind: str, words: Sequence[str], started: Any) -> None:
    """A run in this process, as a command line starts it."""
    status = 128 + signal.SIGINT
    try:
        started.set()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        sys.argv = [kind, "--config", str(ROOT / "trainer" / "configs" / KINDS[kind][0]), *words]
        if kind == "distillation":
            status = cli.main("A distillation.", TrainConfig, session.train)
        else:
            status = cli.main("A personalisation.", PersonalizeConfig, personalize.personalize)
    except KeyboardInterrupt:  # before the script was ready for it, or after its end
        pass
    os._exit(status)


@contextmanager
def _search_path(folder: str) -> Iterator[None]:
    """Puts a folder before Python's search path for processes that begin here: their server has the environment alone."""
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = folder if not kept else os.pathsep.join([folder, kept])
    try:
        yield
    finally:
        if kept is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = kept


class Runs:
    """Runs of one kind in one folder.

    Args:
        place: the folder of all runs.
        kind: of :data:`KINDS`.
    """

    def __init__(self, place: Path, kind: str) -> None:
        self.place, self.kind = place / kind, kind
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["benchmarks.robustness.interruptions"])
        base = training.prepare(place / "base", "small")
        self.words = [*SHARED, *KINDS[kind][1], f"base={base}", f"steps={STEPS}"]
        if kind == "distillation":
            self.words.append(f"prompts={base / 'prompts.txt'}")
        else:
            student = place / "distillation" / "straight" / FINISHED
            self.words += [f"pictures={write_pictures(place / 'pictures')}", f"lorad={student}"]

    def begin(self, name: str) -> BaseProcess:
        """Start a run, or let it go on; it is in the trainer when this returns."""
        from benchmarks.robustness import interruptions  # as the processes know it, not as the script that is running

        started = self.processes.Event()
        words = [*self.words, f"output={self.place / name}"]
        process = self.processes.Process(target=interruptions.work, args=(self.kind, words, started))
        with _search_path(str(ROOT)):
            process.start()
        started.wait()
        return process

    def newest(self, name: str) -> str:
        """The name of a run's newest checkpoint, empty without one."""
        paths = Checkpoints(self.place / name).paths()
        return paths[-1].name if paths else ""

    def straight(self) -> None:
        """The run that is not interrupted; done once.

        Raises:
            OSError: it failed.
        """
        if not (self.place / "straight" / FINISHED).is_file():
            run = self.begin("straight")
            run.join()
            if run.exitcode:
                raise OSError(f"{self.place / 'straight'}: the run failed with exit status {run.exitcode}")

    def interrupt(self, name: str, way: str, twice: bool, dice: random.Random) -> dict[str, Any] | None:
        """Interrupt a run once at a random moment and see to it that it is over; None if it was at its end before."""
        began, before = time.monotonic(), self.newest(name)
        run = self.begin(name)
        if dice.random() < 0.3:
            time.sleep(2 * dice.random())
        else:
            while self.newest(name) == before and run.is_alive():
                time.sleep(0.01)
            time.sleep(0.5 * dice.random())
        after, alive = time.monotonic() - began, run.is_alive()
        for _ in range(2 if twice else 1):
            if run.is_alive():
                os.kill(run.pid or 0, WAYS[way])
            if twice:
                time.sleep(0.5 * dice.random())
        run.join()
        if not alive or (way == "SIGKILL" and run.exitcode == 0):
            return None
        return {"signal": way, "twice": twice, "after_seconds": round(after, 2), "status": run.exitcode,
                "from": before, "left": self.newest(name)}  # fmt: skip

    def round(self, name: str, ways: Sequence[str], dice: random.Random) -> dict[str, Any]:
        """Interrupt a run in these ways, as far as it comes before its end, and compare its end.

        Raises:
            OSError: it failed.
        """
        shutil.rmtree(self.place / name, ignore_errors=True)
        trials: list[dict[str, Any]] = []
        while len(trials) < len(ways):
            way = ways[len(trials)]
            trial = self.interrupt(name, way, way == "SIGINT" and dice.random() < 0.5, dice)
            if trial is None:
                break
            trials.append(trial)
        run = self.begin(name)
        run.join()
        if run.exitcode:
            raise OSError(f"{self.place / name}: the run failed with exit status {run.exitcode}")
        return {"kind": self.kind, "trials": trials, "differences": self.differences(name)}

    def differences(self, name: str) -> list[str]:
        """What is not bit for bit as in the run that was not interrupted."""
        last = f"step-{STEPS:08d}.pt"
        one, other = (read_checkpoint(self.place / run / last) for run in ("straight", name))
        for state in (one, other):
            del state["settings"]["output"]
            for generators in state["random"] if isinstance(state["random"], list) else [state["random"]]:
                del generators["python"]  # of which no training draws, and which begins with the time
        found = differing(one, other, "")
        files = [(self.place / run / FINISHED).read_bytes() for run in ("straight", name)]
        return found + ([FINISHED] if files[0] != files[1] else [])


def differing(one: Any, other: Any, where: str) -> list[str]:
    """Paths of all in which two nested values differ, bit for bit."""
    if type(one) is not type(other):
        return [where]
    if isinstance(one, dict):
        names = sorted(set(one) | set(other), key=str)
        return [path for name in names for path in differing(one.get(name), other.get(name), f"{where}/{name}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [where]
        return [path for i, pair in enumerate(zip(one, other, strict=True)) for path in differing(*pair, f"{where}/{i}")]
    if isinstance(one, Tensor):
        return [] if one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other) else [where]
    return [] if one == other else [where]


def write_pictures(folder: Path) -> Path:
    """A few pictures with captions to learn from, unless they are there; returns their folder."""
    folder.mkdir(exist_ok=True)
    dice = np.random.default_rng(0)
    for index in range(4):
        small = Image.fromarray(dice.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a red apple\n")
    return folder


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many interruptions of each sort there were, and how many runs ended otherwise than the uninterrupted one."""
    trials = [(found["kind"], trial) for found in rounds for trial in found["trials"]]
    counts = {f"{way}, {kind}": sum((kind, way) == (k, t["signal"]) for k, t in trials) for way in WAYS for kind in KINDS}
    counts |= {way: sum(trial["signal"] == way for _, trial in trials) for way in WAYS}
    counts["SIGINT twice"] = sum(trial["twice"] for _, trial in trials)
    counts["other exit statuses"] = sum(trial["status"] not in STATUS[trial["signal"]] for _, trial in trials)
    counts["before the first checkpoint"] = sum(not trial["left"] for _, trial in trials)
    return counts | {"runs": len(rounds), "runs that differ": sum(bool(found["differences"]) for found in rounds)}


def measure(place: Path, kills: int, interrupts: int, seed: int = 0) -> dict[str, int]:
    """Interrupt runs until there were so many; goes on from what ``interruptions.json`` in the folder holds.

    Raises:
        OSError, ValueError: a run failed, or the file is damaged.
    """
    place.mkdir(parents=True, exist_ok=True)
    path = place / "interruptions.json"
    rounds: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rounds"] if path.exists() else []
    kinds = [Runs(place, kind) for kind in KINDS]
    for runs in kinds:
        runs.straight()
    wanted = {"SIGKILL": kills, "SIGINT": interrupts}
    while ways := [way for way in wanted for _ in range(wanted[way] - summary(rounds)[way])]:
        number = len(rounds)
        dice = random.Random(f"{seed} {number}")
        dice.shuffle(ways)
        found = kinds[number % len(kinds)].round(f"interrupted-{number}", ways[:EACH], dice)
        if not found["differences"]:
            shutil.rmtree(kinds[number % len(kinds)].place / f"interrupted-{number}")
        rounds.append(found)
        about = report.origin("interruptions", ["--kills", str(kills), "--interrupts", str(interrupts)])
        report.write_json(path, {**about, "summary": summary(rounds), "rounds": rounds})
        logger.info("%s", ", ".join(f"{name} {count}" for name, count in summary(rounds).items()))
    return summary(rounds)


def main() -> int:
    take_any_text()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="by SIGKILL (default: 200)")
    parser.add_argument("--interrupts", type=int, default=50, help="by SIGINT (default: 50)")
    parser.add_argument("--work", type=Path, default=Path("runs/interruptions"), help="folder of the runs and of the figures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        found = measure(options.work.resolve(), options.kills, options.interrupts, options.seed)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 1
    return 1 if found["runs that differ"] or found["other exit statuses"] else 0


if __name__ == "__main__":
    sys.exit(main())
