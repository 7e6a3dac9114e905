"""The command ``get``: a released one-step network from the model hub, as a LoRaD where a program looks for it."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import catalog, hosts, hub
from .catalog import Entry
from .cli_tools import progress_bar
from .files import atomic_write, one_line

if TYPE_CHECKING:
    from .lorad import LoRaD
    from .lorad.weights import Weights

ORIGIN = "wadi.origin"  # in the metadata: the file on the hub that the LoRaD was extracted from
OUTPUT_BYTES = 350_000_000  # more than any LoRaD of these networks has
MORE_THAN_ROUNDING = 2.0  # grey levels on average
EXAMPLE = "a lighthouse at dusk"

_GET = (
    "Fetch a base and the one-step network that was released for it, extract the LoRaD that lies between them, compare one "
    "picture of both, and write the LoRaD where a program looks for it, with a checkpoint of the base if that program has "
    "none. Started again after an interruption, it goes on with the files that are there already."
)
_OUTPUT = "the LoRaD, a .safetensors file (default: in the folder that --list names)"


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command of this module to those of the command line."""
    parser = commands.add_parser("get", parents=[common], help="fetch a released one-step network", description=_GET)
    parser.set_defaults(command=_get, usage_error=parser.error, fetches=True)
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="what to get; --list shows the names")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--comfyui", metavar="PATH", help="for the ComfyUI in this folder")
    place.add_argument("--webui", metavar="PATH", help="for the A1111, Forge or Forge Neo in this folder")
    place.add_argument("-o", "--output", metavar="O", help=_OUTPUT)
    add("--list", action="store_true", help="show names, sizes and places, then leave")
    add("--yes", action="store_true", help="do not ask about a network without a licence")
    add("--no-base", action="store_true", help="write no checkpoint of the base for a program that has none")
    add("--keep", action="store_true", help="keep the released network in the hub's cache")
    add("--device", metavar="D", help="for the comparison: cpu, cuda and so on (default: a GPU if there is one)")


def _get(options: argparse.Namespace) -> None:
    """Show what there is, or get one."""
    if options.list:
        _list(options)
        return
    if not options.name:
        options.usage_error(f"a NAME is needed: {', '.join([*catalog.entries(), *catalog.DECODERS])}")
    if options.name in catalog.DECODERS:
        _get_decoder(options)
        return
    entry = catalog.find(options.name)
    output = _output(options, entry)
    marker = output.with_name(f".{output.name}.fetching")
    if output.exists():
        _check_same(output, entry)
        sys.stdout.write(f"{output} is there already\n")
    else:
        _confirm(entry, options.yes)
        output.parent.mkdir(parents=True, exist_ok=True)
        _make(entry, output, marker, options)
    checkpoint = _have_checkpoint(entry, output, options)
    _tidy(marker, options.keep)
    for line in _next(entry, output, checkpoint, options):
        sys.stdout.write(f"{line}\n")


def _get_decoder(options: argparse.Namespace) -> None:
    """Have a tiny decoder in the hub's cache, or as a file of the user's choice.

    Raises:
        OSError, ValueError: it cannot be had, or another file is in the way; one line.
    """
    if options.webui:
        raise ValueError(f"{options.name}: A1111 and Forge fetch it themselves: Settings, VAE, TAESD")
    name = catalog.DECODERS[options.name]
    found = Path(hub.local(name))
    if options.comfyui:
        found = _copied(found, hosts.comfyui(options.comfyui).decoders / found.name)
    elif options.output:
        found = _copied(found, Path(options.output))
    _say(f"{found}: {found.stat().st_size / 1e6:.1f} MB")
    if not options.comfyui:
        vae = str(found) if options.output else options.name
        words = ["generate", EXAMPLE, "--base", "sd15-folder", "--vae", vae, "-o", "lighthouse.png"]
        _say(f"Next:\n  {_wadi()} {' '.join(_quoted(word) for word in words)}")


def _copied(source: Path, target: Path) -> Path:
    """The target, with the content of the source; raises ValueError if another file is there."""
    content = source.read_bytes()
    if target.exists() and target.read_bytes() != content:
        raise ValueError(one_line(f"{target}: another file is there under this name: move it away"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        file.write(content)
    return target


def _make(entry: Entry, output: Path, marker: Path, options: argparse.Namespace) -> None:
    """Fetch, extract, compare and write."""
    from . import base as bases
    from .lorad.checkpoint import read_header
    from .lorad.weights import Weights

    source, base_plan = _base_plan(entry)
    network_name = hub.parse(entry.network)
    network_plan = hub.plan(network_name) if network_name else None
    plans = [plan for plan in (base_plan, network_plan) if plan]
    missing = sum(plan.missing for plan in plans)
    for plan in plans:
        _say(f"{plan.wanted}: {_amount(plan)}")
        hub.check_room(plan.listing.folder, missing, entry.name)
    hub.check_room(output.parent, OUTPUT_BYTES, str(output))
    base = Path(source)
    if base_plan:
        unread = _is_transformer(base_plan.listing) or not _draws()
        base = base_plan.fetch(None if unread else bases.find)
    if network_plan and network_plan.missing:
        marker.write_text(str(network_plan.path), encoding="utf-8")  # what this command fetched, it also takes away
    network = network_plan.fetch() if network_plan else Path(entry.network)
    read_header(network)  # a damaged file is told before the work

    base_weights, network_weights = Weights.open(base), Weights.open(network)
    lorad = _extracted(base_weights, network_weights, entry, base_plan, network_plan)
    _compare(base, network_weights, lorad, output, options.device)
    from .cli_study import fitting_dtype

    lorad.save(output, fitting_dtype(base_weights, network_weights))
    _say(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def _base_plan(entry: Entry) -> tuple[str, hub.Plan | None]:
    """The first base that can be had, and what is to be fetched of it; no plan for a local folder."""
    first: OSError | ValueError | None = None
    for name in entry.base:
        wanted = hub.parse(name)
        if wanted is None:
            return name, None
        try:
            listing = hub.look(wanted)
            kind = hub.NETWORK if _is_transformer(listing) else hub.BASE
            return name, hub.Plan(wanted, listing, *hub.choose(wanted, listing, kind))
        except (OSError, ValueError) as error:
            first = first or error
            if name != entry.base[-1]:
                _say(f"{error}; trying the next repository")
    assert first is not None  # an entry names at least one base
    raise first


def _is_transformer(listing: hub.Listing) -> bool:
    """Whether this is PixArt, of which the network alone is needed: no picture of it is drawn here."""
    return "transformer/config.json" in listing.sizes


def _extracted(
    base: Weights, network: Weights, entry: Entry, base_plan: hub.Plan | None, network_plan: hub.Plan | None
) -> LoRaD:
    """The LoRaD, which says where it comes from; what was found is told."""
    from .lorad import LoRaD
    from .lorad.extract import extract
    from .lorad.reports import extraction_lines, lines_as_text

    _say("extracting the LoRaD")
    with progress_bar("layer") as progress:
        lorad, report = extract(base, network, progress=progress)
    _say(lines_as_text(extraction_lines(report)))
    metadata = dataclasses.replace(
        lorad.metadata,
        alpha_T_squared=entry.alpha_T_squared,
        timestep=entry.timestep,
        prediction_type=entry.prediction_type,
        title=f"WaDi one-step: {entry.about or entry.name}",
        license=entry.licence or "none stated by the authors of the network",
        extra={**lorad.metadata.extra, ORIGIN: _at(network_plan, entry.network), "wadi.base": _at(base_plan, base.source)},
    )
    return LoRaD(lorad.factors, metadata)


def _compare(base: Path, network: Weights, lorad: LoRaD, output: Path, device: str | None) -> None:
    """Tell how alike the released network and base with LoRaD are; a pair of pictures is left beside the LoRaD."""
    if not _draws():
        _say("no picture is compared: this Python has no diffusers")
        return
    from . import pictures, released

    if lorad.metadata.architecture == "pixart-alpha":
        error = released.compare_outputs(base, network, lorad, device)
        _say(f"no picture of PixArt can be drawn here; in its output for noise, the two differ by {error:.2e} of its size")
        return
    found = released.compare_pictures(base, network, lorad, device)
    path = output.with_name(f"{output.stem}-compared.png")
    pictures.save(found.pair, path)
    told = f"{found.mean:.2f} grey levels of 255 on average, {found.largest} at most"
    _say(f'one picture, "{released.PROMPT}", of the released network and of base and LoRaD: they differ by {told}')
    if found.mean > MORE_THAN_ROUNDING:
        _say("that is more than rounding: this network is not wholly a rotation of this base")
    _say(str(path))


def _draws() -> bool:
    """Whether this Python can draw pictures: A1111's cannot, and the LoRaD is the same without."""
    try:
        import diffusers  # noqa: F401 - asked for, not used
    except ImportError:
        return False
    return True


def _at(plan: hub.Plan | None, name: str) -> str:
    """A name of the hub with the commit that was fetched."""
    if plan is None:
        return name
    return str(dataclasses.replace(plan.wanted, revision=plan.listing.commit))


def _check_same(output: Path, entry: Entry) -> None:
    """Raises ValueError if a file that is in the way is not what this command would write."""
    from .lorad import LoRaD

    wanted = hub.parse(entry.network)
    said = LoRaD.load(output).metadata.extra.get(ORIGIN, "")
    found = hub.parse(said)
    same = said == entry.network or (wanted and found and (wanted.repo, wanted.file) == (found.repo, found.file))
    if not same:
        raise ValueError(one_line(f"{output}: another file is there under this name: move it away, or name another with -o"))


def _confirm(entry: Entry, yes: bool) -> None:
    """Say what the terms are; where there are none, go on only if the user says so.

    Raises:
        ValueError: the user does not; one line.
    """
    for sentence in terms(entry):
        _say(sentence)
    if entry.licence or yes:
        return
    sys.stdout.write("Go on? [y/N] ")
    sys.stdout.flush()
    answer = sys.stdin.readline()
    if answer.strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was fetched: answer y, or say --yes, to go on without a licence")


def terms(entry: Entry) -> list[str]:
    """Under which terms base and network are, in a sentence each."""
    said = [f"The base {entry.base[0]} is under {entry.base_licence}."] if entry.base_licence else []
    if entry.licence:
        return [*said, f"The network {entry.network} is under {entry.licence}."]
    unknown = (
        f"The network {entry.network} carries no licence: its authors do not say under which terms it, or a LoRaD made of "
        "it, may be used or passed on."
    )
    return [*said, unknown]


def _tidy(marker: Path, keep: bool) -> None:
    """Take the network out of the cache, if this command brought it there."""
    if not marker.exists():
        return
    path = Path(marker.read_text(encoding="utf-8"))
    if not keep and path.is_file():
        size = path.stat().st_size
        hub.drop(path)
        _say(f"{path.name} is taken out of the cache again: {size / 1e9:.2f} GB (--keep keeps it)")
    marker.unlink()


# Places, and what to do next


def _places(options: argparse.Namespace) -> hosts.Places | None:
    """Where the program that was named looks; None where none was named."""
    if options.comfyui:
        return hosts.comfyui(options.comfyui)
    return hosts.webui(options.webui) if options.webui else None


def _have_checkpoint(entry: Entry, output: Path, options: argparse.Namespace) -> Path | None:
    """A checkpoint that the LoRaD is for, where the program looks for one; written if it has none, as far as that goes."""
    from . import base as bases
    from . import checkpoint_writer
    from .lorad.checkpoint import read_header

    places, architecture = _places(options), read_header(output).metadata.get("wadi.architecture", "")
    if places is None or architecture == "pixart-alpha":
        return None
    if there := hosts.checkpoint_of(places, architecture, entry.prediction_type):
        _say(f"{places.name} has a checkpoint for it: {there}")
        return there
    folder, kind = places.checkpoints[0], entry.about or entry.name
    lacks = f"{places.name} has no .safetensors checkpoint of it ({kind}) in {', '.join(map(str, places.checkpoints))}"
    if options.no_base:
        _say(lacks)
        return None
    source, plan = _base_plan(entry)
    base = plan.fetch(bases.find) if plan else Path(source)
    if not base.is_dir() or not checkpoint_writer.can_be_one_file(base):
        _say(f"{lacks}: put one there; {source} cannot be written as one file by this program")
        return None
    target = folder / f"{_stem(plan, base)}.safetensors"
    if target.exists():
        _say(f"{lacks}; nothing is written, as there is another file named {target}")
        return None
    entries = checkpoint_writer.entries_of(base)
    size = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape, _ in entries)
    _say(f"{lacks}: writing {target}, {size / 1e9:.2f} GB (float16)")
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar("B", scale=True) as progress:
        checkpoint_writer.write(entries, target, kind, progress)
    return target


def _stem(plan: hub.Plan | None, base: Path) -> str:
    """What the checkpoint of a base is called."""
    return plan.wanted.repo.rpartition("/")[2] if plan else base.resolve().name


def _output(options: argparse.Namespace, entry: Entry) -> Path:
    """The file to write.

    Raises:
        OSError, ValueError: there is no such program, or no place; one line.
    """
    if options.output:
        path = Path(options.output)
        if path.suffix.lower() != ".safetensors":
            raise ValueError(one_line(f"{path}: the name must end in .safetensors"))
        return path
    return _folder(options) / entry.file_name


def _folder(options: argparse.Namespace) -> Path:
    """Where the program of the user's choice looks for LoRaDs."""
    places = _places(options)
    if places is not None:
        return places.lorads
    folder = catalog.models_folder()
    if folder is None:
        raise ValueError("no folder for models can be found, as there is no home: set WADI_MODELS, or name a file with -o")
    return folder


def _next(entry: Entry, output: Path, checkpoint: Path | None, options: argparse.Namespace) -> list[str]:
    """The next thing to type or to do."""
    about = checkpoint.name if checkpoint else entry.about or entry.name
    if options.comfyui:
        graph = f"Load Checkpoint ({about}), Load LoRaD ({output.name}), One-Step Sampler, VAE Decode"
        return ["Next: restart ComfyUI, and build or open a graph of the pack:", f"  {graph}"]
    if _is_pixart(output):
        return ["Next: of the programs that this pack is for, only ComfyUI draws PixArt: --comfyui PATH writes the LoRaD there"]
    if options.webui:
        say = f"  {EXAMPLE} <lorad:{output.stem}:1>"
        return [f"Next: choose a checkpoint ({about}), the sampler WaDi one-step, and type:", say]
    words = ["generate", EXAMPLE, "--base", entry.base[0], "--lorad", str(output), "-o", "lighthouse.png"]
    return ["Next:", f"  {_wadi()} {' '.join(_quoted(word) for word in words)}"]


def _is_pixart(output: Path) -> bool:
    from .lorad.checkpoint import read_header

    return read_header(output).metadata.get("wadi.architecture") == "pixart-alpha"


def _wadi() -> str:
    """How this command line was called."""
    if Path(sys.argv[0]).stem == "wadi":
        return "wadi"
    return f"{_quoted(sys.executable)} -m wadi_core"


def _quoted(word: str) -> str:
    if os.name == "nt":
        return f'"{word}"' if " " in word else word
    return shlex.quote(word)


def _amount(plan: hub.Plan) -> str:
    if not plan.missing:
        return "in the cache already"
    return f"{plan.missing / 1e9:.2f} GB to fetch"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _list(options: argparse.Namespace) -> None:
    """Names, sizes and places; nothing is asked of the hub."""
    folder = _folder(options) if options.comfyui or options.webui or catalog.models_folder() else None
    for entry in catalog.entries().values():
        place = folder / entry.file_name if folder else Path(entry.file_name)
        there = "there already" if place.exists() else "not there yet"
        sizes = [f", {size / 1e9:.1f} GB" if size else "" for size in (entry.base_bytes, entry.network_bytes)]
        _say(f"{entry.name}: {entry.about or entry.base[0]}")
        _say(f"  base     {entry.base[0]}{sizes[0]}{', ' + entry.base_licence if entry.base_licence else ''}")
        _say(f"  network  {entry.network}{sizes[1]}, {entry.licence or 'no licence stated'}")
        _say(f"  LoRaD    {place} ({there})")
    for name, file in catalog.DECODERS.items():
        _say(f"{name}: a tiny decoder, {file}, MIT")
