"""What the sampler costs in A1111: beside its own Euler in one step and in 25, and what the extension adds to its start.

    A1111_PATH=/path/to/stable-diffusion-webui [A1111_PYTHON=its/python] python benchmarks/speed/a1111.py
    ... python benchmarks/speed/a1111.py --size narrow --rounds 2          a look at whether it works

At SD1.5's size: 3 GB on the disk, 8 GB of memory. Weights are random: nothing here depends on what they are. A1111 runs on
the CPU and is asked over HTTP, as in the tests of it, whose probe counts and times each call of the network inside. The
kinds of pictures take turns, so that a busy minute hits all alike. Starts with and without the extension take turns too.
Writes ``a1111.json`` and ``a1111.md``.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "hosts")]

from webui_models import NARROW, make  # noqa: E402
from webui_server import SAMPLER, WebUI, lay_out  # noqa: E402

from benchmarks.report import ended, origin, table, write_json  # noqa: E402
from wadi_core.files import atomic_write  # noqa: E402
from wadi_core.mini.export import export  # noqa: E402
from wadi_core.output import take_any_text  # noqa: E402

logger = logging.getLogger("benchmark")

Figures: TypeAlias = dict[str, float]

HALF = {"block_out_channels": [160, 320, 640, 640], "cross_attention_dim": 32}
SIZES: dict[str, dict[str, Any] | None] = {
    "sd15": None,
    "half": {**NARROW, "unet": {**NARROW["unet"], "attention_head_dim": 8, **HALF}},  # half as wide, a quarter of the work
    "narrow": NARROW,
}
KINDS: dict[str, dict[str, Any]] = {
    "WaDi one-step": {"sampler_name": SAMPLER, "steps": 20, "cfg_scale": 7.0},  # what the sliders say means nothing to it
    "Euler, 1 step, CFG 1": {"sampler_name": "Euler", "steps": 1, "cfg_scale": 1.0},
    "Euler, 25 steps, CFG 7": {"sampler_name": "Euler", "steps": 25, "cfg_scale": 7.0},
}
OURS, ONE, MANY = KINDS
STARTS = {"with the extension": True, "without": False}
OWN_FILES = ("/wadi.py", "/start.py")  # under which the program counts the time of scripts and callbacks
RATIOS = (("time", "request_s"), ("network's time", "network_s"), ("network's processor time", "network_cpu_s"))


def measured(webui: WebUI, kind: str, pixels: int) -> Figures:
    """One picture: its time on the wall and of the processor, the network's part of it, calls and evaluated samples."""
    webui.calls()
    before = webui.post("/probe/clock")
    webui.draw(width=pixels, height=pixels, **KINDS[kind])
    after, calls = webui.post("/probe/clock"), webui.calls()
    return {
        "calls": len(calls),
        "evaluations": sum(call["shape"][0] for call in calls),
        "request_s": after["seconds"] - before["seconds"],
        "request_cpu_s": after["cpu_seconds"] - before["cpu_seconds"],
        "network_s": sum(call["seconds"] for call in calls),
        "network_cpu_s": sum(call["cpu_seconds"] for call in calls),
    }


def started(data: Path, checkpoint: Path | None, extension: bool, program: str = "a1111") -> Figures:
    """One start: until it answers, and what the program itself measures of the extension's script and callbacks."""
    models = lay_out(program, data, extension=extension)
    for file in checkpoint.parent.glob(f"{checkpoint.stem}.*") if checkpoint else ():
        (models / "Stable-diffusion" / file.name).symlink_to(file)
    webui = WebUI(program, data)
    begin = time.perf_counter()
    webui.start()
    try:
        found = {"start_s": time.perf_counter() - begin, "start_cpu_s": webui.post("/probe/clock")["cpu_seconds"]}
        records = webui.get("/internal/profile-startup")["records"]
        return {**found, "own_s": sum(value for name, value in records.items() if name.endswith(OWN_FILES))}
    finally:
        webui.stop()


def medians(rounds: list[Figures]) -> Figures:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def in_turn(kinds: list[str], rounds: int, measure: Callable[[str, int], dict[str, float]]) -> dict[str, list[Figures]]:
    found: dict[str, list[Figures]] = {kind: [] for kind in kinds}
    for turn in range(rounds):
        for kind in kinds if turn % 2 else reversed(kinds):
            found[kind].append(measure(kind, turn))
            logger.info("round %d: %s: %s", turn + 1, kind, found[kind][-1])
    return found


def run(options: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        folder = Path(temporary)
        models = lay_out("a1111", folder / "data")
        make(folder / "base", "sd15", SIZES[options.size])
        checkpoint = export(models / "Stable-diffusion", base=folder / "base", name="base").checkpoint

        def start(kind: str, turn: int) -> Figures:
            return started(folder / f"{turn}-{STARTS[kind]}", checkpoint, STARTS[kind])

        starts = in_turn(list(STARTS), options.starts, start)
        webui = WebUI("a1111", folder / "data").start()
        try:
            webui.choose("base")
            measured(webui, OURS, options.pixels)  # warms up
            few = in_turn([OURS, ONE], options.rounds, lambda kind, turn: measured(webui, kind, options.pixels))
            many = in_turn([MANY], options.many, lambda kind, turn: measured(webui, kind, options.pixels))
        finally:
            webui.stop()
    rows = {kind: medians(rounds) for kind, rounds in {**few, **many}.items()}
    ratios = {
        f"{OURS} against {other}": {what: rows[OURS][name] / rows[other][name] for what, name in RATIOS}
        for other in (ONE, MANY)
    }
    begun = {kind: medians(rounds) for kind, rounds in starts.items()}
    about = {**origin("a1111", sys.argv[1:]), "size": options.size, "pixels": options.pixels}
    report = {**about, "pictures": rows, "ratios": ratios, "starts": begun, "rounds": {**few, **many, **starts}}
    write_json(options.work / "a1111.json", report)
    text = "\n".join([table("picture", rows), table("ratio", ratios), table("start of the program", begun)])
    with atomic_write(options.work / "a1111.md") as file:
        file.write(text.encode())
    return text


def main(arguments: list[str] | None = None) -> int:
    take_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=tuple(SIZES), default="sd15", help="of the network (default: sd15)")
    add("--pixels", type=int, default=256, help="side of the pictures (default: 256)")
    add("--rounds", type=int, default=9, help="of the two kinds with one step (default: 9)")
    add("--many", type=int, default=2, help="of the kind with 25 steps (default: 2)")
    add("--starts", type=int, default=3, help="with and without the extension each (default: 3)")
    add("--work", type=Path, default=Path("runs/a1111"), help="where networks and results are written")
    add("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args(arguments)
    if not os.environ.get("A1111_PATH"):
        parser.error("where is A1111? Set A1111_PATH")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options.work.mkdir(parents=True, exist_ok=True)
    return ended("a1111", options.debug, lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
