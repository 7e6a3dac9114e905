"""What one picture is made with: one description for the command line, the PNG file and the hosts' panels.

Each field carries its help and its limits, so that a panel or a parser is built from it instead of repeating it.
``device`` and how many pictures share a network call are not in it: they do not change the picture.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from .files import one_line
from .negative import Negative
from .text_files import is_text

VERSION = 1
SAMPLER = "WaDi one-step"
SIZE_STEP = 8  # pixels per latent
DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("exact", "balanced", "fast")
HIRES = ("redilate", "shrink")
PREDICTION_TYPES = ("epsilon", "v_prediction")
INPUT_SCALES = ("one", "sigma")


def _field(default: Any, help: str, **limits: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Adapter:
    """An adapter that takes part: the name of its file, its strength, and the hash of its content where known.

    Raises:
        ValueError: the strength is not a finite number; one line.
    """

    file: str
    strength: float = 1.0
    sha256: str = ""

    def __post_init__(self) -> None:
        _check_type("adapter", self.file, str)
        _check_type("sha256", self.sha256, str)
        _check_type("strength", self.strength, float)
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be a finite number, not {self.strength}")


@dataclass(frozen=True)
class Control:
    """A ControlNet that takes part: the name of its file, its scale, the hash of its file, and the control image.

    Raises:
        ValueError: the scale is not a number from 0 to 4; one line.
    """

    file: str
    scale: float = 1.0
    sha256: str = ""
    image: str = ""

    def __post_init__(self) -> None:
        for text in (self.file, self.sha256, self.image):
            _check_type("control", text, str)
        _check_type("control scale", self.scale, float)
        if not 0.0 <= self.scale <= 4.0:
            raise ValueError(f"a control scale must lie from 0 to 4, not {self.scale}")


@dataclass(frozen=True)
class Learned:
    """A learned word that prompts may say: the name of its file, the word, and the hash of the file.

    Raises:
        ValueError: a value of another type; one line.
    """

    file: str
    token: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        for text in (self.file, self.token, self.sha256):
            _check_type("embedding", text, str)


@dataclass(frozen=True)
class Settings:
    """Settings of one picture as they are asked for. ``None`` means "as the network or its adapter says".

    Raises:
        ValueError: a value of another type or outside its limits; one line that names the field.
    """

    prompt: str = _field("", "what the picture shows")
    # None where the noise came from a generator or from latents that no seed stands for: no seed makes the picture again.
    seed: int | None = _field(0, "seed of the noise; picture i gets seed + i", minimum=0, maximum=2**64 - 1, unknown=True)
    width: int | None = _field(None, "width in pixels, divisible by 8 (default: native)", minimum=64, maximum=8192, step=8)
    height: int | None = _field(None, "height in pixels, divisible by 8 (default: native)", minimum=64, maximum=8192, step=8)
    base: str = _field("mini", 'the base network: a diffusers folder, a single-file checkpoint, or "mini"')
    lorad: tuple[Adapter, ...] = _field((), "adapters whose angles are added")
    embeddings: tuple[Learned, ...] = _field((), "learned words that the prompt may contain")
    control: tuple[Control, ...] = _field((), "ControlNets, each with its scale")
    negative: tuple[Negative, ...] = _field((), "what the picture is not to show, and how strongly")
    vae: str | None = _field(None, "a tiny decoder instead of the base's own (TAESD's layout)")
    hires: str | None = _field(None, "method for pictures above the native size", choices=HIRES)
    alpha_T_squared: float | None = _field(None, "share of the signal at the last timestep", least=1e-8, below=1.0)
    timestep: int | None = _field(None, "timestep given to the network", minimum=0, maximum=999)
    prediction_type: str | None = _field(None, "what the network returns", choices=PREDICTION_TYPES)
    input_scale: str | None = _field(None, "what multiplies the noise that the network sees", choices=INPUT_SCALES)
    dtype: str | None = _field(None, "number format of the networks", choices=DTYPES)
    precision: str | None = _field(None, "how exactly the parts compute, where no one format was asked for", choices=PRECISIONS)
    version: int = _field(VERSION, "version of this description", minimum=1, maximum=VERSION)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field.name, getattr(self, field.name))

    def resolved(
        self,
        width: int,
        height: int,
        alpha_T_squared: float,
        timestep: int,
        prediction_type: str,
        dtype: str,
        input_scale: str = "one",
        precision: str | None = None,
    ) -> PictureSettings:
        """These settings with the network's own values where nothing else was asked for."""
        own = {
            "width": width,
            "height": height,
            "alpha_T_squared": alpha_T_squared,
            "timestep": timestep,
            "prediction_type": prediction_type,
            "input_scale": input_scale,
            "dtype": dtype,
            "precision": precision,
        }
        asked = {name: getattr(self, name) for name in FIELDS}
        return PictureSettings(**asked | {name: value for name, value in own.items() if asked[name] is None})


def _known() -> Any:
    """A field that is asked for where needed, and known of every picture that is made."""
    return dataclasses.field(kw_only=True)


@dataclass(frozen=True)
class PictureSettings(Settings):
    """Settings of one picture with every value known: all that is needed to make it again. A PNG file holds these.

    Raises:
        ValueError: as :class:`Settings`, or a value that is not known; one line that names the field.
    """

    width: int = _known()
    height: int = _known()
    alpha_T_squared: float = _known()
    timestep: int = _known()
    prediction_type: str = _known()
    input_scale: str = dataclasses.field(default="one", kw_only=True)
    dtype: str = _known()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            needed = field.default is dataclasses.MISSING or field.name == "input_scale"
            if needed and getattr(self, field.name) is None:
                raise ValueError(f"{field.name} must be known of a picture that is made")
        super().__post_init__()

    def to_json(self) -> str:
        """One line of JSON, as it stands in the text chunk ``wadi`` of a PNG file."""
        values = dataclasses.asdict(self)
        if self.input_scale == "one":  # versions before this field refuse what they do not know
            del values["input_scale"]
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> PictureSettings:
        """The settings that :meth:`to_json` wrote.

        Raises:
            ValueError: other text, an unknown field, a missing one, or the version of a newer program; one line.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError("these are no settings: not a JSON text") from error
        if not isinstance(values, dict):
            raise ValueError("these are no settings: a JSON object is needed")
        version = values.get("version")
        if isinstance(version, int) and version > VERSION:
            raise ValueError(f"these settings have version {version}, this program knows {VERSION}: update it")
        try:
            for name, kind in PARTS.items():
                values[name] = tuple(kind(**part) for part in values.get(name, []))
            return cls(**values)
        except (TypeError, OverflowError) as error:
            raise ValueError("these are no settings: a field is unknown, is missing or has another form") from error

    def to_infotext(self, program: str) -> str:
        """The settings as people and A1111-style readers know them: the prompt, then ``Name: value`` pairs.

        Args:
            program: name and version of the program, written last.
        """
        pairs = {
            "Steps": 1,
            "Sampler": SAMPLER,
            "CFG scale": 1,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.base,
            "LoRaD": ", ".join(f"{adapter.file}: {adapter.strength:g}" for adapter in self.lorad) or None,
            "Embeddings": ", ".join(f"{one.file}: {one.token}" for one in self.embeddings) or None,
            "Negative method": ", ".join(one.method for one in self.negative) or None,
            "Negative scale": ", ".join(f"{one.scale:g}" for one in self.negative) or None,
            "ControlNet": ", ".join(f"{control.file}: {control.scale:g}" for control in self.control) or None,
            "VAE": self.vae,
            "High resolution": self.hires,
            "alpha_T squared": self.alpha_T_squared,
            "Timestep": self.timestep,
            "Prediction type": self.prediction_type,
            "Input scale": None if self.input_scale == "one" else self.input_scale,
            "Number format": self.dtype,
            "Precision": self.precision,
            "Version": program,
        }
        unwanted = "".join(f"Negative prompt: {', '.join(one.texts)}\n" for one in self.negative)
        return f"{self.prompt}\n{unwanted}" + ", ".join(f"{name}: {_quoted(v)}" for name, v in pairs.items() if v is not None)


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
PARTS = {"lorad": Adapter, "embeddings": Learned, "control": Control, "negative": Negative}
_TYPES = {**dict.fromkeys(PARTS, tuple), "alpha_T_squared": float, "vae": str}


def help_of(name: str) -> str:
    """The help of a field of :class:`Settings`."""
    return FIELDS[name].metadata["help"]


def check(name: str, value: Any) -> None:
    """Compare a value with the type and the limits of its field.

    Raises:
        ValueError: it does not fit; one line that names the field.
    """
    field = FIELDS[name]
    limits = field.metadata
    if value is None and (field.default is None or "unknown" in limits):
        return
    default = field.default
    kind = _TYPES.get(name) or (type(default) if default is not None else str if "choices" in limits else int)
    _check_type(name, value, kind)
    if "choices" in limits and value not in limits["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(limits['choices'])}, not {value}")
    if "below" in limits and not limits["least"] <= value < limits["below"]:
        raise ValueError(f"{name} must lie from {limits['least']:g} to below {limits['below']:g}, not {value}")
    if "minimum" in limits and not limits["minimum"] <= value <= limits["maximum"]:
        raise ValueError(f"{name} must lie from {limits['minimum']} to {limits['maximum']}, not {value}")
    if "step" in limits and value % limits["step"]:
        below = value - value % limits["step"]
        raise ValueError(f"{name} must be divisible by {limits['step']}, not {value}: try {below} or {below + limits['step']}")
    if name in PARTS and value is not None and not all(isinstance(part, PARTS[name]) for part in value):
        kinds = {"lorad": "adapters", "embeddings": "learned words", "control": "ControlNets", "negative": "negative prompts"}
        raise ValueError(f"{name} must hold {kinds[name]}")


def _check_type(name: str, value: Any, kind: type) -> None:
    fits = isinstance(value, (float, int)) if kind is float else isinstance(value, kind)
    if not fits or isinstance(value, bool):
        raise ValueError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    if kind is str and not is_text(value):
        raise ValueError(one_line(f"{name} is no valid text: {value!r} holds a byte or sign that is no UTF-8 character"))


def _quoted(value: object) -> str:
    """A value as A1111 writes it: quoted where it holds what separates one pair from the next."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
