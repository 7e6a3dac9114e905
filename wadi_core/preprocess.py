"""Control maps from pictures: edges, poses, depth and the like, as ControlNets were trained on them.

What needs no network is made in :mod:`.maps` and needs no package either. The others are the detectors of the package
``controlnet_aux``, which comes with the extra ``control``. Their weights are read from a folder on the disk: nothing is
downloaded.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import images, packages
from .files import one_line, refusal

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from . import maps

MODELS = "WADI_PREPROCESSORS"  # environment variable with the folder of weights
ANNOTATORS = "lllyasviel/Annotators on Hugging Face"
STEP, LARGEST = 64, 1024  # pixels: detectors are given sides divisible by the one, the shorter at most the other


def _maps() -> ModuleType:
    """:mod:`.maps`, which imports torch: a list of the kinds does not need it."""
    from . import maps

    return maps


@dataclass(frozen=True)
class Kind:
    """A kind of control map.

    Attributes:
        help: what it shows.
        detector: the class in ``controlnet_aux`` that makes it; empty for those that are made here.
        files: names of the weights it needs.
        options: for the call of the detector.
        make: pixels out of pixels and a seed, for those that are made here at a size that detectors work in.
    """

    help: str
    detector: str = ""
    files: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[maps.Pixels, int], maps.Pixels] | None = None


_HED, _PIDI = ("ControlNetHED.pth",), ("table5_pidinet.pth",)
_POSE = ("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth")
KINDS = {
    "canny": Kind("edges"),
    "invert": Kind("light and dark exchanged, for drawings in black on white"),
    "shuffle": Kind("colours of the picture, its shapes shuffled", make=lambda pixels, seed: _maps().shuffled(pixels, seed)),
    "lineart-standard": Kind("lines, without a network", make=lambda pixels, seed: _maps().lineart(pixels)),
    "softedge-standard": Kind("soft edges, without a network", make=lambda pixels, seed: _maps().soft_edges(pixels)),
    "scribble-standard": Kind("bold strokes, without a network", make=lambda pixels, seed: _maps().strokes(pixels)),
    "tile": Kind("the picture without its details", make=lambda pixels, seed: _maps().tile(pixels)),
    "blur": Kind("the picture out of focus", make=lambda pixels, seed: _maps().blurred(pixels)),
    "lineart": Kind("lines", "LineartDetector", ("sk_model.pth", "sk_model2.pth")),
    "lineart-coarse": Kind("coarse lines", "LineartDetector", ("sk_model.pth", "sk_model2.pth"), {"coarse": True}),
    "lineart-anime": Kind("lines of drawn characters", "LineartAnimeDetector", ("netG.pth",)),
    "scribble": Kind("bold strokes (HED)", "HEDdetector", _HED, {"scribble": True}),
    "scribble-pidinet": Kind("bold strokes (PiDiNet)", "PidiNetDetector", _PIDI, {"scribble": True}),
    "softedge": Kind("soft edges (HED)", "HEDdetector", _HED),
    "softedge-pidinet": Kind("soft edges (PiDiNet)", "PidiNetDetector", _PIDI),
    "openpose": Kind("bodies of people", "OpenposeDetector", _POSE),
    "openpose-full": Kind("bodies, hands and faces", "OpenposeDetector", _POSE, {"include_hand": True, "include_face": True}),
    "depth": Kind("depth (MiDaS)", "MidasDetector", ("dpt_hybrid-midas-501f0c75.pt",)),
    "depth-zoe": Kind("depth (ZoeDepth)", "ZoeDetector", ("ZoeD_M12_N.pt",)),
    "depth-leres": Kind("depth (LeReS)", "LeresDetector", ("res101.pth", "latest_net_G.pth")),
    "normal": Kind("directions of surfaces", "NormalBaeDetector", ("scannet.pt",)),
    "mlsd": Kind("straight lines", "MLSDdetector", ("mlsd_large_512_fp32.pth",)),
}

PLAIN = tuple(name for name, kind in KINDS.items() if not kind.detector)  # need neither a package nor weights


def run(
    image: Image,
    kind: str,
    models: str | os.PathLike[str] | None = None,
    low: int = 100,
    high: int = 200,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Image:
    """The control map of a picture, RGB and of its size.

    Args:
        image: any picture, looked at as :mod:`.images` says.
        kind: one of :data:`KINDS`.
        models: folder with the weights of the detectors; by default the one that the environment variable
            ``WADI_PREPROCESSORS`` names.
        low, high: thresholds of ``canny``, from 0 to 1000.
        seed: of ``shuffle``.
        device: for the detectors that are networks.

    Raises:
        ValueError: an unknown kind, or thresholds that make no sense.
        OSError: a package or a file with weights is missing, or damaged. All with a message of one line.
    """
    if kind not in KINDS:
        raise ValueError(f"control maps are of the kinds {', '.join(KINDS)}, not {kind}")
    image = images.plain(image)
    if kind == "canny":
        return canny(image, low, high)
    if kind == "invert":
        from PIL import ImageOps

        return ImageOps.invert(image)
    make = KINDS[kind].make
    return _made(image, make, seed) if make else _detect(image, KINDS[kind], models, seed, device)


def canny(image: Image, low: int = 100, high: int = 200) -> Image:
    """Edges, white on black, with OpenCV's thresholds: a gradient above ``high`` begins an edge, one above ``low`` goes on.

    Raises:
        ValueError: as :func:`run`.
    """
    import numpy as np
    from PIL import Image

    if not 0 <= low <= high <= 1000:
        raise ValueError(f"canny needs thresholds from 0 to 1000, the low one not above the high one, not {low} and {high}")
    return Image.fromarray(_maps().canny(np.array(images.plain(image)), low, high))


def fit(image: Image, width: int, height: int) -> Image:
    """A picture in another size, cut at the edges where the proportions differ."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _made(image: Image, make: Callable[[maps.Pixels, int], maps.Pixels], seed: int) -> Image:
    import numpy as np
    from PIL import Image

    # As detectors look at pictures: in sides that can be divided.
    factor = _side(image) / min(image.size)
    width, height = (max(STEP, round(side * factor / STEP) * STEP) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.LANCZOS if factor > 1 else Image.Resampling.BILINEAR)
    found = make(np.array(resized), seed)
    return Image.fromarray(found).resize(image.size, Image.Resampling.BILINEAR)


def _side(image: Image) -> int:
    """Pixels on the shorter side at which a picture is looked at."""
    return min(LARGEST, max(STEP, round(min(image.size) / STEP) * STEP))


def _detect(image: Image, kind: Kind, models: str | os.PathLike[str] | None, seed: int, device: str | torch.device) -> Image:
    from PIL import Image

    folder = _folder_with(kind, models)
    with warnings.catch_warnings(), _numpy_seed(seed):
        warnings.simplefilter("ignore")  # what controlnet_aux says to developers
        package = _package("controlnet_aux")
        detector = getattr(package, kind.detector, None)
        if detector is None:
            raise OSError(f"this version of controlnet_aux has no {kind.detector}: update it")
        side = _side(image)
        try:
            made = detector.from_pretrained(str(folder)).to(device)
            found = made(image, output_type="pil", detect_resolution=side, image_resolution=side, **kind.options)
        except Exception as error:  # a detector can raise nearly anything over a damaged file or an odd picture
            raise OSError(one_line(f"{kind.detector} of controlnet_aux failed: {type(error).__name__}: {error}")) from error
    return found.convert("RGB").resize(image.size, Image.Resampling.BILINEAR)


def _folder_with(kind: Kind, models: str | os.PathLike[str] | None) -> Path:
    """The folder in which all that a detector needs lies, each file looked at: pickles of plain tensors only."""
    import torch

    folder = models or os.environ.get(MODELS)
    if not folder:
        wanted = f"{' and '.join(kind.files)} (from {ANNOTATORS})"
        raise FileNotFoundError(f"{kind.detector} needs {wanted} in a folder: name it, or set {MODELS} to it")
    missing = [name for name in kind.files if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(one_line(f"{folder}: {', '.join(missing)} is missing: get it from {ANNOTATORS}"))
    for name in kind.files:
        path = Path(folder) / name
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise nearly anything, and all of it means this one thing
            raise refusal(path, "this is no pickle of plain tensors (nothing else is loaded), or it is damaged") from error
    return Path(folder)


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Detectors draw from numpy's own generator; it is left as it was."""
    import numpy as np

    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OSError(f"control maps need more: {packages.missing(error, 'control')}") from error
