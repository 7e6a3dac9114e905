"""What a network is told about its pictures: embeddings of prompts and, for T5, which of them are words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Embedded prompts, one a row.

    Attributes:
        text: (n, tokens, width).
        mask: (n, tokens), 1 where there is a token and 0 where there is padding; None where padding is attended to
            as well, as Stable Diffusion does.
    """

    text: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: slice) -> Condition:
        return Condition(self.text[rows], None if self.mask is None else self.mask[rows])

    def to(self, *args: Any) -> Condition:
        """Moved to a device, or the text in another type; the mask keeps its own."""
        text = self.text.to(*args)
        return Condition(text, None if self.mask is None else self.mask.to(text.device))

    def joined(self, other: Condition) -> Condition:
        """These rows and after them as many of ``other``, whose one row is repeated."""
        text = torch.cat([self.text, other.text.expand_as(self.text)])
        if self.mask is None or other.mask is None:
            return Condition(text)
        return Condition(text, torch.cat([self.mask, other.mask.expand_as(self.mask)]))

    def where(self, chosen: Tensor, other: Condition) -> Condition:
        """Rows of ``other`` (one, repeated) where ``chosen`` (n,) is true, else these."""
        text = torch.where(chosen[:, None, None], other.text, self.text)
        if self.mask is None or other.mask is None:
            return Condition(text)
        return Condition(text, torch.where(chosen[:, None], other.mask, self.mask))
