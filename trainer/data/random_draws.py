"""Random numbers that know their place: the noise of a sample follows from the seed and the sample's number alone.

However the samples of a step are shared out among processes and network calls, they see the same noise, and a run
that goes on from a checkpoint needs no state to draw what it would have drawn. Philox is made for this: it maps a key
and a counter to random bits (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TIMESTEPS = 1000  # of the forward process
NOISY_FROM = 900  # where there is little but noise, and a one-step student is asked

# What the numbers of a sample are for; part of the key, so that no two purposes share any.
STUDENT, FAKE = 1, 2


@dataclass(frozen=True)
class Draw:
    """The random numbers of some samples, one a row.

    Attributes:
        z: (n, c, h, w) standard normal, the student's input.
        eps: (n, c, h, w) standard normal, with which its pictures are noised again.
        t: (n,) timesteps to which they are noised.
        lot: (n,) float64, uniform in [0, 1), by which prompts are dropped.
    """

    z: Tensor
    eps: Tensor
    t: Tensor
    lot: Tensor


def draw(seed: int, purpose: int, numbers: Iterable[int], shape: tuple[int, ...], low: int, high: int) -> Draw:
    """Draw for some samples.

    Args:
        seed: of the run.
        purpose: :data:`STUDENT` or :data:`FAKE`.
        numbers: of the samples, counted from the beginning of the run.
        shape: (c, h, w) of a latent.
        low, high: range of the timesteps, both included.
    """
    z, eps, t, lot = [], [], [], []
    for number in numbers:
        random = np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, number, 0]))
        t.append(int(random.integers(low, high, endpoint=True)))
        lot.append(random.random())
        both = random.standard_normal((2, *shape), dtype=np.float32)
        z.append(both[0])
        eps.append(both[1])
    return Draw(
        torch.from_numpy(np.stack(z)), torch.from_numpy(np.stack(eps)), torch.tensor(t), torch.tensor(lot, dtype=torch.float64)
    )


def importance_timesteps(lot: Tensor, share: float, noisy: float = 0.0) -> Tensor:
    """Timesteps (n,) from numbers (n,) that are uniform in [0, 1): f(t) = (1 - share cos(pi t / T)) / T.

    The relation of things is decided at large t (ReVersion, Huang et al., 2023; share 0.5 there). At share 0 they are
    uniform. ``noisy`` of them are taken from the last tenth instead, evenly.
    """
    t = torch.arange(TIMESTEPS, dtype=torch.float64)
    density = (1 - noisy) * (1 - share * torch.cos(torch.pi * (t + 0.5) / TIMESTEPS)) / TIMESTEPS
    density += noisy * (t >= NOISY_FROM) / (TIMESTEPS - NOISY_FROM)
    total = (density / density.sum()).cumsum(0)
    return torch.searchsorted(total, lot.double(), right=True).clamp(max=TIMESTEPS - 1)
