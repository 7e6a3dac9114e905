"""The switch and the scale of the negative prompt in the panel, and how they are read out of an infotext."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from modules.infotext_utils import PasteField

from wadi_core.negative import DEFAULT, PRESETS
from wadi_core.settings import SAMPLER as NAME

from .negative import CHOICES, LABEL, OFF, SCALE

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
