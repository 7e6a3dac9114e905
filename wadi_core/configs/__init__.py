"""Settings of the networks that this package knows by itself, in diffusers layout, and the CLIP vocabulary.

They let a single-file checkpoint be loaded with no network connection. Origin and licence are in ``NOTICE.md``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOLDERS = {"sd15": HERE / "sd15", "sd21": HERE / "sd21", "wadi-mini": HERE.parent / "mini"}
SHAPES = {**FOLDERS, "pixart": HERE / "pixart"}  # the last for estimates alone: it has no tokenizer
# The one copy of vocab.json and merges.txt: wadi-mini is a whole pipeline for other programs too, the rest share it.
TOKENIZER = FOLDERS["wadi-mini"] / "tokenizer"


def folder(architecture: str) -> Path:
    """The folder with the settings of ``sd15``, ``sd21`` (2.1-base), ``wadi-mini`` or ``pixart`` (XL/2, 256 px); no weights.

    Raises:
        ValueError: no settings are shipped for this architecture.
    """
    if architecture not in SHAPES:
        raise ValueError(f"no settings are shipped for {architecture}: known are {', '.join(SHAPES)}")
    return SHAPES[architecture]


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or not an object; one line.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise type(error)(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: this is not a JSON file") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: a JSON object is needed")
    return settings
