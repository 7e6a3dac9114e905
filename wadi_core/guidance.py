"""Negative prompts in one call: cross-attention is steered away from what is unwanted, inside the network.

A cross-attention layer has an output Z+ for the prompt. With the same queries and the keys and values of the negative
text it has another one, Z-, at the price of two small matrix products, and no second pass of the network:

    nag    Z~ = Z+ + scale (Z+ - Z-);  Z^ = Z~ min(1, tau |Z+| / |Z~|);  Z = alpha Z^ + (1 - alpha) Z+
    nasa   Z = Z+ - scale Z-

with the L1 norm over each token's channels (Normalized Attention Guidance, Chen et al., 2025; Negative-Away Steer
Attention in SNOOPI, Nguyen et al., 2024). All of it happens before the layer's output projection.

Several texts, and texts longer than a text encoder reads at once, are one after the other in a single Z-: each query
attends to what it is most like. A text that is there twice changes nothing, which is how texts of several lengths
share a call.

    with attach(unet, encoded, PRESETS["nag"]):
        unet(z, 999, text)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import highres
from .negative import Guidance, Negative


def nag(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Normalized Attention Guidance: (..., channels) for a prompt and for what is unwanted -> the same."""
    moved = torch.lerp(negative, positive, 1.0 + scale)
    length, limit = _length(moved), tau * _length(positive)
    share = alpha * (limit / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1.0)
    return torch.lerp(positive, moved * share.to(moved) / alpha, alpha) if alpha else positive


def nasa(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Negative-Away Steer Attention: (..., channels) for a prompt and for what is unwanted -> the same."""
    return torch.sub(positive, negative, alpha=scale)


def _length(output: Tensor) -> Tensor:
    """The L1 norm of each token, which may be too large for float16."""
    return torch.linalg.vector_norm(output, ord=1, dim=-1, keepdim=True, dtype=torch.promote_types(output.dtype, torch.float32))


def steered(positive: Tensor, negative: Tensor, how: Guidance) -> Tensor:
    """Attention outputs (..., channels) for a prompt and for what is unwanted, as the method makes one of them."""
    if how.method == "nasa":
        return nasa(positive, negative, how.scale)
    return nag(positive, negative, how.scale, how.tau, how.alpha)


def joined(contexts: Sequence[Tensor]) -> Tensor:
    """Encoded texts (tokens, width) of several pictures as (pictures, tokens, width), each repeated to a common length."""
    longest = math.lcm(*(len(context) for context in contexts))
    return torch.stack([context.repeat(longest // len(context), 1) for context in contexts])


class Steering:
    """What one cross-attention layer has to do, in any program: diffusers' and LDM's layers have the same parts.

    Args:
        attention: has ``to_k``, ``to_v`` and ``heads``.
        context: (1 or m, tokens, width) the encoded negative texts; the rows of a batch are m, or m after m.
        how: the method and its numbers.
        rows: which m rows of a batch are steered; all of them by default.
        size: of the batch, where a call may hold several of that size, one after the other.
    """

    def __init__(
        self, attention: Any, context: Tensor, how: Guidance, rows: Sequence[int] | None = None, size: int | None = None
    ) -> None:
        self.attention, self.context, self.how, self.rows, self.size = attention, context, how, rows, size

    def __call__(self, queries: Tensor, positive: Tensor) -> Tensor:
        """(n, tokens, channels) Z+ before the output projection, and its queries of the same shape -> Z."""
        if self.rows is None:
            return steered(positive, self._negative(queries), self.how).to(positive.dtype)
        size = self.size or len(queries)
        every = [start + row for start in range(0, len(queries), size) for row in self.rows]
        rows = torch.tensor(every, device=positive.device)
        moved = steered(positive[rows], self._negative(queries[rows]), self.how)
        return positive.index_copy(0, rows, moved.to(positive.dtype))

    def _negative(self, queries: Tensor) -> Tensor:
        """Z-, of the same shape as the queries."""
        context = self.context.to(queries.device, queries.dtype)
        keys, values = self.attention.to_k(context), self.attention.to_v(context)
        n, count, channels = queries.shape
        heads = self.attention.heads

        def split(part: Tensor) -> Tensor:
            found = part.to(queries.dtype).view(len(part), -1, heads, channels // heads).transpose(1, 2)
            return found.expand(n, -1, -1, -1) if len(part) == 1 else found.repeat(n // len(part), 1, 1, 1)

        found = F.scaled_dot_product_attention(split(queries), split(keys), split(values))
        return found.transpose(1, 2).reshape(n, count, channels)


def layers(network: nn.Module, first_level: int = 0) -> Iterator[nn.Module]:
    """The cross-attention layers of a network, in diffusers' naming and in LDM's.

    Args:
        first_level: of a U-Net only those that are so many halvings of the picture inside; other networks have no levels.
    """
    levels = _levels(network) if first_level else {}
    for path, module in network.named_modules():
        if path.rpartition(".")[2] == "attn2" and hasattr(module, "to_k"):
            if levels.get(_block(path), first_level) >= first_level:
                yield module


def _block(path: str) -> str:
    """The block of a U-Net that a module is in: the first two parts of its path, or the first of the one in the middle."""
    first, second, *_ = [*path.removeprefix("_orig_mod.").split("."), ""]
    return f"{first}.{second}" if second.isdigit() and not first.startswith("mid") else first


def _levels(network: nn.Module) -> dict[str, int]:
    """How often the picture was halved before each block of a U-Net; nothing for other networks."""
    network = getattr(network, "_orig_mod", network)  # of a compiled one
    if not any(name in ("down_blocks", "input_blocks") for name, _ in network.named_children()):
        return {}
    found: dict[str, int] = {}
    for layer in highres.layers(network):
        if layer.role == "block":
            found.setdefault(_block(layer.path), layer.level)
    return found


def attach(
    network: nn.Module, context: Tensor, how: Guidance, rows: Sequence[int] | None = None, size: int | None = None
) -> ExitStack:
    """Steer a network of diffusers or LDM away from encoded texts, until the returned stack is closed.

    Args:
        network: a U-Net, or a PixArt transformer.
        context: (1 or m, tokens, width) the negative texts as the text encoder returns them, without any padding that
            the network would not look at: one for all pictures, or one for each (see :func:`joined`).
        how: scale 0 changes nothing.
        rows: which m rows of a batch are steered; all of them by default.
        size: of the batch, where a call may hold several of that size, one after the other.

    Returns:
        ``close()``, or the end of a ``with`` block, takes everything back.

    Raises:
        ValueError: a network without cross-attention, or texts of another text encoder; one line.
    """
    changes = ExitStack()
    if not how.scale:
        return changes
    found = list(layers(network, how.first_level))
    if not found:
        raise ValueError("a negative prompt needs a network with cross-attention, and this one has none")
    projection = getattr(network, "caption_projection", None)
    if isinstance(projection, nn.Module):  # PixArt's, before the first layer
        with torch.no_grad():
            context = projection(context)
    width = found[0].to_k.in_features  # type: ignore[union-attr]
    if context.shape[-1] != width:
        raise ValueError(f"the negative prompt was encoded in {context.shape[-1]} numbers, and this network reads {width}")
    for attention in found:
        steering = Steering(attention, context, how, rows, size)
        if hasattr(attention, "set_processor"):
            former = attention.processor
            changes.callback(attention.set_processor, former)  # type: ignore[operator]
            attention.set_processor(Processor(steering, former))  # type: ignore[operator]
        else:
            _hook(attention, steering, changes)
    return changes


def attach_each(network: nn.Module, negatives: Sequence[Sequence[Negative]], encode: Callable[[str], Tensor]) -> ExitStack:
    """:func:`attach` for a batch whose rows each have a negative prompt of their own, or none.

    Args:
        negatives: for each row none, or one.
        encode: a text -> (tokens, width).
    """
    rows: dict[Guidance, dict[int, tuple[str, ...]]] = {}
    for row, unwanted in enumerate(negatives):
        for one in unwanted:
            rows.setdefault(one.how, {})[row] = one.texts
    changes = ExitStack()
    for how, texts in rows.items():
        encoded = {said: torch.cat([encode(text) for text in said]) for said in set(texts.values())}
        alone = len(encoded) == 1
        context = joined(list(encoded.values()) if alone else [encoded[said] for said in texts.values()])
        everywhere = len(texts) == len(negatives)
        changes.enter_context(attach(network, context, how, None if everywhere else list(texts)))
    return changes


def _hook(attention: nn.Module, steering: Steering, changes: ExitStack) -> None:
    """Steer a layer of LDM, whichever function the program calculates attention with."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, queries: Tensor) -> None:
        seen[:] = [queries]

    def move(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return steering(seen.pop(), args[0]), *args[1:]

    changes.callback(attention.to_q.register_forward_hook(keep).remove)  # type: ignore[operator, union-attr]
    changes.callback(attention.to_out.register_forward_pre_hook(move).remove)  # type: ignore[operator, union-attr]


class Processor:
    """An attention processor of diffusers that steers, around the one that was there: its own, IP-Adapter's, any.

    No hooks here: a network that was compiled before would not notice them.
    """

    def __init__(self, steering: Steering, former: Any) -> None:
        self.steering, self.former = steering, former

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, ip_adapter_masks: Any = None, **kwargs: Any) -> Tensor:
        # Named, for diffusers passes on only what a processor names; and left out again where nobody gave it.
        if ip_adapter_masks is not None:
            kwargs["ip_adapter_masks"] = ip_adapter_masks
        return self.former(_Between(attn, self.steering), hidden_states, *args, **kwargs)


class _Between:
    """A layer as a processor sees it, which keeps the queries and steers before the output projection."""

    def __init__(self, attention: Any, steering: Steering) -> None:
        self._attention, self._steering = attention, steering
        self.to_out = [self._project, *attention.to_out[1:]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    def to_q(self, hidden_states: Tensor) -> Tensor:
        self._queries = self._attention.to_q(hidden_states)
        return self._queries

    def _project(self, output: Tensor) -> Tensor:
        return self._attention.to_out[0](self._steering(self._queries, output))
