"""The panel's components and what happens when they are used. What they mean for a picture is in :mod:`.panel`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr
from modules import shared
from modules.infotext_utils import PasteField
from modules.ui_common import create_refresh_button
from modules.ui_components import InputAccordion

from wadi_core import highres
from wadi_core.settings import SAMPLER as NAME

from . import catalog, check, get, host, large, live, negative, negative_box, options, tools

FILE, STRENGTH = "WaDi LoRaD", "WaDi strength"  # in the infotext
CARRIED = "WaDi sampler"  # what is sent to another tab beside the program's own values
# The program's components that are looked at: the ends of their ids -> fields of check.Page.
LOOKED_AT = {
    "{tab}_sampling": "sampler",
    "{tab}_width": "width",
    "{tab}_height": "height",
    "{tab}_prompt": "prompt",
    "txt2img_hr-checkbox": "hires",
    "txt2img_hr_scale": "scale",
    "txt2img_hr_resize_x": "wide",
    "txt2img_hr_resize_y": "high",
    "hr_sampler": "second",
}
# Others: names of their own -> ids.
OTHERS = {"generate": "{tab}_generate", "seed": "{tab}_seed", "styles": "{tab}_styles"}
NOTES_BEFORE, PREVIEW_AFTER = "sampler_selection_{tab}", "{tab}_prompt_image"
HELP = (
    f'One-step pictures: choose a one-step LoRaD here, or write &lt;lorad:NAME:1&gt;, and the sampler "{NAME}". Steps '
    "and CFG scale then have no effect; the negative prompt works inside the one network call."
)
BUTTONS = 4  # that javascript/wadi.js presses in turn: older versions of gradio drop a press while one is on its way
Elements = Callable[[str], str]


def is_pasted(read: dict[str, Any]) -> bool:
    """Whether an infotext has a LoRaD of the panel. By this very function tabs know each other's field."""
    return FILE in read


@dataclass
class Surroundings:
    """Components of one tab beside the panel, as the program builds them.

    Attributes:
        tab: ``txt2img`` or ``img2img``.
        page: fields of :class:`.check.Page`, and the names of ``OTHERS`` -> the program's components.
        notes, fixes, preview: the panel's own, above the sampler and beside the prompt.
    """

    tab: str
    page: dict[str, Any] = field(default_factory=dict)
    notes: Any = None
    fixes: tuple[Any, ...] = ()
    preview: Any = None

    def watch(self, script: Any) -> None:
        """Ask the program to be told of them."""
        named = {**{name: one for one, name in LOOKED_AT.items()}, **OTHERS}
        for name, ending in named.items():
            if self.tab == "txt2img" or "{tab}" in ending:
                script.on_after_component(self._remember(name), elem_id=ending.format(tab=self.tab))
        script.on_before_component(lambda on: self.make_notes(), elem_id=NOTES_BEFORE.format(tab=self.tab))
        if self.tab == "txt2img":
            script.on_after_component(lambda on: self._make_preview(), elem_id=PREVIEW_AFTER.format(tab=self.tab))

    @property
    def looked_at(self) -> dict[str, Any]:
        """Those of the components that the check looks at."""
        return {name: component for name, component in self.page.items() if name in LOOKED_AT.values()}

    def _remember(self, name: str) -> Any:
        return lambda on: self.page.__setitem__(name, on.component)

    def make_notes(self) -> None:
        """The place of warnings, with the buttons that put a size right."""
        self.notes = gr.HTML("", elem_id=f"wadi_{self.tab}_notes", elem_classes=["wadi-notes-place"])
        with gr.Row(visible=False, elem_id=f"wadi_{self.tab}_fixes") as row:
            native = gr.Button("Draw at the native size", size="sm", elem_id=f"wadi_{self.tab}_native")
            whole = gr.Button("Keep it in one piece", size="sm", elem_id=f"wadi_{self.tab}_whole")
        self.fixes = row, native, whole

    def _make_preview(self) -> None:
        with gr.Column(elem_classes=["wadi-live-place"], min_width=0):
            self.preview = gr.HTML("", elem_id="wadi_preview")


@dataclass
class Built:
    """The panel's components that the program wants back, and what it needs to paste and to send them."""

    values: list[Any]
    pasted: list[Any]
    sent: list[Any]


def build(around: Surroundings, elements: Elements) -> Built:
    """The panel.

    Args:
        around: what is there already.
        elements: makes ids of names.
    """
    with InputAccordion(False, label="WaDi", elem_id=elements("accordion")) as enabled:
        with enabled.extra():
            state = gr.HTML("", elem_id=elements("state"))
        gr.HTML(f"<p>{HELP}</p>")
        with gr.Row():
            file = gr.Dropdown(catalog.choices(), value=options.default_lorad(), label="LoRaD", elem_id=elements("lorad"))
            _refresh_button(file, elements)
            strength = gr.Slider(-2.0, 2.0, value=1.0, step=0.05, label="Strength", elem_id=elements("strength"))
        method = gr.Radio(
            list(large.CHOICES), value=large.OFF, label="Larger than native in one piece", elem_id=elements("large")
        )
        away = negative_box.components(elements)
        carried = gr.Textbox("", visible=False, elem_id=elements("carried"))
        if around.notes is None:  # a program that is laid out in another way
            around.make_notes()
        line = gr.HTML("", elem_id=elements("check"))
        button = gr.Button("Check", elem_id=elements("check_button"))
        values = [enabled, file, strength, method]
        if around.preview is not None:
            _live(around, values, elements)
        _tools(enabled, file, strength, elements)
    file.input(lambda name: name != catalog.NONE or gr.update(), inputs=[file], outputs=[enabled], show_progress=False)
    _connect_check(around, values, [line, state], button)
    _connect_sampler(around, carried)
    pasted = [
        PasteField(enabled, is_pasted),
        PasteField(file, FILE),
        PasteField(strength, STRENGTH),
        PasteField(method, lambda read: read.get(large.LABEL, large.OFF)),
        PasteField(carried, CARRIED),
        *negative_box.pasted(*away),
    ]
    sent = [is_pasted, FILE, STRENGTH, large.LABEL, CARRIED, negative.LABEL, negative.SCALE]
    return Built([*values, *away], pasted, sent)


def _refresh_button(file: gr.Dropdown, elements: Elements) -> None:
    extension = host.lora_extension()
    listing = catalog.refresh if extension is None else extension.list_available_networks
    create_refresh_button(file, listing, lambda: {"choices": catalog.choices()}, elements("refresh"))


def _connect_check(around: Surroundings, values: list[Any], outputs: list[Any], button: gr.Button) -> None:
    """What is looked at whenever something changes, and what the two buttons below the warnings do."""
    enabled, file, strength, method = values
    seen = around.looked_at
    inputs = [*values, *seen.values()]
    row, native, whole = around.fixes

    def found(on: bool, name: str, value: float, chosen: str, *rest: Any) -> check.Found:
        return check.look(name, value, check.Page(enabled=on, large=chosen, **dict(zip(seen, rest, strict=True))))

    def told(*now: Any) -> list[Any]:
        at = found(*now)
        width, height = at.native or (0, 0)
        text = gr.update(value=f"{width} x {height}") if at.native else gr.update()
        return [at.facts_html, at.state_html, at.warnings_html, gr.update(visible=at.native is not None), text]

    def fitted(*now: Any) -> list[Any]:
        size = found(*now).native
        return [gr.update(), gr.update()] if size is None else [*size]

    events = [button.click, enabled.change, file.change, strength.release, method.change]
    # Of the prompt only when it is left: not for every letter.
    events += [component.blur if name == "prompt" else component.change for name, component in seen.items()]
    if "generate" in around.page:
        events.append(around.page["generate"].click)
    shown: dict[str, Any] = {"outputs": [*outputs, around.notes, row, native], "show_progress": False, **at_once()}
    for event in events:
        first = event(told, inputs=inputs, **shown)
        if "trigger_mode" not in shown:  # what changed meanwhile was dropped
            first.then(told, inputs=inputs, **shown)
    if {"width", "height"} <= seen.keys():
        native.click(fitted, inputs=inputs, outputs=[seen["width"], seen["height"]], show_progress=False, **at_once())
    whole.click(lambda: highres.METHODS[0], outputs=[method], show_progress=False, **at_once())


def _connect_sampler(around: Surroundings, carried: gr.Textbox) -> None:
    """The one-step sampler goes along when a picture is sent to another tab; other samplers stay as they are there."""
    sampler = around.page.get("sampler")
    if sampler is None:
        return
    if around.tab == "txt2img":
        sampler.change(lambda name: name if name == NAME else "", inputs=[sampler], outputs=[carried], show_progress=False)
        return

    def arrived(name: str) -> list[Any]:
        return [NAME, ""] if name == NAME else [gr.update(), gr.update()]

    carried.change(arrived, inputs=[carried], outputs=[sampler, carried], show_progress=False)


def _live(around: Surroundings, values: list[Any], elements: Elements) -> None:
    needed = ("prompt", "styles", "width", "height", "seed")
    if not set(needed) <= around.page.keys():
        return
    enabled, file, strength, method = values
    with gr.Row():
        on = gr.Checkbox(False, label="Draw while typing", elem_id=elements("live"))
        buttons = [gr.Button("Draw", visible=False, elem_id=elements(f"live_draw_{place}")) for place in range(BUTTONS)]
    newest = gr.State(live.Newest())
    inputs = [newest, on, *values, *(around.page[name] for name in needed)]
    events = [*(button.click for button in buttons), on.change, enabled.change, file.change, strength.release, method.change]
    events += [around.page[name].change for name in needed if name != "prompt"]
    for event in events:
        event(live.draw, inputs=inputs, outputs=[around.preview], show_progress=False, **at_once())


def _tools(enabled: Any, file: gr.Dropdown, strength: gr.Slider, elements: Elements) -> None:
    with gr.Accordion("Get, extract or merge", open=False, elem_id=elements("tools")):
        fetch = gr.Button("Get SD1.5 one-step", elem_id=elements("get"))
        with gr.Row(visible=False, elem_id=elements("get_terms")) as terms:
            note = gr.HTML("")
            agree = gr.Button("Get it on these terms", variant="primary", elem_id=elements("get_agree"))
            leave = gr.Button("Leave it", elem_id=elements("get_leave"))
        with gr.Row():
            student = gr.Dropdown(tools.students(), label="Complete one-step network", elem_id=elements("student"))
            create_refresh_button(student, catalog.refresh, lambda: {"choices": tools.students()}, elements("again"))
            rank = gr.Number(0, precision=0, label="Rank (0: as small as loses nothing)", elem_id=elements("rank"))
        with gr.Row():
            extracted = gr.Textbox("", label="Name of the new LoRaD", elem_id=elements("extracted"))
            extract = gr.Button("Extract a LoRaD from it and the checkpoint", elem_id=elements("extract"))
        with gr.Row():
            merged = gr.Textbox("", label="Name of the new checkpoint", elem_id=elements("merged"))
            merge = gr.Button("Merge the LoRaD above into the checkpoint", elem_id=elements("merge"))
        said = gr.HTML("", elem_id=elements("tool_result"))
    extract.click(_shown(tools.extract), inputs=[student, rank, extracted], outputs=[said, file], show_progress=False)
    merge.click(_shown(tools.merge), inputs=[file, strength, merged], outputs=[said, file], show_progress=False)
    fetch.click(lambda: [gr.update(visible=True), get.licence_note()], outputs=[terms, note], show_progress=False)
    leave.click(lambda: gr.update(visible=False), outputs=[terms], show_progress=False)
    agree.click(lambda: gr.update(visible=False), outputs=[terms], show_progress=False)
    agree.click(_shown(get.get, get.file_name), outputs=[said, file], show_progress=False)


def _shown(tool: Any, chosen: Callable[[], str | None] = lambda: None) -> Any:
    """A tool as the page's queue runs it: with its progress, or, where the queue is off, with its result alone.

    Args:
        chosen: what the list of LoRaDs shows at the end; None leaves it.
    """

    def running(*values: Any) -> Iterator[tuple[str, Any]]:
        sentence = ""
        for sentence in tool(*values):
            yield _said(sentence), gr.update()
        name = chosen()
        yield _said(sentence), gr.update(choices=catalog.choices(), **({} if name is None else {"value": name}))

    if not shared.cmd_opts.no_gradio_queue:
        return running

    def waiting(*values: Any) -> tuple[str, Any]:
        *_, last = running(*values)
        return last

    return waiting


def _said(sentence: str) -> str:
    return f'<p class="{"wadi-warning" if sentence.startswith("⚠") else "wadi-said"}">{escape(sentence)}</p>'


@functools.cache
def at_once() -> dict[str, Any]:
    """How an event is connected that waits for nobody; older versions of gradio drop a second one while one is on its way."""
    newer = int(gr.__version__.partition(".")[0]) >= 4
    return {"queue": False, **({"trigger_mode": "multiple"} if newer else {})}
