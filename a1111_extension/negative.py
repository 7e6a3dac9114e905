"""The box for the negative prompt in one step: steered away from inside cross-attention, by the core's operations.

The panel's switch and scale come in through :func:`components`, :func:`pasted` and :func:`settle`, the axes of the X/Y/Z
plot through :func:`axes`, and the samplers of all programs call the network within :func:`steered`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import gradio as gr
from modules import prompt_parser, shared
from modules.infotext_utils import PasteField
from torch import Tensor

from wadi_core import guidance
from wadi_core.negative import DEFAULT, PRESETS, Guidance, preset
from wadi_core.settings import SAMPLER as NAME

from . import host
from .passes import Passes

OFF = "off"
CHOICES = (OFF, *PRESETS)
LABEL, SCALE = "WaDi negative", "WaDi negative scale"  # in the infotext
METHOD_AXIS, SCALE_AXIS = "wadi_negative_method", "wadi_negative_scale"  # attributes of the program's object
LARGEST = 10.0  # of the slider


def components(elem_id: Callable[[str], str]) -> list[Any]:
    """The switch and the slider, in a row of the panel."""
    with gr.Row():
        method = gr.Radio(list(CHOICES), value=DEFAULT, label="Negative prompt in one step", elem_id=elem_id("negative"))
        scale = gr.Slider(
            0.0, LARGEST, value=PRESETS[DEFAULT].scale, step=0.05, label="Negative scale", elem_id=elem_id("negative_scale")
        )
    method.change(_own_scale, inputs=[method], outputs=[scale], show_progress=False)
    return [method, scale]


def _own_scale(method: str) -> Any:
    """A method's own scale, as soon as it is chosen."""
    return gr.update(value=PRESETS[method].scale) if method in PRESETS else gr.update()


def pasted(method: Any, scale: Any) -> list[PasteField]:
    """The components as they are read out of an infotext."""
    return [PasteField(method, _method_of), PasteField(scale, SCALE)]


def _method_of(read: dict[str, Any]) -> str | None:
    """What an infotext says; None, which leaves the panel as it is, where it says nothing.

    A one-step picture that has a negative prompt and no method was drawn without it.
    """
    without = read.get("Sampler") == NAME and str(read.get("Negative prompt") or "").strip()
    return read.get(LABEL, OFF if without else None)


def axes(grid: Any) -> list[Any]:
    """Axes of the X/Y/Z plot."""
    return [
        grid.AxisOption("[WaDi] Negative method", str, _setter(METHOD_AXIS), choices=lambda: list(CHOICES)),
        grid.AxisOption("[WaDi] Negative scale", float, _setter(SCALE_AXIS)),
    ]


def _setter(attribute: str) -> Any:
    return lambda p, value, values: setattr(p, attribute, value)


def settle(p: Any, passes: Passes, method: str = DEFAULT, scale: float | None = None) -> None:
    """How a generation is steered, kept in ``p.wadi_negative`` and told in the infotext; what cannot be done is told."""
    method, scale = getattr(p, METHOD_AXIS, method), getattr(p, SCALE_AXIS, scale)
    p.wadi_negative = None
    for label in (LABEL, SCALE):
        p.extra_generation_params.pop(label, None)
    if method == OFF or not (passes.first or passes.second):
        return
    try:
        how = preset(method, scale)
    except ValueError as error:
        host.tell(p, str(error))
        return
    written = [*p.all_negative_prompts, *(getattr(p, "all_hr_negative_prompts", None) or [])]
    if how.scale and any(text.strip() for text in written):
        p.wadi_negative = how
        p.extra_generation_params |= {LABEL: method, SCALE: how.scale}


def wanted(p: Any) -> bool:
    """Whether a pass of a generation has anything to be steered away from."""
    return getattr(p, "wadi_negative", None) is not None and any(text.strip() for text in texts(p))


def texts(p: Any) -> Sequence[str]:
    """The negative prompts of the batch that is drawn, one for each picture."""
    return p.hr_negative_prompts if getattr(p, "is_hr_pass", False) else p.negative_prompts


def steered_by_texts(p: Any) -> AbstractContextManager[Any]:
    """:func:`steered` for the programs that do not encode the negative prompts at a CFG scale of 1."""
    if not wanted(p):
        return nullcontext()
    told = prompt_parser.SdConditioning(texts(p), width=p.width, height=p.height, is_negative_prompt=True)
    schedules = prompt_parser.get_learned_conditioning(shared.sd_model, told, 1)
    return steered(p, prompt_parser.reconstruct_cond_batch(schedules, 0))


def steered(p: Any, negative: Tensor, owners: Sequence[int] | None = None) -> AbstractContextManager[Any]:
    """What the network is called within; what cannot be done is told, and the pictures are drawn without it.

    Args:
        negative: (n, tokens, width) the encoded negative prompts of the batch.
        owners: the picture that each row of the call belongs to; by default all n in a row, once or several times.
    """
    if not wanted(p):
        return nullcontext()
    how: Guidance = p.wadi_negative
    said = [bool(text.strip()) for text in texts(p)]
    owners = range(len(said)) if owners is None else owners
    rows = [row for row, owner in enumerate(owners) if said[owner]]
    context = negative[[owners[row] for row in rows]]
    if bool((context == context[:1]).all()):
        context = context[:1]
    network = host.network()
    if network is None or not rows:
        return nullcontext()
    try:
        return guidance.attach(network, context, how, None if len(rows) == len(owners) else rows, len(owners))
    except ValueError as error:
        host.tell(p, str(error))
        return nullcontext()
