"""Random numbers that know their place: the noise of a sample follows from the seed and the sample's number alone.

However the samples of a step are shared out among processes and network calls, they see the same noise, and a run
that goes on from a checkpoint needs no state to draw what it would have drawn. Philox is made for this: it maps a key
and a counter to random bits (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

TIMESTEPS = 1000  # of the forward process
NOISY_FROM = 900  # where there is little but noise, and a one-step student is asked

# What random numbers are for; part of the key, so that no two purposes share any. Fine-tuning has others.
STUDENT, FAKE, PROMPTS, COCO, ADVERSARY, BUCKET = 1, 2, 6, 7, 8, 9

# Of the orders that shuffled() gives. Checkpoints hold it: another order would train on other samples without a word.
ORDER = 2
OTHER_ORDER = (
    "holds a run of another version of this trainer, which shuffled otherwise: finish it with that version, or choose "
    "another output folder"
)
WORD = (1 << 64) - 1


def uniform64(*key: int) -> int:
    """64 bits that look random and follow from some integers (splitmix64, Steele et al. 2014, chained)."""
    mixed = 0
    for number in key:
        mixed = ((mixed ^ (number & WORD)) + 0x9E3779B97F4A7C15) & WORD
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & WORD
        mixed ^= mixed >> 31
    return mixed


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int, purpose: int, time: int = 0) -> np.ndarray:
    """``range(count)`` in a random order of its own for each purpose and each time round; not to be written to.

    It is the order of random bits: those of a generator are the same in every version of numpy and on every machine,
    and its permutations are not.
    """
    key, counter = np.array([seed, purpose], np.uint64), np.array([0, 0, 0, time], np.uint64)
    order = np.argsort(np.random.Philox(key=key, counter=counter).random_raw(count), kind="stable")
    order.flags.writeable = False
    return order


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
        purpose: :data:`STUDENT`, :data:`FAKE` or :data:`ADVERSARY`.
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
