"""Negative prompts in ComfyUI's single call: the core's steering as replacements of cross-attention.

They are put into ComfyUI's own options of each model call, when it is made and the network is loaded: so other nodes'
replacements (IP-Adapter) stay and are steered as well, and keys and values of the negative text are computed by the
weights of that moment, whatever hooks or memory management did to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import SpatialTransformer, optimized_attention
from comfy_api.latest import io
from torch import Tensor, nn

from ..wadi_core import guidance
from ..wadi_core.negative import DEFAULT, LARGEST, PRESETS, Guidance, preset
from .model import layout_of
from .schema import schema

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "wadi.negative"
PIXART = "pixart-alpha"
COND = 0  # what ComfyUI calls the rows of the prompt among those of a call
BLOCKS = {"input": "input_blocks", "middle": "middle_block", "output": "output_blocks"}

Block = tuple[str, int, int]
Replacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def with_negative(model: ModelPatcher, unwanted: list[Any], how: Guidance) -> ModelPatcher:
    """A MODEL that is steered away from a CONDITIONING; several, one after the other, add up.

    Raises:
        ValueError: no U-Net of Stable Diffusion's kind, or a conditioning without text; one line.
    """
    if layout_of(model).architecture == PIXART:
        raise ValueError("negative prompts work with U-Nets of Stable Diffusion 1 and 2 only, and this is PixArt-alpha")
    contexts = [entry[0] for entry in unwanted]
    if not contexts or not all(isinstance(context, Tensor) and context.ndim == 3 for context in contexts):
        raise ValueError("the negative conditioning holds no text: connect a CLIP Text Encode")
    steered = model.clone()
    if how.scale:
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        steered.add_wrapper_with_key(kind, KEY, steering(context_of(contexts), how))
    return steered


def context_of(contexts: list[Tensor]) -> Tensor:
    """(1 or m, tokens, width) of the texts of a conditioning, each (1 or m, tokens, width): attended to together."""
    rows = max(len(context) for context in contexts)
    return torch.cat([context.expand(rows, -1, -1) if len(context) == 1 else context for context in contexts], dim=1)


def steering(context: Tensor, how: Guidance) -> Callable[..., Any]:
    """A wrapper of ComfyUI's network calls."""

    def call(
        executor: Any, x: Tensor, timesteps: Tensor, text: Tensor, y: Any, control: Any, options: dict[str, Any], **more: Any
    ) -> Any:
        steered = steered_options(executor.class_obj, options, len(x), context, how)
        return executor(x, timesteps, text, y, control, steered, **more)

    return call


def steered_options(network: nn.Module, options: dict[str, Any], rows: int, context: Tensor, how: Guidance) -> dict[str, Any]:
    """The options of a network call with a replacement for each cross-attention layer.

    Args:
        rows: of the batch: those of each conditioning, one set after the other, as the options tell.
    """
    kinds = options.get("cond_or_uncond") or [COND]
    each = rows // len(kinds)
    wanted = [index * each + row for index, kind in enumerate(kinds) if kind == COND for row in range(each)]
    if not wanted:
        return options
    chosen = None if len(wanted) == rows else wanted
    if len(context) > 1:  # a prompt for each picture, as ComfyUI gives them to a batch: the last one again and again
        context = torch.cat([context[:each], context[-1:].expand(max(each - len(context), 0), -1, -1)])
    replaced = dict(options.get("patches_replace", {}))
    former = replaced.get("attn2", {})
    found = dict(former)
    steered = set(guidance.layers(network, how.first_level))
    for block, attention in cross_attention(network):
        if attention not in steered:
            continue
        previous = former.get(block, former.get(block[:2], attend))
        found[block] = replacement(guidance.Steering(attention, context, how, chosen), previous)
    return {**options, "patches_replace": {**replaced, "attn2": found}}


def cross_attention(network: nn.Module) -> Iterator[tuple[Block, nn.Module]]:
    """The cross-attention layers of a U-Net by the places that ComfyUI's replacements are known by."""
    for name, attribute in BLOCKS.items():
        part: Any = getattr(network, attribute)
        for number, block in enumerate([part] if name == "middle" else part):
            for layer in block:
                if isinstance(layer, SpatialTransformer):
                    for index, transformer in enumerate(layer.transformer_blocks):
                        yield (name, number, index), transformer.attn2


def attend(queries: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any]) -> Tensor:
    """What ComfyUI does where nothing is replaced."""
    heads, precision = options["n_heads"], options.get("attn_precision")
    return optimized_attention(queries, keys, values, heads, attn_precision=precision, transformer_options=options)


def replacement(steer: guidance.Steering, previous: Replacement) -> Replacement:
    """Steers what was calculated there before."""
    return lambda queries, keys, values, options: steer(queries, previous(queries, keys, values, options))


def method_input() -> io.Combo.Input:
    """The preset of the method."""
    return io.Combo.Input(
        "method",
        options=list(PRESETS),
        default=DEFAULT,
        tooltip="nag: normalized attention guidance. nasa: negative-away steer attention. -published: on all levels.",
    )


def scale_input() -> io.Float.Input:
    """How strongly."""
    return io.Float.Input(
        "scale",
        default=PRESETS[DEFAULT].scale,
        min=0.0,
        max=LARGEST,
        step=0.05,
        round=0.001,
        tooltip="Strength of the negative prompt; 0 switches it off. Start with 2 for nag and 0.5 for nasa.",
    )


class NegativePrompt(io.ComfyNode):
    """A model whose pictures are steered away from a text, without a second pass."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_NegativePrompt",
            display_name="Negative Prompt (one call)",
            category="WaDi/sampling",
            description="Keeps what a text says out of the picture, inside the single network call and without cfg. "
            "Works on cross-attention, next to LoRAs, ControlNets and IP-Adapters.",
            search_aliases=["wadi", "negative", "nag", "nasa", "normalized attention guidance", "avoid", "one step"],
            inputs=[
                io.Model.Input("model", tooltip="A model of Stable Diffusion 1 or 2, or wadi-mini, one-step or not."),
                io.Conditioning.Input(
                    "negative", tooltip="The text to keep out, from CLIP Text Encode. Several may be combined."
                ),
                scale_input(),
                method_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same weights, steered away from the text.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, negative: list[Any], scale: float, method: str) -> io.NodeOutput:
        return io.NodeOutput(with_negative(model, negative, preset(method, scale)))
