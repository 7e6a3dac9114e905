"""Pictures larger than native in ComfyUI: the core's operations on convolutions, on for the length of each model call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import comfy.patcher_extension
from comfy_api.latest import io
from torch import Tensor, nn

from ..wadi_core import highres
from .model import layout_of
from .schema import schema
from .sizes import ENLARGED, PIXELS, native_size

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PIXART = "pixart-alpha"


def known_size(model: ModelPatcher) -> int:
    """Pixels on a side of the pictures that a MODEL was trained with, as far as that can be known.

    Raises:
        ValueError: no U-Net of Stable Diffusion's kind; one line.
    """
    if layout_of(model).architecture == PIXART:
        raise ValueError("pictures can be enlarged with U-Nets of Stable Diffusion 1 and 2 only, and this is PixArt-alpha")
    return native_size(model)


def enlarging(native: int, method: str) -> Callable[..., Any]:
    """A wrapper of ComfyUI's conditioned model calls that lets network and ControlNets draw larger pictures.

    Args:
        native: pixels on a side that the network knows.
        method: one of the core's.
    """

    def call(executor: Any, model: Any, conds: Sequence[Any], x: Tensor, *others: Any, **more: Any) -> Any:
        height, width = (PIXELS * side for side in x.shape[-2:])
        larger = highres.factors(width, height, (native, native))
        with highres.attach([model.diffusion_model, *control_networks(conds)], larger, method):
            return executor(model, conds, x, *others, **more)

    return call


def control_networks(conds: Iterable[Iterable[dict[str, Any]] | None]) -> list[nn.Module]:
    """The ControlNets in conditionings, each once. What else steers a picture (T2I-Adapters) is fitted where it arrives."""
    found = {id(network): network for cond in conds for one in cond or () for network in _chain(one.get("control"))}
    return [network for network in found.values() if hasattr(network, "input_blocks")]


def _chain(control: Any) -> Iterator[nn.Module]:
    while control is not None:
        network = getattr(control, "control_model", None)
        if isinstance(network, nn.Module):
            yield network
        control = control.previous_controlnet


class HighResolution(io.ComfyNode):
    """A model that draws pictures larger than its native size in one piece."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_HighResolution",
            display_name="High Resolution",
            category="WaDi/sampling",
            description="Makes coherent pictures above the model's native size, in the same single call. The scale "
            "follows from the latent; at native size nothing changes. ControlNets are adapted too.",
            search_aliases=["hires", "one step", "wadi", "high resolution", "deep shrink", "scalecrafter", "large"],
            inputs=[
                io.Model.Input("model", tooltip="A model of Stable Diffusion 1 or 2, or wadi-mini, one-step or not."),
                io.Combo.Input(
                    "method",
                    options=list(highres.METHODS),
                    default=highres.METHODS[0],
                    tooltip="redilate: dilates the convolutions, as in ScaleCrafter. shrink: runs the inner levels at the "
                    "native size, which is faster.",
                ),
                io.Int.Input(
                    "native_size",
                    default=0,
                    min=0,
                    max=2048,
                    step=PIXELS,
                    tooltip="Training size of the model in pixels per side. 0: what the LoRaD's file says, else 512, or 768 "
                    "for Stable Diffusion 2.1 with v-prediction, or 128 for wadi-mini.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same weights, for larger pictures.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, method: str, native_size: int) -> io.NodeOutput:
        native = native_size or known_size(model)
        larger = model.clone()
        kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
        larger.remove_wrappers_with_key(kind, ENLARGED)
        larger.add_wrapper_with_key(kind, ENLARGED, enlarging(native, method))
        larger.set_attachments(ENLARGED, native)
        return io.NodeOutput(larger)
