"""Train the attention of wadi-mini's U-Net to look at the right place: a cell of the object that belongs there.

The text encoder tells what is in the 7x7 cells of an object, each at a position of its own (:mod:`.words`). What is
left for the U-Net is to find out which cell belongs where, and through eps alone it learns this slowly, as nothing
is gained before many of them are right. The scenes know: so the cross-attentions of the finest level, and on the way
up of the next, which have two heads, are asked to look at the cell of the first object with one and of the second
with the other, and at the caption's first position where there is no object. The others are left to read what they
like. Cross-entropy asks for the honest answer: while noise hides the place, a share for every cell that may belong
here, which is also what the best guess at the picture is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wadi_core.thirdparty import DiffusersNetwork

from . import scenes

CELLS = scenes.CELLS
PLACES = scenes.SIZE // scenes.GRID  # latents along a picture
HEADS = 2  # one for each object
NOTHING = 0  # the position to look at where there is no object
FIRST_CELL = 77 - CELLS**2


def places_to_look(plan: scenes.Scene) -> Tensor:
    """(2, 16, 16): for each object the position, among the caption's 77, of the cell that belongs at a latent."""
    wanted = torch.full((HEADS, PLACES, PLACES), NOTHING, dtype=torch.uint8)
    middles = (torch.arange(PLACES) + 0.5) * scenes.GRID
    for head, item in enumerate(plan.placed):
        rows, columns = (((middles - centre) / item.size + 0.5) * CELLS for centre in (item.y, item.x))
        columns = CELLS - columns if item.mirrored else columns
        inside = ((rows > 0) & (rows < CELLS))[:, None] & ((columns > 0) & (columns < CELLS))
        cells = FIRST_CELL + rows.floor()[:, None] * CELLS + columns.floor()
        wanted[head][inside] = cells[inside].to(torch.uint8)
    return wanted


class Pointing:
    """Hears some cross-attentions of a U-Net while it computes, and says how wrongly they look.

    Args:
        unet: a ``UNet2DConditionModel`` with two heads, and with attention processors that ask for the scores.

    Raises:
        ValueError: it has another number of heads.
    """

    def __init__(self, unet: DiffusersNetwork) -> None:
        self._heard: list[Tensor] = []
        for place in (*unet.down_blocks[0].attentions, *unet.up_blocks[-2].attentions, *unet.up_blocks[-1].attentions):
            attention = place.transformer_blocks[0].attn2
            if attention.heads != HEADS:
                raise ValueError(f"the U-Net has {attention.heads} heads; pointing needs {HEADS}, one for each object")
            attention.get_attention_scores = self._hearing(attention.get_attention_scores)

    def _hearing(self, scores: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def heard(*args: Any, **options: Any) -> Tensor:
            self._heard.append(scores(*args, **options))
            return self._heard[-1]

        return heard

    def loss(self, wanted: Tensor, captioned: Tensor) -> Tensor:
        """Cross-entropy of what was heard since the last call, in nats for each place and head.

        Where a place of a level is several latents, it has a share of the cell of each.

        Args:
            wanted: (n, 2, 16, 16) from :func:`places_to_look`.
            captioned: (n,) bool, False where the caption was empty: nothing is asked there.
        """
        wanted = wanted[captioned].long()
        losses = []
        for shares in self._heard:  # (n * heads, places, positions)
            shares = shares.unflatten(0, (-1, HEADS))[captioned].float().clamp(min=1e-6)
            side = PLACES // math.isqrt(shares.shape[2])  # latents along a place
            cells = wanted.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4)
            cells = cells.flatten(4).flatten(2, 3)  # (n, heads, places, latents)
            losses.append(-shares.log().gather(3, cells).mean())
        self._heard.clear()
        return torch.stack(losses).mean()


def all_places_to_look(captions: Sequence[str]) -> Tensor:
    """(n, 2, 16, 16) for the scenes of the seeds 0 to n - 1, as the latents' shards hold them.

    Raises:
        ValueError: a caption is not that of its seed, so that the latents are of other scenes.
    """
    found = []
    for seed, caption in enumerate(captions):
        plan = scenes.scene(seed)
        if plan.caption != caption:
            raise ValueError(f"latent {seed} shows '{caption}', its seed '{plan.caption}': make the latents anew")
        found.append(places_to_look(plan))
    return torch.stack(found)
