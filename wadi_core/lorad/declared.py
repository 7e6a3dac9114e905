"""What a base says of itself: what its network returns, and the schedule that it was trained with.

A folder has scheduler settings. A single file has marks: empty tensors (``v_pred``, ``ztsnr``) beside the others, and
the metadata of the model specification. What a base says and this package cannot follow is refused by name: pictures
made in spite of it would be noise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .. import configs
from ..files import refusal
from ..schedule import PREDICTION_TYPES

V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
_SPELLINGS = {"eps": "epsilon", "epsilon": "epsilon", "v": "v_prediction", "vpred": "v_prediction", "v_pred": "v_prediction"}
_SPELLINGS |= {"v_prediction": "v_prediction", "v-prediction": "v_prediction", "velocity": "v_prediction"}
_METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
_ZERO_SNR_METADATA = "ss_zero_terminal_snr"
# What samples in another way than by removing noise at timesteps 0 to 999.
_OTHER_SCHEDULERS = r"FlowMatch|EDM|VQDiffusion|CMStochastic|ScoreSde|KarrasVe|IPNDM|RePaint|UnCLIP|DDPMWuerstchen"
_ZERO_SNR = "it was trained to start at pure noise (zero terminal SNR), which one step at alpha_T^2 above 0 does not do"


def scheduler_settings(folder: Path) -> dict[str, Any]:
    """The scheduler settings of a folder in diffusers layout; empty where it has none.

    Raises:
        OSError, ValueError: they cannot be read; one line.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    return configs.read(path) if path.is_file() else {}


def of_folder(folder: Path) -> str | None:
    """What the network of a folder returns, by its scheduler settings; None where they do not say.

    Raises:
        ValueError: something that this package cannot follow; one line.
    """
    settings = scheduler_settings(folder)
    kind = settings.get("prediction_type")
    if kind not in (None, *PREDICTION_TYPES):
        needed = " or ".join(PREDICTION_TYPES)
        raise refusal(folder, f"this base predicts {kind} by its own settings; one that predicts {needed} is needed")
    if settings.get("rescale_betas_zero_snr"):
        raise refusal(folder, f"rescale_betas_zero_snr is set in its scheduler: {_ZERO_SNR}")
    name = str(settings.get("_class_name", ""))
    if re.match(_OTHER_SCHEDULERS, name):
        raise refusal(folder, f"its scheduler is a {name}, and a network of noise prediction at timesteps is needed")
    return kind


def of_file(path: object, names: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """What the network of a single file returns, by its marks and metadata; None where they do not say.

    Args:
        path: for messages.
        names: of its tensors.

    Raises:
        ValueError: something that this package cannot follow, or two of them contradict each other; one line.
    """
    if ZERO_SNR_MARK in names or metadata.get(_ZERO_SNR_METADATA, "").lower() == "true":
        raise refusal(str(path), f"this base is marked with {ZERO_SNR_MARK}: {_ZERO_SNR}")
    said = {V_MARK: "v_prediction"} if V_MARK in names else {}
    for key in _METADATA:
        if value := metadata.get(key, "").strip().lower():
            if value not in _SPELLINGS:
                raise refusal(str(path), f"it predicts {value} by {key}; one that predicts epsilon or v is needed")
            said[key] = _SPELLINGS[value]
    if metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v"):
        said["modelspec.architecture"] = "v_prediction"
    if len(set(said.values())) > 1:
        raise refusal(str(path), f"it contradicts itself: {', '.join(f'{key} says {kind}' for key, kind in said.items())}")
    return next(iter(said.values()), None)
