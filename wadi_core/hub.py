"""Names of the model hub wherever a base, adapter, ControlNet or embedding is named.

    org/name                     a repository: of a base or ControlNet what is needed of it, else its only file
    org/name:file                one file of it
    org/name@revision[:file]     a branch, tag or commit

A local file or folder of the same name wins. ``huggingface_hub`` does the fetching, so its cache and its environment
variables (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HOME) hold. Files that are in the cache are not fetched again.

Which files of a repository in diffusers layout are fetched: the settings (.json, .txt, .model) of the parts that draw,
and for each part one set of weights. Those are .safetensors where there are any. Where pictures are made in float16, the
fp16 variant is taken if it is smaller, unless another set is in the cache already.
"""

from __future__ import annotations

import difflib
import errno
import glob
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .files import one_line

logger = logging.getLogger("wadi")

File: TypeAlias = "str | os.PathLike[str]"

BASE, NETWORK, CONTROL, SETTINGS, FILE = "base", "network", "control", "settings", "file"
"""What a name stands for: a whole base; its U-Net or transformer alone; a ControlNet; a base's settings; one file."""

_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^:@\s]+))?(?::(?P<file>[^:\s]+))?", re.ASCII
)
# `models/some.safetensors` is a path that is missing here, no repository.
_LOCAL_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json", ".yaml", ".png")
_NETWORKS = ("unet", "transformer")
_PARTS = (*_NETWORKS, "vae", "text_encoder")
_SETTINGS_OF = (*_PARTS, "tokenizer", "scheduler")
_STEM, _TEXT_STEM = "diffusion_pytorch_model", "model"
_AIR = 50_000_000  # bytes that stay free on the disk


@dataclass(frozen=True)
class HubName:
    """A name of the hub in its parts; ``file`` is None for a whole repository."""

    repo: str
    revision: str
    file: str | None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repo}{revision}" + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit.

    Attributes:
        commit: which one.
        sizes: name -> bytes.
        folder: of the cache, into which they belong.
        where: the repository, or the cache where the hub could not be asked; for messages.
    """

    commit: str
    sizes: dict[str, int]
    folder: Path
    where: str = "the repository"

    def missing(self, files: Iterable[str]) -> int:
        """How many bytes of these files are not in the cache."""
        return sum(self.sizes[name] for name in files if not self.has(name))

    def has(self, name: str) -> bool:
        """Whether this file is in the cache, whole."""
        path = self.folder / name
        return path.is_file() and path.stat().st_size == self.sizes[name]


@dataclass(frozen=True)
class Plan:
    """What is to be fetched: a folder's settings and weights, or a single file, which has no settings."""

    wanted: HubName
    listing: Listing
    settings: list[str]
    weights: list[str]

    @property
    def path(self) -> Path:
        """The folder or file, where it will be."""
        return self.listing.folder if self.settings else self.listing.folder / self.weights[0]

    @property
    def missing(self) -> int:
        """Bytes that are not in the cache yet."""
        return self.listing.missing([*self.settings, *self.weights])

    def fetch(self, check: Callable[[Path], object] | None = None) -> Path:
        """Have it in the cache, whole; arguments and errors as of :func:`local`."""
        check_room(self.listing.folder, self.missing, str(self.wanted))
        self._have(self.settings)
        if check and self.settings:
            check(self.path)
        self._have(self.weights)
        return self.path

    def _have(self, files: list[str]) -> None:
        """Fetch those files that are not in the cache, whole."""
        from huggingface_hub import errors, hf_hub_download

        broken = getattr(errors, "XetDownloadError", RuntimeError)  # older versions raise the latter
        for name in files:
            path = self.listing.folder / name
            if self.listing.has(name):
                continue
            if path.is_file():  # of another size than the hub says: no whole file
                drop(path)
            try:  # one after the other, in this thread: Ctrl-C ends it at once
                hf_hub_download(self.wanted.repo, name, revision=self.wanted.revision)
            except (errors.HTTPError, OSError, ValueError, RuntimeError, broken) as error:
                raise _explained(error, self.wanted) from error
            if not self.listing.has(name):
                drop(path)
                size = f"{self.listing.sizes[name]:,} bytes"
                raise OSError(one_line(f"{self.wanted}: {name} came with another size than {size}; it is not used: try again"))
            blob = path.resolve()
            for leftover in blob.parent.glob(f"{glob.escape(blob.name)}*.incomplete"):  # of attempts that were killed
                leftover.unlink(missing_ok=True)


def parse(name: object) -> HubName | None:
    """A name in its parts; None for what is no name of the hub, or is a local file or folder."""
    found = _NAME.fullmatch(str(name))
    if found is None or (not found["file"] and str(name).lower().endswith(_LOCAL_ENDINGS)) or Path(str(name)).exists():
        return None
    return HubName(found["repo"], found["revision"] or "main", found["file"])


def only_named(names: Iterable[object], fetches: bool = False) -> None:
    """Keep the libraries of this process offline, unless one of these names has to be fetched, or something surely has.

    They read their variables once, when they are imported: this has to come before. What is fetched is what was named;
    nothing is told to anybody besides.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not fetches and not any(parse(name) for name in names):
        for variable in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(variable, "1")


def local(name: File, kind: str = FILE, half: bool = False, check: Callable[[Path], object] | None = None) -> File:
    """The local file or folder that a name stands for, fetched if it has to be.

    Args:
        name: a path (or ``mini``), which is returned as it is, or a name of the hub.
        kind: what is needed: one of the constants of this module.
        half: whether weights in half precision will do.
        check: called with the folder before its weights are fetched; may raise.

    Raises:
        OSError: the hub cannot be reached, has no such thing or does not give it, or the disk has no room.
        ValueError: the repository holds nothing of this kind, or several. Both with a message of one line.
    """
    wanted = parse(name)
    return name if wanted is None else plan(wanted, kind, half).fetch(check)


def plan(wanted: HubName, kind: str = FILE, half: bool = False) -> Plan:
    """What has to be fetched for a name; nothing but the list of a repository's files is asked for.

    Raises:
        OSError, ValueError: as :func:`local`.
    """
    listing = look(wanted)
    return Plan(wanted, listing, *choose(wanted, listing, kind, half))


def look(wanted: HubName) -> Listing:
    """What a repository holds: asked of the hub, or taken from the cache where the hub cannot be reached.

    Raises:
        OSError: neither works; one line.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    store = Path(constants.HF_HUB_CACHE) / f"models--{wanted.repo.replace('/', '--')}"
    try:
        info = HfApi().model_info(
            wanted.repo, revision=wanted.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except (HTTPError, OSError, ValueError) as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        cached = None if refused else _cached(store, wanted.revision)
        if cached is None:
            raise _explained(error, wanted) from error
        if not isinstance(error, OfflineModeIsEnabled):
            logger.info("%s: the hub cannot be reached; what is in the cache is used", wanted)
        return cached
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    commit = info.sha or wanted.revision
    return Listing(commit, sizes, store / "snapshots" / commit)


def choose(wanted: HubName, listing: Listing, kind: str, half: bool = False) -> tuple[list[str], list[str]]:
    """Which files to fetch: settings and weights of a folder; for a single file no settings.

    Raises:
        OSError: there is no such file. ValueError: nothing of this kind, or several. Both with one line.
    """
    names = listing.sizes
    if wanted.file:
        if wanted.file not in names:
            raise FileNotFoundError(one_line(f"{wanted}: {listing.where} holds no such file{_nearest(wanted.file, names)}"))
        return [], [wanted.file]
    if kind != FILE and "model_index.json" in names:
        parts = [part for part in (_NETWORKS if kind == NETWORK else _PARTS) if f"{part}/config.json" in names]
        folders = parts if kind == NETWORK else _SETTINGS_OF
        settings = ["model_index.json", *(name for name in names if _is_settings(name, folders))]
        if kind == SETTINGS:
            return settings, []
        weights = [file for part in parts for file in _weights(wanted, listing, f"{part}/", half)]
        if not weights:
            raise ValueError(one_line(f"{wanted}: {listing.where} holds no network of Stable Diffusion or PixArt"))
        return settings, weights
    if kind in (NETWORK, CONTROL) and "config.json" in names:
        return ["config.json"], _weights(wanted, listing, "", half)
    return [], [_only_file(wanted, listing)]


def _is_settings(name: str, folders: Iterable[str]) -> bool:
    folder, _, file = name.rpartition("/")
    return folder in folders and file.endswith((".json", ".txt", ".model")) and ".index." not in file


def _weights(wanted: HubName, listing: Listing, prefix: str, half: bool) -> list[str]:
    """One set of weights of a part, whose folder's name is the prefix."""
    text = prefix == "text_encoder/"
    stem, pickle = (_TEXT_STEM, "pytorch_model") if text else (_STEM, _STEM)
    sizes = listing.sizes
    full = [[f"{prefix}{stem}.safetensors"], _shards(sizes, f"{prefix}{stem}", "safetensors")]
    coarse = [[f"{prefix}{stem}.fp16.safetensors"]]
    pickles = [[f"{prefix}{pickle}.bin"], _shards(sizes, f"{prefix}{pickle}", "bin")]
    sets = [one for one in (*full, *coarse, *pickles) if one and all(name in sizes for name in one)]
    if not sets:
        raise FileNotFoundError(one_line(f"{wanted}: {listing.where} holds no weights {prefix}{stem}.safetensors"))
    best = sets[0]
    if half and best in full:
        choices = [one for one in sets if one in full or one in coarse]
        best = min(choices, key=lambda one: (listing.missing(one) > 0, sum(sizes[name] for name in one)))
    return best


def _shards(names: Iterable[str], stem: str, ending: str) -> list[str]:
    """The files of a network that is stored in several, and their index; empty if one is missing."""
    found = {name: match for name in names if (match := re.fullmatch(rf"{re.escape(stem)}-(\d+)-of-(\d+)\.{ending}", name))}
    counts = {int(match[2]) for match in found.values()}
    index = f"{stem}.{ending}.index.json"
    return [*sorted(found), index] if counts == {len(found)} and index in names else []


def _only_file(wanted: HubName, listing: Listing) -> str:
    """The one .safetensors file of a repository, those in folders left aside where there are others."""
    files = [name for name in listing.sizes if name.endswith(".safetensors")]
    files = [name for name in files if "/" not in name] or files
    if not files:
        raise FileNotFoundError(one_line(f"{wanted}: {listing.where} holds no .safetensors file"))
    if len(files) > 1:
        some = ", ".join(sorted(files)[:5]) + (" and more" if len(files) > 5 else "")
        raise ValueError(one_line(f"{wanted}: {listing.where} holds several files: name one as {wanted}:FILE ({some})"))
    return files[0]


def check_room(folder: Path, needed: int, what: str) -> None:
    """Do nothing if the disk of a folder, which need not exist yet, has room for so many bytes.

    Raises:
        OSError: it has not; one line.
    """
    if not needed:
        return
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed + _AIR > free:
        why = f"{needed / 1e9:.2f} GB have to be fetched and the disk of {folder} has {free / 1e9:.2f} GB left"
        raise OSError(one_line(f"{what}: {why}: make room, or set HF_HOME to a folder on another disk"))


def drop(path: Path) -> None:
    """Take one file out of the cache: its name in the snapshot, and its bytes where nothing else leads to them."""
    from huggingface_hub import scan_cache_dir

    own = path.parent.resolve() / path.name
    cache = scan_cache_dir()
    found = [file for repo in cache.repos for one in repo.revisions for file in one.files if file.file_path == own]
    if hasattr(cache, "delete_files"):
        cache.delete_files(*found).execute()
        return
    for file in found:
        file.file_path.unlink()
        file.blob_path.unlink(missing_ok=True)


def _cached(store: Path, revision: str) -> Listing | None:
    """What the cache holds of a revision."""
    ref = store / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    folder = store / "snapshots" / commit
    if not folder.is_dir():
        return None
    files = (path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return Listing(commit, sizes, folder, "the cache (the hub was not asked)")


# What went wrong, in one sentence


def _explained(error: Exception, wanted: HubName) -> Exception:
    """An error of the hub's client as one sentence that says what to do."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    here = "there is no such file or folder here"
    if isinstance(error, errors.OfflineModeIsEnabled):
        why = f"{here}, it is not in the cache of the model hub, and HF_HUB_OFFLINE forbids to fetch it"
    elif isinstance(error, errors.GatedRepoError):
        why = f"this repository is gated: accept its terms at {hub}/{wanted.repo}, then set HF_TOKEN to a token of that account"
    elif isinstance(error, errors.RepositoryNotFoundError):
        near = _nearest(wanted.repo, _repositories_of(wanted.repo.partition("/")[0]))
        why = f"{here}, and {hub} has no such repository, or a private one for which HF_TOKEN must be set{near}"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"the repository has no revision {wanted.revision}{_nearest(wanted.revision, _revisions(wanted.repo))}"
    elif isinstance(error, errors.HFValidationError):
        why = f"{here}, and the hub can have no repository of this name"
    elif isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        token = ": the token in HF_TOKEN is not valid there" if status in (401, 403) else ": try again later"
        why = f"{hub} answers with status {status}{token}"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        why = f"the disk is full: make room in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on another disk"
    elif isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
        why = f"it cannot be put into the cache: {error}; HF_HOME names another folder for it"
    elif "Consistency check failed" in str(error):
        why = "a file came with another size than the hub says; it is not used: try again"
    elif not isinstance(error, ValueError):
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        detail = f"{type(cause).__name__}: {cause}"
        why = f"{hub} cannot be reached, or the connection broke: run this again, whole files are kept ({detail})"
    else:  # as of a token that is none
        why = str(error)
    return OSError(one_line(f"{wanted}: {why}"))


def _nearest(name: str, others: Iterable[str]) -> str:
    """The end of a sentence that names what is there and called alike."""
    found = difflib.get_close_matches(name, list(others), n=3, cutoff=0.5)
    return f"; the nearest: {', '.join(found)}" if found else ""


def _repositories_of(owner: str) -> list[str]:
    return _asked(lambda api: [one.id for one in api.list_models(author=owner, limit=200)])


def _revisions(repo: str) -> list[str]:
    def ask(api: object) -> list[str]:
        refs = api.list_repo_refs(repo)  # type: ignore[attr-defined]
        return [one.name for one in (*refs.branches, *refs.tags)]

    return _asked(ask)


def _asked(question: Callable[..., list[str]]) -> list[str]:
    """An answer of the hub that is welcome and not needed."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        return question(HfApi())
    except (HTTPError, OSError, ValueError):
        return []
