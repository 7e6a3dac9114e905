"""Prompt Batch: several prompts as one conditioning, so that one call of the network draws a picture for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io
from torch import Tensor

from . import pixart
from .schema import schema

if TYPE_CHECKING:
    from comfy.sd import CLIP

LINES = 64  # as many pictures as a sampler draws at once
SECTION = 77  # tokens: CLIP's texts are one or several times as long
LONGEST = 60 * SECTION


class PromptBatch(io.ComfyNode):
    """Lines of text as a batch of prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_PromptBatch",
            display_name="Prompt Batch",
            category="WaDi/conditioning",
            description="Encodes several prompts, one a line, into one conditioning: one network call draws a picture for "
            "each. Connect count to the sampler's batch_size.",
            search_aliases=["prompt list", "batch prompts", "multiple prompts", "multi prompt", "text encode", "wadi"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="One prompt a line, up to 64. Empty lines are left out.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="The prompts, as one batch."),
                io.Int.Output(display_name="count", tooltip="Number of prompts, for batch_size."),
            ],
        )

    @classmethod
    def execute(cls, clip: CLIP, text: str) -> io.NodeOutput:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError("there is no prompt: write one a line")
        if len(lines) > LINES:
            raise ValueError(f"there are {len(lines)} prompts: a batch holds up to {LINES}")
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in lines]
        # A text encoder with hooks has several entries for each prompt, of the same spans of time.
        return io.NodeOutput([batched(parts) for parts in zip(*encoded, strict=True)], len(lines))


def batched(parts: Sequence[tuple[Tensor, dict[str, Any]]]) -> list[Any]:
    """One entry of a conditioning out of an entry for each prompt.

    Raises:
        ValueError: texts of these lengths cannot be in one batch; one line.
    """
    settings = dict(parts[0][1])
    pooled = [more["pooled_output"] for _, more in parts if more.get("pooled_output") is not None]
    if pooled:
        settings["pooled_output"] = torch.cat(pooled)
    return [torch.cat(equally_long([text for text, _ in parts])), settings]


def equally_long(texts: Sequence[Tensor]) -> list[Tensor]:
    """(1, tokens, width) texts, repeated to one length.

    A network's attention to a text that is there several times is that to the text: weights are shared by the copies.
    Padding of any other kind would be attended to.

    Raises:
        ValueError: there is no common length that networks take; one line.
    """
    lengths = {text.shape[1] for text in texts}
    if len(lengths) > 1 and any(length % SECTION for length in lengths):
        # PixArt's texts are as long as their tokens; more of them are cut off.
        texts = [text[:, : pixart.TOKENS] for text in texts]
        lengths, longest = {text.shape[1] for text in texts}, pixart.TOKENS
    else:
        longest = LONGEST
    common = math.lcm(*lengths)
    if common > longest and len(lengths) > 1:
        said = ", ".join(map(str, sorted(lengths)))
        raise ValueError(f"these prompts have {said} tokens and cannot share a batch here: make them equally long")
    return [text.repeat(1, common // text.shape[1], 1) for text in texts]
