"""The command line: ``python -m wadi_core <command>``, or ``wadi <command>``.

Exit status 0 on success, 2 on bad usage, 1 on any other failure, with one line on stderr; ``--debug`` shows where it
came from. What takes seconds to import is imported when a command needs it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, catalog, cli_control, cli_get, cli_publish, cli_study, cli_tools, hub, packages, settings
from .backends import BACKENDS, EAGER
from .cli_tools import DECIMAL, WHOLE
from .files import one_line
from .output import take_any_text
from .prompt_files import read_prompts
from .settings import help_of

DEFAULT_BATCH = 4


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, and which takes no abbreviations that a later option could break."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (bad usage leaves by SystemExit, as argparse does it)."""
    take_any_text()
    options = _parser().parse_args(arguments)
    if not options.debug:
        _silence()
    _show_messages()
    try:
        hub.only_named(_names(options), getattr(options, "fetches", False))
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("wadi: interrupted\n")
        return 130
    except Exception as error:  # the last stop: whatever went wrong becomes one line and a status
        if options.debug:
            traceback.print_exc()
        else:
            sys.stderr.write(f"wadi: error: {_explain(error)}\n")
        return 1
    return 0


def _parser() -> _Parser:
    parser = _Parser(prog="wadi", description="One-step pictures from Stable Diffusion with LoRaD adapters.")
    parser.add_argument("--version", action="version", version=f"wadi {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error, and the libraries' messages")

    generate = commands.add_parser("generate", parents=[common], help="make pictures", description="Make pictures.")
    generate.set_defaults(command=_generate, usage_error=generate.error)
    add = generate.add_argument
    add("prompt", nargs="*", metavar="PROMPT", help=f"{help_of('prompt')}; one picture for each")
    add("-o", "--output", required=True, metavar="FILE", help="the picture, a .png; several are numbered: name-0001.png")
    add("--prompts", metavar="FILE|DIR", help=_PROMPTS_HELP)
    add("--prompt-field", metavar="NAME", help="key or column that holds the prompts (default: prompt, caption or text)")
    add("--base", default="mini", metavar="DIR|FILE|ID", help=f"{help_of('base')}, or a hub id (default: mini)")
    add("--lorad", action="append", metavar="FILE[:STRENGTH]", help=_LORAD_HELP)
    add("--embedding", action="append", metavar="FILE", help=_EMBEDDING_HELP)
    add("--seed", type=WHOLE, default=0, metavar="N", help=f"{help_of('seed')} (default: 0)")
    add("--width", type=WHOLE, metavar="W", help=help_of("width"))
    add("--height", type=WHOLE, metavar="H", help=help_of("height"))
    add("--batch", type=WHOLE, metavar="N", help=_BATCH_HELP)
    add("--sheet", metavar="FILE", help="also write a contact sheet of all pictures, a .png")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, mps and so on (default: a GPU if there is one)")
    add("--vae", metavar="FILE|ID", help=f"{help_of('vae')}; taesd is known by name")
    add("--precision", choices=settings.PRECISIONS, help=_PRECISION_HELP)
    add("--dtype", metavar="T", help=f"{help_of('dtype')}, one for all: fp32, bf16 or fp16 (instead of --precision)")
    add("--backend", choices=BACKENDS, default=EAGER, help="who computes: PyTorch (eager, default) or OpenVINO, on a CPU")
    add("--timings", action="store_true", help="tell how long each stage took")
    add("--alpha-T-squared", type=DECIMAL, metavar="A", help=_ALPHA_HELP)
    cli_control.add_options(generate)

    cli_control.add_commands(commands, common)
    cli_get.add_commands(commands, common)
    cli_study.add_commands(commands, common)
    cli_tools.add_commands(commands, common)
    cli_publish.add_commands(commands, common)
    return parser


_PROMPTS_HELP = (
    "prompts in a file: .txt (one per line), .csv, .tsv, .jsonl, .json or .parquet; or a folder of captions. "
    "The trainer reads the same formats"
)
_LORAD_HELP = (
    "an adapter, a file or a hub id, and its strength (default: 1); may be repeated, angles add. "
    '"mini" is the adapter of the base mini and its default; "none" applies none'
)
_EMBEDDING_HELP = (
    "a learned word for prompts (textual inversion, a .safetensors file or a hub id); may be repeated. "
    '"mini" loads those of the base mini'
)
_PRECISION_HELP = (
    "exact: single precision throughout; balanced (default): smaller numbers where the device is faster with them and the "
    "picture hardly changes; fast: smaller numbers throughout"
)
_BATCH_HELP = f"pictures per network call (default: {DEFAULT_BATCH}); a single prompt gives N pictures, each with its own seed"
_ALPHA_HELP = "for a base that is a one-step network itself, with a merged LoRaD; released ones: 0.0047"


def _generate(options: argparse.Namespace) -> None:
    """Make pictures and save each batch as soon as it is there."""
    _show_messages()
    prompts = list(options.prompt)
    for prompt in prompts:
        settings.check("prompt", prompt)
    if options.prompt_field and not options.prompts:
        options.usage_error("--prompt-field belongs to --prompts")
    if options.prompts:
        prompts += read_prompts(options.prompts, options.prompt_field)
    if not prompts:
        options.usage_error("a PROMPT or --prompts FILE is needed")
    batch = DEFAULT_BATCH if options.batch is None else options.batch
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    if len(prompts) == 1 and options.batch:
        prompts *= batch
    for name in ("seed", "width", "height", "alpha_T_squared"):
        settings.check(name, getattr(options, name))
    cli_control.check(options)
    steering = cli_control.arguments(options)

    from . import pictures

    paths = pictures.numbered(options.output, len(prompts))
    sheet_path = Path(options.sheet) if options.sheet else None
    for path in [paths[0], paths[-1], *([sheet_path] if sheet_path else [])]:
        pictures.check_writable(path)
    if sheet_path in paths:
        raise ValueError(f"{sheet_path}: the contact sheet would overwrite a picture")

    from tqdm import tqdm

    from .pipeline import OneStepPipeline
    from .stages import Timings

    pipe = OneStepPipeline.from_pretrained(
        options.base,
        lorad=cli_tools.adapters(options.lorad),
        device=options.device,
        dtype=options.dtype,
        precision=options.precision,
        vae=options.vae,
        backend=options.backend,
        alpha_T_squared=options.alpha_T_squared,
        keep_base=False,
        control=options.control,
        embeddings=options.embedding,
    )
    wanted = pipe.plan(prompts, options.seed, width=options.width, height=options.height, **steering)
    if advice := cli_control.advice(pipe, wanted[0]):
        logging.getLogger("wadi").info(advice)
    sheet = pictures.ContactSheet()
    timings, calls, left, saving = Timings(), 0, iter(paths), 0.0
    with tqdm(total=len(wanted), unit="picture", disable=len(wanted) == 1) as bar:
        for part in pipe.run(wanted, batch, steering["control_image"]):
            start = time.perf_counter()
            for image, its_settings in zip(part.images, part.settings, strict=True):
                pictures.save(image, next(left), its_settings)
                sheet.add(image, its_settings.prompt) if sheet_path else None
            timings, calls, saving = timings + part.timings, calls + part.calls, saving + time.perf_counter() - start
            bar.update(len(part.images))
    for path in paths:
        sys.stdout.write(f"{path}\n")
    if sheet_path:
        pictures.save(sheet.draw(), sheet_path)
        sys.stdout.write(f"{sheet_path}\n")
    each = f" ({timings.network / len(wanted):.3f} s a picture)" if len(wanted) > 1 else ""
    how = f", {pipe.precision} precision" if pipe.precision else ""
    how += f" by {pipe.backend}" if options.backend != EAGER else ""
    sys.stdout.write(f"{calls} network call{'s' if calls > 1 else ''}: {timings.network:.3f} s{each}{how}\n")
    if options.timings:
        sys.stdout.write(f"{timings}, files {saving:.3f} s\n")


def _explain(error: Exception) -> str:
    """An error as one line; what this program did not foresee is called by its name."""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("wadi_core"):
        return packages.missing(error, "generate")
    if isinstance(error, ValueError):
        return one_line(error)
    if isinstance(error, OSError):
        return one_line(error if error.filename is None else f"{error.filename}: {error.strerror}")
    return one_line(f"{type(error).__name__}: {error}")


def _silence() -> None:
    """Keep the libraries' advice to developers off the terminal; errors are raised all the same."""
    warnings.simplefilter("ignore")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _names(options: argparse.Namespace) -> Iterator[str]:
    """All that a command's options name which may be on the model hub."""
    for option in ("base", "student", "file", "lorad", "control", "embedding", "vae"):
        value = getattr(options, option, None)
        for name in value if isinstance(value, list) else [value] if value else []:
            known = catalog.DECODERS.get(name) if option == "vae" else None
            yield known or (cli_tools.split_strength(name)[0] if option == "lorad" else name)


def _show_messages() -> None:
    """This program's own notes and warnings, a line each on stderr, above a progress bar."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            from tqdm import tqdm

            kind = "warning: " if record.levelno >= logging.WARNING else ""
            tqdm.write(f"wadi: {kind}{one_line(record.getMessage())}", file=sys.stderr)

    logger = logging.getLogger("wadi")
    logger.handlers = [Handler()]
    logger.propagate = False
    logger.setLevel(logging.INFO)
