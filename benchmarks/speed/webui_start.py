"""What the extension adds to the start of A1111, Forge, Forge Neo and reForge.

    A1111_PATH=... FORGE_PATH=... NEO_PATH=... [A1111_PYTHON=... and so on] python benchmarks/speed/webui_start.py

Each program whose path is set starts in turn with the extension and without it. The program's own measure of the script and
its callbacks is the figure to look at: whole starts vary by more. Writes ``webui-start.json`` and ``webui-start.md``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "hosts")]

from webui_server import OPTIONS  # noqa: E402

from benchmarks.report import ended, origin, table, write_json  # noqa: E402
from benchmarks.speed.a1111 import STARTS, Figures, in_turn, medians, started  # noqa: E402
from wadi_core.files import atomic_write  # noqa: E402
from wadi_core.output import take_any_text  # noqa: E402


def run(options: argparse.Namespace) -> str:
    programs = [program for program in OPTIONS if os.environ.get(f"{program.upper()}_PATH")]
    found: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        for program in programs:

            def start(kind: str, turn: int, program: str = program) -> Figures:
                return started(Path(temporary) / f"{program}-{turn}-{STARTS[kind]}", None, STARTS[kind], program)

            made = in_turn(list(STARTS), options.starts, start)
            found |= {f"{program}, {kind}": rounds for kind, rounds in made.items()}
    rows = {name: medians(rounds) for name, rounds in found.items()}
    report = {**origin("webui-start", sys.argv[1:]), "starts": rows, "rounds": found}
    write_json(options.work / "webui-start.json", report)
    text = table("start", rows)
    with atomic_write(options.work / "webui-start.md") as file:
        file.write(text.encode())
    return text


def main(arguments: list[str] | None = None) -> int:
    take_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="with and without the extension each (default: 3)")
    parser.add_argument("--work", type=Path, default=Path("runs/webui-start"), help="where the results are written")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args(arguments)
    if not any(os.environ.get(f"{program.upper()}_PATH") for program in OPTIONS):
        parser.error("where are the programs? Set A1111_PATH, FORGE_PATH, NEO_PATH or REFORGE_PATH")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options.work.mkdir(parents=True, exist_ok=True)
    return ended("webui-start", options.debug, lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
