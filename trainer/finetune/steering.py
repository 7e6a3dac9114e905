"""What keeps the word of a relation among words of its kind (ReVersion, Huang et al., 2023).

Learned from a few pictures, a word takes up what they show: their things, their style. A relation is said by words
such as prepositions, so it is drawn towards some of those and away from the other words of its caption:

    L = -log( sum_P exp(R.p / g) / (sum_P exp(R.p / g) + sum_N exp(R.n / g)) )

over unit vectors of the text encoder's input table; R the word, P prepositions, N the caption's words, g a temperature.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wadi_core.words import Words

from ..data.random_draws import uniform64

# Words that say how things stand to each other: English has few, and each is a single word of CLIP's vocabulary.
PREPOSITIONS = tuple(
    "aboard about above across after against along alongside amid among around as at atop before behind below beneath "
    "beside between beyond by down during facing for from in inside into like near of off on onto opposite out outside "
    "over past through throughout to toward under underneath up upon versus via with within without".split()
)
# Of a caption these say nothing of what is on the picture.
EMPTY = frozenset("a an the and or is are was be been being it its this that these those there photo picture image".split())
DRAWN = 33  # purpose of random numbers


def steering_loss(words: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """The loss of one sample, a scalar.

    Args:
        words: (m, width) what is trained; the mean over its rows is taken.
        positive: (p, width), p at least 1.
        negative: (n, width), n may be 0.
        temperature: g.
    """
    unit = F.normalize(words, dim=1)
    near, far = (unit @ F.normalize(others, dim=1).T / temperature for others in (positive, negative))
    return (torch.cat([near, far], dim=1).logsumexp(1) - near.logsumexp(1)).mean()


def content_words(caption: str, without: Sequence[str]) -> list[str]:
    """The words of a caption that name what is on the picture: no articles, no prepositions, none of ``without``."""
    for start, end, _ in reversed(list(Words(without).find(caption))):
        caption = f"{caption[:start]} {caption[end:]}"
    found = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", caption.lower())
    return [word for word in dict.fromkeys(found) if word not in EMPTY and word not in PREPOSITIONS]


def drawn(words: Sequence[str], count: int, seed: int, number: int) -> list[str]:
    """So many different words for the sample of this number, all of them where there are no more."""
    order = sorted(range(len(words)), key=lambda index: uniform64(seed, DRAWN, number, index))
    return [words[index] for index in order[:count]]
