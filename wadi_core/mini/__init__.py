"""wadi-mini, the small diffusion model that comes with the package: where it lies, and its weights as plain tensors.

It is laid out as Stable Diffusion 1.5 in diffusers layout, at 128x128 pixels. The model card is ``README.md`` in
this folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parent
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
LORAD = "wadi-mini-one-step.safetensors"
CONTROL = "controlnet-canny"
EMBEDDINGS, ADAPTERS = "embeddings", "adapters"  # folders of what was learned on it: words, and adapters


def folder() -> Path:
    """The folder of the multi-step base (the teacher), in diffusers layout.

    Raises:
        OSError: its weights are not in this installation; one line.
    """
    for name in WEIGHTS.values():
        _installed(name)
    return FOLDER


def lorad_path() -> Path:
    """The LoRaD file that makes the base a one-step student.

    Raises:
        OSError: it is not in this installation; one line.
    """
    return _installed(LORAD)


def control_path() -> Path:
    """The folder of the ControlNet for edges (canny), in diffusers layout; it was trained for the multi-step base.

    Raises:
        OSError: it is not in this installation; one line.
    """
    return _installed(f"{CONTROL}/diffusion_pytorch_model.safetensors").parent


def embedding_paths() -> list[Path]:
    """The files of the words that it has learned.

    Raises:
        OSError: there is none in this installation; one line.
    """
    found = sorted((FOLDER / EMBEDDINGS).glob("*.safetensors"))
    return found or [_installed(f"{EMBEDDINGS}/left-of.safetensors")]


def state_dicts() -> dict[str, dict[str, Tensor]]:
    """The weights of ``unet``, ``vae`` and ``text_encoder``: name -> tensor (float16), without diffusers.

    Names are those of diffusers and, for the text encoder, those that begin with ``text_model.``, whichever version
    of transformers wrote the file.

    Raises:
        OSError: the weights are not in this installation; one line.
    """
    from safetensors.torch import load_file

    weights = {part: load_file(folder() / name) for part, name in WEIGHTS.items()}
    weights["text_encoder"] = usual_names(weights["text_encoder"])
    return weights


def usual_names(text_encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CLIP text encoder under names that begin with ``text_model.``: transformers 5 leaves that out."""
    prefix = "text_model."
    return {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in text_encoder.items()}


def control_state() -> dict[str, Tensor]:
    """The weights of the ControlNet: diffusers' name -> tensor (float16).

    Raises:
        OSError: it is not in this installation; one line.
    """
    from safetensors.torch import load_file

    return load_file(control_path() / "diffusion_pytorch_model.safetensors")


def _installed(name: str) -> Path:
    path = FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this file of wadi-mini is missing: get the repository again, with its large files")
    return path
