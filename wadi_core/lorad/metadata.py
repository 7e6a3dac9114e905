"""What an adapter file says of itself: the fields, and the strings under which hosts and managers look for them.

``wadi.*`` is this project's own; ``ss_*`` and ``sshs_*`` follow sd-scripts (A1111, LoRA managers), ``modelspec.*``
the Stability ModelSpec (ComfyUI's front end, managers).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ..schedule import PREDICTION_TYPES, OneStep
from .checkpoint import DTYPE_NAMES, encode_header, raw_bytes
from .layers import ARCHITECTURES

FORMAT = 2  # the newest that is read; a file is written as 1 unless it needs what 1 does not know
PAIRING = "interleaved-input"

Number = TypeVar("Number", int, float)

_SS_BASE = {"sd15": "sd-v1-5", "sd21": "sd-v2-1"}
_RESOLUTION = {"sd15": "512x512", "sd21": "512x512", "pixart-alpha": "256x256", "wadi-mini": "128x128"}
_MODELSPEC_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}

# Everything that to_strings writes; what else a file holds is carried along in ``extra``.
_OWN = {
    *("wadi.format", "wadi.alpha_T_squared", "wadi.timestep", "wadi.sha256", "wadi.prediction_type", "wadi.input_scale"),
    *("wadi.architecture", "wadi.base_sha256", "wadi.pairing"),
    *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_base_model_version", "ss_v2", "ss_output_name"),
    *("sshs_model_hash", "sshs_legacy_hash"),
    *("modelspec.sai_model_spec", "modelspec.implementation", "modelspec.architecture", "modelspec.title"),
    *("modelspec.resolution", "modelspec.prediction_type", "modelspec.timestep_range", "modelspec.usage_hint"),
    *("modelspec.license", "modelspec.thumbnail"),
}


@dataclass(frozen=True)
class Metadata:
    """The fields of an adapter file.

    Attributes:
        architecture: the network it is for, one of :data:`~.layers.ARCHITECTURES`.
        alpha_T_squared, timestep: the one-step schedule, both or neither; with neither it is an ordinary adapter
            (a style, a subject) that changes no sampling.
        prediction_type: what the network it was trained on returns.
        input_scale: of the one-step schedule, as :attr:`.OneStep.input_scale`.
        base_sha256: :func:`~.layers.network_sha256` of the base it was trained on, where known.
        title, license: as a person would write them, where known.
        resolution: width and height in pixels as ``512x512``; None for the native one of the architecture.
        thumbnail: a picture as a data URI.
        extra: other metadata of the file, carried along as it is.

    Raises:
        ValueError: a value that no file may hold; one line.
    """

    architecture: str = "unet-custom"
    alpha_T_squared: float | None = None
    timestep: int | None = None
    prediction_type: str = "epsilon"
    base_sha256: str | None = None
    title: str | None = None
    resolution: str | None = None
    license: str | None = None
    thumbnail: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    input_scale: str = "one"

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.architecture!r}: expected one of {', '.join(ARCHITECTURES)}")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction type {self.prediction_type!r}: expected one of {', '.join(PREDICTION_TYPES)}")
        if (self.alpha_T_squared is None) != (self.timestep is None):
            raise ValueError("of alpha_T_squared and timestep there must be both or neither")
        if self.base_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.base_sha256):
            raise ValueError("base_sha256 must be 64 hexadecimal digits")
        self.one_step  # noqa: B018 - its own checks of the ranges

    @property
    def one_step(self) -> OneStep | None:
        """The schedule of a one-step student; None for an ordinary adapter."""
        if self.alpha_T_squared is None or self.timestep is None:
            return None
        return OneStep(self.alpha_T_squared, self.timestep, self.prediction_type, self.input_scale)

    def to_strings(self, rank: int, output_name: str) -> dict[str, str]:
        """The metadata of a file, but for the hashes.

        Args:
            rank: the largest rank in it.
            output_name: the file's name without its ending; also the title where there is none.
        """
        one_step, architecture = self.one_step, self.architecture
        resolution = self.resolution or _RESOLUTION.get(architecture)
        optional = {
            "wadi.alpha_T_squared": one_step and repr(one_step.alpha_T_squared),
            "wadi.timestep": one_step and str(one_step.timestep),
            "wadi.input_scale": one_step.input_scale if one_step and one_step.input_scale != "one" else None,
            "wadi.base_sha256": self.base_sha256,
            "ss_v2": "True" if architecture == "sd21" else None,
            "modelspec.resolution": resolution,
            "modelspec.timestep_range": one_step and f"{one_step.timestep},{one_step.timestep}",
            "modelspec.usage_hint": one_step and "1 step, CFG 1",
            "modelspec.license": self.license,
            "modelspec.thumbnail": self.thumbnail,
        }
        return {
            **{key: value for key, value in self.extra.items() if key not in _OWN},
            "wadi.format": "2" if optional["wadi.input_scale"] else "1",
            "wadi.architecture": architecture,
            "wadi.prediction_type": self.prediction_type,
            "wadi.pairing": PAIRING,
            "ss_network_module": "wadi_core",
            "ss_network_dim": str(rank),
            "ss_network_alpha": "None",
            "ss_base_model_version": _SS_BASE.get(architecture, architecture),
            "ss_output_name": output_name,
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.implementation": "wadi_core",
            "modelspec.architecture": f"{self._modelspec_base()}/lora",
            "modelspec.title": self.title or output_name,
            "modelspec.prediction_type": _MODELSPEC_PREDICTION[self.prediction_type],
            **{key: value for key, value in optional.items() if value is not None},
        }

    def _modelspec_base(self) -> str:
        if self.architecture == "sd21":
            return "stable-diffusion-v2-512" if self.prediction_type == "epsilon" else "stable-diffusion-v2-768-v"
        return "stable-diffusion-v1" if self.architecture == "sd15" else self.architecture

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], architecture: str = "unet-custom") -> Metadata:
        """The fields in a file's metadata.

        Args:
            strings: the metadata.
            architecture: what to take where the file does not say.

        Raises:
            ValueError: a newer format, or a value that is none; one line.
        """
        found = _number(strings, "wadi.format", int)
        if found is not None and found > FORMAT:
            raise ValueError(f"LoRaD format {found} is newer than the {FORMAT} that this version of wadi reads: update wadi")
        if found is not None and found < 1:
            raise ValueError(f"there is no LoRaD format {found}")
        if strings.get("wadi.pairing", PAIRING) != PAIRING:
            raise ValueError(f"unknown pairing {strings['wadi.pairing']!r}: expected {PAIRING}")
        return cls(
            architecture=strings.get("wadi.architecture", architecture),
            alpha_T_squared=_number(strings, "wadi.alpha_T_squared", float),
            timestep=_number(strings, "wadi.timestep", int),
            prediction_type=strings.get("wadi.prediction_type", "epsilon"),
            input_scale=strings.get("wadi.input_scale", "one"),
            base_sha256=strings.get("wadi.base_sha256"),
            title=strings.get("modelspec.title"),
            resolution=strings.get("modelspec.resolution"),
            license=strings.get("modelspec.license"),
            thumbnail=strings.get("modelspec.thumbnail"),
            extra={key: value for key, value in strings.items() if key not in _OWN},
        )


def schedule_strings(one_step: OneStep) -> dict[str, str]:
    """The metadata by which a network's own file says that it is a one-step network."""
    return {
        "wadi.alpha_T_squared": repr(one_step.alpha_T_squared),
        "wadi.timestep": str(one_step.timestep),
        "wadi.prediction_type": one_step.prediction_type,
        **({} if one_step.input_scale == "one" else {"wadi.input_scale": one_step.input_scale}),
        "modelspec.usage_hint": "1 step, CFG 1",
    }


def _number(strings: Mapping[str, str], key: str, kind: type[Number]) -> Number | None:
    text = strings.get(key)
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key} is {text[:40]!r}, which is not a number") from None


def content_sha256(tensors: Mapping[str, Tensor], strings: Mapping[str, str]) -> str:
    """SHA-256 over each tensor's name, dtype, shape and bytes in name order, then the other ``wadi.*`` values.

    Each tensor's bytes follow a line of JSON, ``["<name>", "<dtype as safetensors calls it>", [<shape>]]``; each
    value is such a line, ``["<key>", "<value>"]``, in key order. ASCII, no other spaces than ``", "``.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        line = [name, DTYPE_NAMES[tensor.dtype], list(tensor.shape)]
        digest.update(json.dumps(line).encode() + b"\n")
        digest.update(raw_bytes(tensor))
    for key in sorted(strings):
        if key.startswith("wadi.") and key != "wadi.sha256":
            digest.update(json.dumps([key, strings[key]]).encode() + b"\n")
    return digest.hexdigest()


def sd_scripts_hashes(tensors: Mapping[str, Tensor], strings: Mapping[str, str]) -> dict[str, str]:
    """``sshs_model_hash`` and ``sshs_legacy_hash``, by which A1111 and LoRA managers know a file.

    The convention of sd-scripts: both are taken of a file with no metadata but ``ss_*``; the first is the SHA-256
    of all that follows the header, the second the first 8 digits of that of 64 KiB from the first MiB on.
    """
    header, names = encode_header(tensors, {key: value for key, value in strings.items() if key.startswith("ss_")})
    begin, end = 0x100000, 0x110000
    data, window, position = hashlib.sha256(), hashlib.sha256(), len(header)
    window.update(header[begin:end])
    for name in names:
        content = raw_bytes(tensors[name])
        data.update(content)
        window.update(content[max(begin - position, 0) : max(end - position, 0)])
        position += len(content)
    return {"sshs_model_hash": data.hexdigest(), "sshs_legacy_hash": window.hexdigest()[:8]}
