"""Where the figures and sheets of a run are shown: TensorBoard's event files, and Weights & Biases."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from wadi_core.packages import install

logger = logging.getLogger("wadi")


class Tracker(Protocol):
    """One of them."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one number to each curve."""
        ...

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Add a picture."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class Trackers:
    """Several of them as one; none at all is fine too."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = list(trackers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.scalars(step, values)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        for tracker in self.trackers:
            tracker.picture(step, name, picture)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


class WeightsAndBiases:
    """A run of Weights & Biases, the same one each time that the run goes on.

    Args:
        mode: ``offline`` writes files that ``wandb sync`` takes, ``online`` sends them as they come.
        project: it belongs to.
        folder: of the run; its files go below it, and its path is the run's identity.
        settings: shown with it.

    Raises:
        ValueError: wandb is not installed, or cannot begin; one line.
    """

    def __init__(self, mode: str, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports] - optional
        except ImportError as error:
            raise ValueError(f"wandb: {mode} needs the package wandb ({error}): {install('wandb')}") from None
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                dir=str(folder),
                id=identity,
                config=dict(settings),
                mode=mode,
                resume="allow",
            )
        except wandb.Error as error:
            raise ValueError(f"wandb: it cannot begin: {str(error).partition(chr(10))[0]}") from error
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def close(self) -> None:
        self._run.finish()
