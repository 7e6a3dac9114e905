"""What looks at pictures in an evaluation: a network that turns each into a list of numbers.

Published figures are taken from Inception, as torch-fidelity has it, bit for bit the original. Other networks see other
things, and their distances can be compared only among themselves.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wadi_core.files import existing_file, one_line, refusal, sha256_of_file
from wadi_core.packages import missing

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # how the hash of the file with this name begins
GRAIN_SEED = 1 << 40  # far from the seeds of noises that pictures are made of


@dataclass(frozen=True)
class Extractor:
    """A network with a name.

    Attributes:
        name: for people.
        key: two extractors with the same key see the same.
        look: pictures uint8 (n, 3, h, w) and their numbers -> features (n, d) on the CPU.
        components: the Frechet distance is taken after a projection to so many dimensions; None takes them all.
    """

    name: str
    key: str
    look: Callable[[Tensor, range], Tensor]
    components: int | None = None


def find(name: str, device: torch.device, inception: Path | None = None) -> Extractor:
    """The extractor of a name: ``inception``, ``mini``, or ``MODULE:FUNCTION``.

    Args:
        name: the function, called without arguments, returns a network or any callable that turns pictures
            (n, 3, h, w) with values from -1 to 1 into features (n, d).
        device: where it works.
        inception: file with Inception's weights.

    Raises:
        OSError, ValueError: weights or a package are missing, or the function is not what it should be; one line.
    """
    if name == "inception":
        return _inception(device, inception)
    if name == "mini":
        return _mini(device)
    if ":" in name:
        return _own(name, device)
    raise ValueError(f"there is no extractor {name!r}: take inception, mini, or MODULE:FUNCTION")


def _inception(device: torch.device, weights: Path | None) -> Extractor:
    try:
        import torch_fidelity.feature_extractor_inceptionv3 as judge  # pyright: ignore[reportMissingImports] - optional
    except ImportError as error:
        raise OSError(f"Inception needs torch-fidelity: {missing(error, 'evaluate')}") from None
    path = _inception_file(weights)
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity itself would run what is in the file
        network = judge.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # of a damaged file nearly anything can come
        raise refusal(path, f"these are not Inception's weights: {str(error).partition(chr(10))[0]}") from error
    digest = sha256_of_file(path)
    name = "Inception v3 (torch-fidelity)"
    if not digest.startswith(INCEPTION_SHA256):
        name += f" with other weights than {INCEPTION_FILE}"
    network.to(device)

    @torch.no_grad()
    def look(pictures: Tensor, numbers: range) -> Tensor:
        return network(pictures.to(device))[0].float().cpu()

    return Extractor(name, f"inception {digest}", look)


def _inception_file(weights: Path | None) -> Path:
    if weights is not None:
        return existing_file(weights)
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        where = f"name it with --inception FILE or put it into {path.parent}"
        raise FileNotFoundError(f"Inception's weights are missing: get {INCEPTION_FILE} of torch-fidelity 0.2.0 and {where}")
    return path


def _mini(device: torch.device) -> Extractor:
    from .efficientnet import load_lite
    from .features import LiteFeatures

    eye = LiteFeatures(load_lite().to(device))

    def look(pictures: Tensor, numbers: range) -> Tensor:
        return eye(pictures / 127.5 - 1, (GRAIN_SEED + number for number in numbers))

    return Extractor("EfficientNet-Lite0 behind a light grain", f"lite0 grain {eye.grain:g}", look, components=64)


def _own(name: str, device: torch.device) -> Extractor:
    module, _, function = name.partition(":")
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(one_line(f"the extractor {name!r} cannot be found: {error}")) from error
    key = name
    if isinstance(network, nn.Module):
        network = network.to(device).eval()
        digest = hashlib.sha256()
        for entry, tensor in sorted(network.state_dict().items()):
            digest.update(entry.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        key += f" {digest.hexdigest()}"

    @torch.no_grad()
    def look(pictures: Tensor, numbers: range) -> Tensor:
        features = network(pictures.to(device) / 127.5 - 1)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(pictures):
            raise ValueError(f"the extractor {name!r} must return features of shape (pictures, numbers)")
        return features.float().cpu()

    return Extractor(name, key, look)
