"""The accordion "WaDi" in txt2img and img2img, and what is done to a generation while it is on its way.

Values for the API's ``alwayson_scripts``, in this order: enabled, name of the LoRaD, strength, and ``off``,
``redilate`` or ``shrink`` for pictures larger than native, then ``off`` or the method and the scale of the negative
prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr
from modules import extra_networks, scripts, shared
from modules.infotext_utils import PasteField
from modules.ui_common import create_refresh_button

from wadi_core import entries
from wadi_core.settings import SAMPLER as NAME

from . import catalog, check, grid, host, large, negative, negative_box, options, tags, tools
from .passes import Passes

FILE, STRENGTH = "WaDi LoRaD", "WaDi strength"  # in the infotext
# Components of the program that the check line looks at, by their ids: arguments of check.line.
LOOKED_AT = {"sampling": "sampler", "width": "width", "height": "height", "prompt": "prompt"}
HELP = (
    f'One-step pictures: choose a one-step LoRaD here, or write &lt;lorad:NAME:1&gt;, and the sampler "{NAME}". Steps '
    "and CFG scale then have no effect; the negative prompt works inside the one network call."
)


class Panel(scripts.Script):
    """One for each of the two tabs."""

    sorting_priority = 5  # in Forge: near its own panels

    def __init__(self) -> None:
        self.page: dict[str, Any] | None = None  # components of LOOKED_AT

    def title(self) -> str:
        return "WaDi"

    def show(self, is_img2img: bool) -> object:
        if self.page is None:  # the program asks again for every id of a component
            self.page = {}
            for name in LOOKED_AT:
                self.on_after_component(self._remember(name, self.page), elem_id=f"{self.tabname}_{name}")
        return scripts.AlwaysVisible

    def _remember(self, name: str, page: dict[str, Any]) -> Any:
        return lambda on: page.__setitem__(name, on.component)

    def ui(self, is_img2img: bool) -> list[Any]:
        """The panel; the program calls this several times, and wants the components of the first values back."""
        with gr.Accordion("WaDi", open=False, elem_id=self.elem_id("accordion")):
            gr.HTML(f"<p>{HELP}</p>")
            with gr.Row():
                enabled = gr.Checkbox(False, label="Use this LoRaD", elem_id=self.elem_id("enabled"))
            with gr.Row():
                file = gr.Dropdown(
                    catalog.choices(), value=options.default_lorad(), label="LoRaD", elem_id=self.elem_id("lorad")
                )
                self._refresh_button(file)
                strength = gr.Slider(-2.0, 2.0, value=1.0, step=0.05, label="Strength", elem_id=self.elem_id("strength"))
            hires = gr.Radio(
                list(large.CHOICES), value=large.OFF, label="Larger than native in one piece", elem_id=self.elem_id("large")
            )
            away = negative_box.components(self.elem_id)
            line = gr.HTML("", elem_id=self.elem_id("check"))
            button = gr.Button("Check", elem_id=self.elem_id("check_button"))
            self._connect_check([button.click, enabled.change], file, strength, hires, line)
            self._tools(file, strength)
        self.infotext_fields = [
            PasteField(enabled, lambda read: FILE in read),
            PasteField(file, FILE),
            PasteField(strength, STRENGTH),
            PasteField(hires, lambda read: read.get(large.LABEL, large.OFF)),
        ]
        self.infotext_fields += negative_box.pasted(*away)
        self.paste_field_names = [FILE, STRENGTH, large.LABEL, negative.LABEL, negative.SCALE]
        return [enabled, file, strength, hires, *away]

    def _refresh_button(self, file: gr.Dropdown) -> None:
        extension = host.lora_extension()
        listing = catalog.refresh if extension is None else extension.list_available_networks
        create_refresh_button(file, listing, lambda: {"choices": catalog.choices()}, self.elem_id("refresh"))

    def _connect_check(self, events: list[Any], file: gr.Dropdown, strength: gr.Slider, hires: gr.Radio, line: gr.HTML) -> None:
        page = self.page or {}
        arguments = [LOOKED_AT[name] for name in page]

        def checked(name: str, value: float, method: str, *seen: Any) -> str:
            return check.line(name, value, in_one_piece=method != large.OFF, **dict(zip(arguments, seen, strict=True)))

        inputs = [file, strength, hires, *page.values()]
        events = [*events, file.change, strength.change, hires.change]
        # Of the prompt only when it is left: not for every letter.
        events += [component.blur if name == "prompt" else component.change for name, component in page.items()]
        for event in events:
            event(checked, inputs=inputs, outputs=[line], show_progress=False)

    def _tools(self, file: gr.Dropdown, strength: gr.Slider) -> None:
        with gr.Accordion("Extract or merge", open=False, elem_id=self.elem_id("tools")):
            with gr.Row():
                student = gr.Dropdown(tools.students(), label="Complete one-step network", elem_id=self.elem_id("student"))
                create_refresh_button(student, catalog.refresh, lambda: {"choices": tools.students()}, self.elem_id("again"))
                rank = gr.Number(0, precision=0, label="Rank (0: as small as loses nothing)", elem_id=self.elem_id("rank"))
            with gr.Row():
                extracted = gr.Textbox("", label="Name of the new LoRaD", elem_id=self.elem_id("extracted"))
                extract = gr.Button("Extract a LoRaD from it and the checkpoint", elem_id=self.elem_id("extract"))
            with gr.Row():
                merged = gr.Textbox("", label="Name of the new checkpoint", elem_id=self.elem_id("merged"))
                merge = gr.Button("Merge the LoRaD above into the checkpoint", elem_id=self.elem_id("merge"))
            said = gr.HTML("", elem_id=self.elem_id("tool_result"))
        extract.click(_shown(tools.extract), inputs=[student, rank, extracted], outputs=[said, file], show_progress=False)
        merge.click(_shown(tools.merge), inputs=[file, strength, merged], outputs=[said, file], show_progress=False)

    def process(self, p: Any, enabled: bool, file: str, strength: float, hires: str = large.OFF, *away: Any) -> None:
        """Once for a generation: what is true of its passes, and which LoRaD the panel adds."""
        p.wadi_passes = passes = Passes.of(p)
        passes.settle(p)
        negative.settle(p, passes, *away)
        p.wadi_own = own = _chosen(p, enabled, file, strength)
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
    if not (enabled or hasattr(p, grid.FILE) or hasattr(p, grid.STRENGTH)) or name in (None, "", catalog.NONE):
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
    if not one_step:
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
    asked = passes.first and p.wadi_large == large.OFF
    note = check.size_note(one_step[0].lorad, p.width, p.height) if asked else None
    if note:
        host.tell(p, note)


def _shown(tool: Any) -> Any:
    """A tool as the page's queue runs it: with its progress, or, where the queue is off, with its result alone."""

    def running(*values: Any) -> Iterator[tuple[str, Any]]:
        for sentence in tool(*values):
            yield f"<p>{escape(sentence)}</p>", gr.update()
        yield f"<p>{escape(sentence)}</p>", gr.update(choices=catalog.choices())

    if not shared.cmd_opts.no_gradio_queue:
        return running

    def waiting(*values: Any) -> tuple[str, Any]:
        *_, last = running(*values)
        return last

    return waiting
