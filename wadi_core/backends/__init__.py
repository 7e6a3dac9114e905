"""Who computes a pipeline's networks: PyTorch as it is (``eager``), or a compiler of another project.

A backend offers stand-ins for the U-Net and the decoder, which are called as these are. It looks at the parameters before
each call: where adapters have turned weights since, the stand-in is compiled anew from them, and nothing is exported again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ..thirdparty import DiffusersNetwork

EAGER = "eager"
BACKENDS = (EAGER, "openvino")


class Backend(Protocol):
    """What a pipeline needs of a backend."""

    def unet(self, network: DiffusersNetwork, precision: str) -> Any:
        """A stand-in, called with latents, a timestep and ``encoder_hidden_states``; returns what has a ``sample``."""
        ...

    def decoder(self, network: DiffusersNetwork, precision: str) -> Any:
        """A stand-in with ``config`` and ``decode``."""
        ...


def make(name: str, device: torch.device) -> Backend | None:
    """The backend of this name; None is PyTorch as it is.

    Raises:
        ValueError: there is no such backend, it is not installed, or it has nothing for this device; one line.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    if name == EAGER:
        return None
    if device.type != "cpu":
        raise ValueError(f"the backend {name} is for the CPU here, not for {device}: leave it out")
    from .openvino import OpenVino

    return OpenVino()
