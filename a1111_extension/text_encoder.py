"""The text encoder of a checkpoint that keeps its settings and tokenizer in a folder beside it, as wadi-mini does.

The ``.yaml`` beside such a checkpoint names :func:`beside`, which A1111 then calls. A path could not stand there: folders
are moved, and A1111 reads a relative one from wherever it was started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules import sd_models


def beside(folder: str) -> Any:
    """A1111's object of a text encoder, without its weights: they are in the checkpoint.

    Args:
        folder: the name of a folder beside the checkpoint.

    Raises:
        FileNotFoundError: there is none; one line.
    """
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder

    places = {Path(info.filename).parent / folder for info in sd_models.checkpoints_list.values()}
    found = next((place for place in sorted(places) if (place / "config.json").is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: there is no such folder with the text encoder's settings beside the checkpoint")
    return FrozenCLIPEmbedder(version=str(found))
