"""The one-step schedule: from noise to a clean latent with one call of the network.

    z ~ N(0, I),   x = k z
    epsilon:       x0 = (x - sigma_T * eps(x, T)) / alpha_T
    v_prediction:  x0 = alpha_T * x - sigma_T * v(x, T)

alpha_T^2 is a property of the adapter, not of the base: the student was trained with one value, 0.0047 in the
released weights, while Stable Diffusion's own schedule ends at 0.0046601 and PixArt's at 4.04e-5. It is divided
by alpha_T = 0.0686, so an error of the network's output is multiplied by sigma_T / alpha_T = 14.55.

The network sees the noise itself (k = 1: WaDi, SwiftBrush, DMD2), or noise of the variance that there is at its timestep
(k = sigma_T: SiD-LSG, Zhou et al., 2024). At t = 999 the two hardly differ; at t = 625 sigma_T is 0.93.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")
INPUT_SCALES = ("one", "sigma")
SMALLEST_ALPHA = 1e-8  # alpha_T^2; below, what the network gets wrong is multiplied by more than 10,000


@dataclass(frozen=True)
class OneStep:
    """The point of the diffusion process at which a one-step student is called.

    Attributes:
        alpha_T_squared: share of the signal in the variance at the last timestep, from 1e-8 to below 1.
        timestep: what the network is told, from 0 to 999.
        prediction_type: what the network returns, ``epsilon`` or ``v_prediction``.
        input_scale: what the noise is multiplied by before the network sees it: ``one``, or ``sigma`` for sigma_T.

    Raises:
        ValueError: a value outside its range.
    """

    alpha_T_squared: float = 0.0047
    timestep: int = 999
    prediction_type: str = "epsilon"
    input_scale: str = "one"

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha_T_squared < 1.0:
            raise ValueError(f"alpha_T^2 must lie between 0 and 1, not {self.alpha_T_squared}")
        if self.alpha_T_squared < SMALLEST_ALPHA:
            raise ValueError(f"alpha_T^2 is {self.alpha_T_squared:g}: below {SMALLEST_ALPHA:g} nothing of a picture is left")
        if not 0 <= self.timestep <= 999:
            raise ValueError(f"the timestep must lie between 0 and 999, not {self.timestep}")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"the prediction type must be one of {', '.join(PREDICTION_TYPES)}")
        if self.input_scale not in INPUT_SCALES:
            raise ValueError(f"the input scale must be one of {', '.join(INPUT_SCALES)}")

    @property
    def alpha_T(self) -> float:
        return math.sqrt(self.alpha_T_squared)

    @property
    def sigma_T(self) -> float:
        return math.sqrt(1.0 - self.alpha_T_squared)

    @property
    def sigma(self) -> float:
        """sigma_T / alpha_T, the noise level as k-diffusion counts it: 14.552 for 0.0047."""
        return self.sigma_T / self.alpha_T

    def network_input(self, z: Tensor) -> Tensor:
        """x = k z: what the network sees of standard normal noise z, of its shape and type."""
        return z * self.sigma_T if self.input_scale == "sigma" else z

    def x0(self, x: Tensor, prediction: Tensor) -> Tensor:
        """The clean latent, in the type of ``x``; computed in float32, or float64 for a float64 ``x``.

        Args:
            x: (n, c, h, w) what the network saw, as :meth:`network_input` makes it.
            prediction: (n, c, h, w) the network's output, or (n, 2c, h, w) with a learned sigma (PixArt), whose
                second half is left out.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        if prediction.shape[1] == 2 * x.shape[1]:
            prediction = prediction[:, : x.shape[1]]
        seen, output = x.to(dtype), prediction.to(dtype)
        if self.prediction_type == "epsilon":
            x0 = (seen - self.sigma_T * output) / self.alpha_T
        else:
            x0 = self.alpha_T * seen - self.sigma_T * output
        return x0.to(x.dtype)


def check_latents(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """The latents themselves, if all of their numbers are finite: no picture can be made of others.

    Args:
        dtype: in which the network was called, for the message.

    Raises:
        ValueError: NaN or Inf; one line.
    """
    if not latents.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        why = "its weights or an adapter are damaged, or its numbers are too large for float16: try bf16 or fp32"
        raise ValueError(f"the network returned NaN or Inf (in {kind}), and there is no picture: {why}")
    return latents
