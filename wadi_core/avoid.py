"""Negative prompts for stock pipelines of diffusers that draw in one step.

    from wadi_core.avoid import avoid

    with avoid(pipe, "a bicycle"):
        pipe("a cat and a bicycle").images[0]

A pipeline that :func:`~.scheduler.load_lorad` or :func:`~.scheduler.make_one_step` made one of one step does the same
with the ``negative_prompt`` that it is called with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from . import guidance, negative
from .negative import Guidance, Negatives


def avoid(
    pipe: Any,
    texts: Negatives,
    scale: float | None = None,
    method: str | Guidance = negative.DEFAULT,
    pictures: int = 1,
) -> ExitStack:
    """Steer a pipeline's network away from what texts say, until the returned stack is closed.

    Args:
        pipe: with a U-Net of Stable Diffusion 1 or 2 or a PixArt transformer, and its own text encoder.
        texts: one for all pictures. In a list there is one for each picture, or an entry of several texts.
        scale: how strongly; 0 is not at all. By default what the method's preset says.
        method: one of ``negative.PRESETS``, or numbers of one's own.
        pictures: how many a call of the network draws; needed where each has a negative prompt of its own.

    Raises:
        ValueError: numbers outside their range, or a network without cross-attention; one line.
    """
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{type(pipe).__name__} has neither a U-Net nor a transformer that a negative prompt could steer")
    unwanted = negative.of_each(texts, negative.preset(method, scale), pictures)
    if len(set(unwanted)) == 1:
        unwanted = unwanted[:1]  # for as many rows as there will be
    return guidance.attach_each(network, unwanted, lambda text: _encoded(pipe, text))


def of_call(pipe: Any, arguments: dict[str, Any]) -> ExitStack:
    """:func:`avoid` for the arguments of a pipeline's call."""
    texts, prompts = arguments.get("negative_prompt"), arguments.get("prompt")
    each = arguments.get("num_images_per_prompt") or 1
    count = 1 if prompts is None or isinstance(prompts, str) else len(prompts)
    if isinstance(texts, Sequence) and not isinstance(texts, str) and len(texts) > 1:
        texts = [text for text in texts for _ in range(each)]
    return avoid(pipe, texts, pictures=count * each)


@torch.no_grad()
def _encoded(pipe: Any, text: str) -> Tensor:
    """(tokens, width), of PixArt's without the padding that its network would not look at."""
    found = pipe.encode_prompt(
        prompt=text, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    embeds, mask = found[0], found[1] if getattr(pipe, "transformer", None) is not None else None
    return embeds[0] if mask is None else embeds[0][mask[0].bool()]
