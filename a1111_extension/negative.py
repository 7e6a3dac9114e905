"""The box for the negative prompt in one step: steered away from inside cross-attention, by the core's operations.

The panel's switch and scale (:mod:`.negative_box`) come in through :func:`settle`, the axes of the X/Y/Z plot through
:func:`axes`, and the samplers of all programs call the network within :func:`steered`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from modules import prompt_parser, shared
from torch import Tensor

from wadi_core import guidance
from wadi_core.negative import DEFAULT, PRESETS, Guidance, preset

from . import host
from .passes import Passes

OFF = "off"
CHOICES = (OFF, *PRESETS)
LABEL, SCALE = "WaDi negative", "WaDi negative scale"  # in the infotext
METHOD_AXIS, SCALE_AXIS = "wadi_negative_method", "wadi_negative_scale"  # attributes of the program's object
LABELS = {METHOD_AXIS: "[WaDi] Negative method", SCALE_AXIS: "[WaDi] Negative scale"}


def axes(grid: Any) -> list[Any]:
    """Axes of the X/Y/Z plot."""
    return [
        grid.AxisOption(LABELS[METHOD_AXIS], str, _setter(METHOD_AXIS), choices=lambda: list(CHOICES)),
        grid.AxisOption(LABELS[SCALE_AXIS], float, _setter(SCALE_AXIS)),
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
