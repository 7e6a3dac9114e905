"""The accordion "WaDi" in txt2img and img2img, and what is done to a generation while it is on its way.

Values for the API's ``alwayson_scripts``, in this order: enabled, name of the LoRaD, strength, and ``off``,
``redilate`` or ``shrink`` for pictures larger than native, then ``off`` or the method and the scale of the negative
prompt.
"""

from __future__ import annotations

from typing import Any

from modules import extra_networks, scripts

from wadi_core import entries

from . import catalog, check, grid, host, inner, large, negative, tags, ui
from .passes import Passes
from .ui import FILE, STRENGTH


class Panel(scripts.Script):
    """One for each of the two tabs."""

    sorting_priority = 5  # in Forge: near its own panels

    def __init__(self) -> None:
        self.around: ui.Surroundings | None = None

    def title(self) -> str:
        return "WaDi"

    def show(self, is_img2img: bool) -> object:
        if self.around is None:  # the program asks again for every id of a component
            self.around = ui.Surroundings(self.tabname)
            self.around.watch(self)
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """The panel; the program calls this several times, and wants the components of the first values back."""
        built = ui.build(self.around or ui.Surroundings(self.tabname), self.elem_id)
        self.infotext_fields, self.paste_field_names = built.pasted, built.sent
        return built.values

    def process(self, p: Any, enabled: bool, file: str, strength: float, hires: str = large.OFF, *away: Any) -> None:
        """Once for a generation: what is true of its passes, and which LoRaD the panel adds."""
        p.wadi_passes = passes = Passes.of(p)
        inner.within(p)
        passes.settle(p)
        negative.settle(p, passes, *away)
        p.wadi_own = own = _chosen(p, enabled, file, strength)
        p.wadi_idle = None if own or enabled or file in (None, "", catalog.NONE) else file
        if own is None and hasattr(p, grid.STRENGTH):
            _strengthen(p)
        p.wadi_large = _large(p, hires)
        enlarges = p.wadi_large if p.wadi_large != large.OFF and (passes.first or passes.second) else None
        for label, value in ((FILE, own and own[0]), (STRENGTH, own and own[1]), (large.LABEL, enlarges)):
            if value is None:
                p.extra_generation_params.pop(label, None)
            else:
                p.extra_generation_params[label] = value
        for note in passes.notes(p):
            host.tell(p, note)

    def before_process_batch(self, p: Any, *args: Any, prompts: list[str], **kwargs: Any) -> None:
        """Before the program reads the tags of a batch: see :func:`.tags.prepare`."""
        passes = p.wadi_passes
        prompts[:] = tags.prepare(prompts, _own_tag(p, passes.first), lambda sentence: host.tell(p, sentence))
        _tell_of(p, tags.lorads(prompts[0]) if prompts else [], passes)

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """The same for the tags of the second pass, which the program has read by now."""
        if not p.wadi_passes.hires:
            return
        start = p.iteration * p.batch_size
        written = list(p.all_hr_prompts[start : start + p.batch_size])
        prompts = tags.prepare(written, _own_tag(p, p.wadi_passes.second), lambda sentence: host.tell(p, sentence))
        p.hr_extra_network_data = extra_networks.parse_prompts(prompts)[1]


def _chosen(p: Any, enabled: bool, file: str, strength: float) -> tuple[str, float] | None:
    """Name and strength of the LoRaD that the panel or an axis of the X/Y/Z plot adds to a generation."""
    name = getattr(p, grid.FILE, file)
    strength = getattr(p, grid.STRENGTH, strength)
    if not (enabled or hasattr(p, grid.FILE)) or name in (None, "", catalog.NONE):
        return None
    try:
        strength = entries.strength(strength)
        tags.tag(name, strength)
    except ValueError as error:
        host.tell(p, str(error))
        return None
    if catalog.file_of(name) is None:
        host.tell(p, f"{name} is left out: {tags.no_file(name)}")
        return None
    return name, strength


def _strengthen(p: Any) -> None:
    """An axis of the X/Y/Z plot acts on the tags, where the panel has no LoRaD on."""
    try:
        if not grid.strengthen(p):
            host.tell(p, f"{grid.LABELS[grid.STRENGTH]} has no LoRaD to act on")
    except ValueError as error:
        host.tell(p, str(error))


def _large(p: Any, method: str) -> str:
    """How pictures larger than native are drawn; of a method that there is not it is told."""
    if method in large.CHOICES:
        return method
    host.tell(p, f"pictures larger than native are drawn by one of {', '.join(large.CHOICES)}, not {method}")
    return large.OFF


def _own_tag(p: Any, in_one_step: bool) -> str:
    """The tag of the panel's LoRaD for a pass.

    Of two passes with different samplers, a one-step LoRaD belongs to the one that is drawn in one step.
    """
    if p.wadi_own is None:
        return ""
    passes = p.wadi_passes
    own = tags.tag(*p.wadi_own)
    mixed = passes.hires and passes.first != passes.second
    if mixed and not in_one_step and any(found.lorad.one_step for found in tags.lorads(own)):
        return ""
    return own


def _tell_of(p: Any, found: list[tags.Found], passes: Passes) -> None:
    """The commonest mistakes with one-step LoRaDs."""
    one_step = [one for one in found if one.lorad.one_step]
    skipped = check.clip_skip_note() if one_step or passes.first or passes.second else None
    if skipped:
        host.tell(p, skipped)
    if not one_step:
        if p.wadi_idle and (passes.first or passes.second):
            host.tell(p, check.switched_off(p.wadi_idle))
        return
    name = one_step[0].tag.name
    if not passes.first:
        host.tell(p, f"{check.sampler_note(name, p.sampler_name)} ({p.steps} steps, CFG scale {p.cfg_scale:g})")
    elif passes.hires and not passes.second and not (p.wadi_own and p.wadi_own[0] == name):
        host.tell(
            p,
            f"{name} is made for one step and, named in the prompt, is at work in the hires pass too: choose it in the "
            "panel, which leaves it out there, or write a hires prompt without it",
        )
    if p.wadi_large != large.OFF:
        return
    sizes = [(p.width, p.height, False)] if passes.first else []
    sizes += [(p.hr_upscale_to_x, p.hr_upscale_to_y, True)] if passes.second else []
    for width, height, second in sizes:
        note = check.size_note(one_step[0].lorad, width, height, second)
        if note:
            host.tell(p, note)
