"""The panel in the real pages of A1111 and Forge, in a headless Chromium: what a user sees and presses.

    A1111_PATH=... FORGE_PATH=... NEO_PATH=... [WADI_SCREENSHOTS=FOLDER] python -m pytest tests/hosts/test_webui_browser.py

Besides a program it needs playwright (of any version) and a Chromium, of ``CHROMIUM_PATH`` or the one on the path.
The picture in the README is ``a1111-panel.jpg`` of a run with wadi-mini's trained weights.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

KINDS = [kind for kind in ("a1111", "forge", "neo") if os.environ.get(f"{kind.upper()}_PATH")]
if not KINDS:
    pytest.skip("no A1111 and no Forge: set A1111_PATH, FORGE_PATH, NEO_PATH", allow_module_level=True)

import hub_networks  # noqa: E402
import hub_server  # noqa: E402
import torch  # noqa: E402
from hub_server import Repository  # noqa: E402
from PIL import Image  # noqa: E402
from PIL.PngImagePlugin import PngInfo  # noqa: E402
from webui_cases import PICTURES  # noqa: E402
from webui_models import Base, installed_mini  # noqa: E402
from webui_server import SAMPLER, WebUI, lay_out  # noqa: E402

from wadi_core import LoRaD, mini, pictures  # noqa: E402
from wadi_core.lorad import Metadata  # noqa: E402

PATIENCE = 180_000  # ms; the machine may have other work
PROMPT = "a red apple"
SEED = 3


@dataclass
class Opened:
    """A page of a running program, and what is loaded there."""

    page: Any
    webui: WebUI
    base: Base

    def part(self, name: str) -> Any:
        """A component of the panel in the first tab."""
        return self.page.locator(f"#script_txt2img_wadi_{name}").first  # a gr.HTML has its id twice

    def go(self) -> None:
        """Open the page, or open it again."""
        self.page.goto(self.webui.url("/"), wait_until="domcontentloaded")
        self.wait_until_there()

    def wait_until_there(self) -> None:
        self.page.locator("#txt2img_generate").wait_for(state="visible")
        self.page.locator("#txt2img_sampling input").wait_for(state="visible")
        self.page.wait_for_timeout(2000)  # its own scripts run after that

    def choose(self, place: Any, value: str) -> None:
        """Choose from a list by hand."""
        place.locator("input").first.click()
        offered = self.page.locator("ul.options li")
        offered.filter(has_text=re.compile(rf"^\W*{re.escape(value)}\W*$")).first.click()

    def type(self, name: str, value: object) -> None:
        """Write a number into a slider's box, as a user does who then goes on to the next."""
        box = self.page.locator(f"#txt2img_{name} input[type=number]").first
        box.fill(str(value))
        box.press("Tab")

    def said(self, text: str) -> None:
        """Wait until the check line says something; where the page has lost its answer (a busy server), ask again."""
        place = self.part("check").get_by_text(text).first
        try:
            place.wait_for(state="visible", timeout=PATIENCE / 3)
        except Exception as error:
            if "Timeout" not in type(error).__name__:
                raise
            self.part("check_button").click()
            place.wait_for(state="visible")

    def warned(self, text: str) -> None:
        """Wait until a warning stands above the sampler, in its colour."""
        place = self.page.locator("#wadi_txt2img_notes .wadi-warning").get_by_text(text).first
        place.wait_for(state="visible")
        red, green, blue = re.findall(r"\d+", place.evaluate("(one) => getComputedStyle(one).color"))[:3]
        assert int(red) > int(green) > int(blue)
        assert place.bounding_box()["y"] < self.page.viewport_size["height"]

    def no_warning(self) -> None:
        self.page.wait_for_function("() => !document.querySelector('#wadi_txt2img_notes .wadi-warning')")

    def told(self, text: str) -> None:
        """Whether a sentence stands below the picture."""
        self.page.locator("#html_log_txt2img").get_by_text(text).first.wait_for(state="visible")

    def shot(self, shots: Path, name: str) -> None:
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=shots / f"{self.webui.kind}-{name}.jpg", type="jpeg", quality=85)

    @property
    def ticked(self) -> bool:
        """Whether the panel's LoRaD is switched on, as its header shows."""
        return self.part("accordion-visible-checkbox").is_checked()

    def prompt(self, text: str) -> None:
        """Write a prompt and go on to the next part of the page."""
        box = self.page.locator("#txt2img_prompt textarea")
        box.fill(text)
        box.press("Tab")

    def generate(self) -> np.ndarray:
        """Press the button, wait for the picture and fetch it: (h, w, 3) from 0 to 255."""
        before = self.sources()
        self.page.locator("#txt2img_generate").click()
        there = """(before) => [...document.querySelectorAll("#txt2img_gallery img")]
          .some((one) => one.naturalWidth > 0 && !one.src.includes("live-preview")
            && !one.src.startsWith("data:") && !before.includes(one.src))"""
        self.page.wait_for_function(there, arg=before)
        self.page.locator("#html_info_txt2img").get_by_text(SAMPLER).first.wait_for()
        source = next(one for one in self.sources() if one not in before and not one.startswith("data:"))
        with Image.open(io.BytesIO(self.page.request.get(source).body())) as picture:
            return np.asarray(picture.convert("RGB")).astype(int)

    def sources(self) -> list[str]:
        return self.page.evaluate("() => [...document.querySelectorAll('#txt2img_gallery img')].map((one) => one.src)")

    def reload(self) -> None:
        """Press "Reload UI" at the foot of the page."""
        self.page.locator("#footer").get_by_text("Reload UI").click()
        self.page.get_by_text("Reloading...").wait_for()
        self.wait_until_there()


@pytest.fixture(scope="module", params=KINDS)
def opened(request: Any, chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    data = tmp_path_factory.mktemp(request.param)
    base = installed_mini(lay_out(request.param, data, mini.FOLDER), mini.FOLDER)
    style = LoRaD.load(base.adapters["style"])
    with_picture = Metadata(**{**vars(style.metadata), "thumbnail": pictures.thumbnail(Image.linear_gradient("L"))})
    LoRaD(style.factors, with_picture).save(base.adapters["style"], torch.float32)
    Image.linear_gradient("L").save(base.adapters["one-step"].with_suffix(".preview.png"))
    webui = WebUI(request.param, data).start()
    try:
        webui.choose(base.name)
        page = chromium.new_page(viewport={"width": 1400, "height": 1050})
        page.set_default_timeout(PATIENCE)
        yield Opened(page, webui, base)
        page.close()
    finally:
        webui.stop()


def prepared(opened: Opened) -> None:
    """All that a user sets for a one-step picture, in the order in which the page has it."""
    opened.page.locator("#txt2img_prompt textarea").fill(PROMPT)
    opened.choose(opened.page.locator("#txt2img_sampling"), SAMPLER)
    for name in ("width", "height"):
        opened.type(name, opened.base.size)
    opened.page.locator("#txt2img_seed input").first.fill(str(SEED))
    opened.part("accordion").get_by_text("WaDi", exact=True).first.click()
    assert not opened.ticked
    opened.choose(opened.part("lorad"), opened.base.adapters["one-step"].stem)


def test_a_picture_by_hand_and_again_after_reload_ui(opened: Opened, shots: Path) -> None:
    (expected,) = opened.base.pictures(PROMPT, [SEED], opened.base.adapters["one-step"])
    opened.go()
    count = len(opened.base.lorad_layers)
    for turn in ("panel", "reloaded"):
        prepared(opened)
        opened.said(f"{count} of {count} layers")
        opened.no_warning()
        assert opened.ticked
        assert abs(opened.generate() - expected).max() <= PICTURES
        opened.page.wait_for_timeout(1000)
        opened.page.screenshot(path=shots / f"{opened.webui.kind}-{turn}.jpg", type="jpeg", quality=85)
        if turn == "panel":
            opened.reload()
    assert [one["name"] for one in opened.webui.get("/sdapi/v1/samplers")].count(SAMPLER) == 1


def test_the_check_line_follows_what_is_set(opened: Opened, shots: Path) -> None:
    opened.go()
    prepared(opened)
    opened.said("one step at t 999")
    opened.choose(opened.page.locator("#txt2img_sampling"), "Euler")
    opened.warned(f"choose the sampler {SAMPLER} instead of Euler")
    opened.type("width", 2 * opened.base.size)
    opened.warned("was trained at")
    opened.shot(shots, "warnings")
    opened.choose(opened.page.locator("#txt2img_sampling"), SAMPLER)
    opened.choose(opened.part("lorad"), "None")
    opened.warned("no one-step weights are loaded")
    opened.prompt(f"{PROMPT} <lorad:{opened.base.adapters['one-step'].stem}:0.5>")
    opened.said("angles times 0.5")


def test_a_state_is_seen_while_the_panel_is_closed(opened: Opened, shots: Path) -> None:
    name = opened.base.adapters["one-step"].stem
    opened.go()
    assert not opened.ticked
    prepared(opened)
    opened.said("one step at t 999")
    box = opened.part("strength").locator("input[type=number]")
    box.fill("0.5")
    box.press("Tab")
    opened.said("angles times 0.5")
    opened.part("accordion").locator(".label-wrap").first.click()
    opened.part("lorad").wait_for(state="hidden")
    opened.part("state").get_by_text(f"{name} 0.5").first.wait_for(state="visible")
    assert opened.ticked
    opened.shot(shots, "closed")


def test_mistakes_are_told_before_and_after(opened: Opened, shots: Path) -> None:
    """Each above the sampler before a picture is drawn, and below it afterwards."""
    name, side = opened.base.adapters["one-step"].stem, opened.base.size
    opened.go()
    prepared(opened)
    opened.said("one step at t 999")

    def drawn(sentence: str, shot: str, before: bool = True) -> None:
        if before:
            opened.warned(sentence)
        opened.generate()
        opened.told(sentence)
        opened.shot(shots, f"told-{shot}")

    opened.prompt(f"{PROMPT} <lorad:{name}:1>")
    drawn("is asked for twice", "twice")
    opened.prompt(f"{PROMPT} <lorad:{name}:0,8>")
    drawn("0,8", "number")
    opened.prompt(f"{PROMPT} <lorad:{name[:-2]}:1>")
    drawn(f"did you mean '{name}'", "name")
    opened.prompt(PROMPT)
    opened.type("width", 2 * side)
    drawn(f"was trained at {side}x{side}", "size")
    opened.page.locator("#wadi_txt2img_native").click()
    opened.no_warning()
    assert opened.page.locator("#txt2img_width input[type=number]").first.input_value() == str(side)
    opened.page.locator("#txt2img_hr-visible-checkbox").check()
    drawn(f"the hires pass draws at {2 * side}x{2 * side}", "hires")
    opened.page.locator("#wadi_txt2img_whole").click()
    opened.no_warning()
    assert opened.part("large").locator("input[value=redilate]").is_checked()
    opened.page.locator("#txt2img_hr-visible-checkbox").uncheck()
    opened.webui.post("/sdapi/v1/options", {"CLIP_stop_at_last_layers": 2})
    try:
        opened.generate()
        opened.warned("Clip skip is 2")
        opened.told("Clip skip is 2")
        opened.shot(shots, "told-clip")
    finally:
        opened.webui.post("/sdapi/v1/options", {"CLIP_stop_at_last_layers": 1})
    opened.webui.post("/probe/inner")
    drawn("the inner pass of another extension", "inner", before=False)
    opened.part("accordion-visible-checkbox").uncheck()
    drawn("is chosen in the panel and not switched on", "off")


def test_sending_to_img2img_carries_tick_and_sampler(opened: Opened, shots: Path) -> None:
    page = opened.page
    opened.go()
    prepared(opened)
    opened.said("one step at t 999")
    opened.generate()
    sampler = page.locator("#img2img_sampling input").first

    def send() -> None:
        page.locator("#tabs button").filter(has_text=re.compile("^ *txt2img *$", re.IGNORECASE)).first.click()
        page.locator("#txt2img_send_to_img2img").click()
        page.locator("#img2img_sampling").wait_for(state="visible")

    def arrived(value: str) -> None:
        page.wait_for_function("(value) => document.querySelector('#img2img_sampling input').value === value", arg=value)

    assert sampler.input_value() != SAMPLER
    send()
    arrived(SAMPLER)
    page.wait_for_function("() => document.querySelector('#script_img2img_wadi_accordion-visible-checkbox').checked")
    assert page.locator("#script_img2img_wadi_lorad input").first.input_value() == opened.base.adapters["one-step"].stem
    opened.shot(shots, "sent")
    # Another sampler stays as it is chosen there, and a second sending works like the first.
    opened.choose(page.locator("#img2img_sampling"), "Euler")
    send()
    arrived(SAMPLER)
    opened.choose(page.locator("#img2img_sampling"), "Euler")
    page.locator("#tabs button").filter(has_text=re.compile("^ *txt2img *$", re.IGNORECASE)).first.click()
    opened.choose(page.locator("#txt2img_sampling"), "DPM++ 2M")
    opened.prompt("a frog")
    page.wait_for_timeout(1000)
    send()
    page.wait_for_function("() => document.querySelector('#img2img_prompt textarea').value === 'a frog'")
    page.wait_for_timeout(2000)
    assert sampler.input_value() == "Euler"


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_png_info_brings_everything_back(opened: Opened, shots: Path, tmp_path: Path, tab: str) -> None:
    name, page = opened.base.adapters["one-step"].stem, opened.page
    made = opened.webui.draw(
        "a frog", seed=11, width=128, height=128, alwayson_scripts={"WaDi": {"args": [True, name, 0.25, "shrink"]}}
    )
    information = PngInfo()
    information.add_text("parameters", made.infotexts[0])
    Image.fromarray(made.pictures[0].astype(np.uint8)).save(tmp_path / "frog.png", pnginfo=information)
    opened.go()
    page.locator("#tabs button").filter(has_text=re.compile("^ *png info *$", re.IGNORECASE)).first.click()
    page.locator("#pnginfo_image input[type=file]").first.set_input_files(tmp_path / "frog.png")
    page.get_by_text(f"WaDi LoRaD: {name}").first.wait_for(state="visible")
    page.locator("#tab_pnginfo").get_by_text(f"Send to {tab}").first.click()
    page.locator(f"#{tab}_sampling").wait_for(state="visible")
    panel = f"#script_{tab}_wadi"
    arrived = "([place, value]) => document.querySelector(place).value === value"
    page.wait_for_function(arrived, arg=[f"#{tab}_sampling input", SAMPLER])
    page.wait_for_function(arrived, arg=[f"{panel}_lorad input", name])
    page.wait_for_timeout(2000)
    assert page.locator(f"{panel}_accordion-visible-checkbox").is_checked()
    assert page.locator(f"{panel}_lorad input").first.input_value() == name
    assert float(page.locator(f"{panel}_strength input[type=number]").input_value()) == 0.25
    assert page.locator(f"{panel}_large input[value=shrink]").is_checked()
    opened.shot(shots, f"pasted-{tab}")


def test_drawing_while_typing(opened: Opened, shots: Path) -> None:
    """Off at first; on, the newest prompt is drawn in one call, and the page's own pictures stay what they were."""
    page, webui = opened.page, opened.webui
    (expected,) = opened.base.pictures(PROMPT, [SEED], opened.base.adapters["one-step"])
    opened.go()
    prepared(opened)
    opened.said("one step at t 999")
    assert abs(opened.generate() - expected).max() <= PICTURES
    before, last = webui.post("/probe/live", {}), webui.post("/probe/last")
    page.locator("#txt2img_prompt textarea").press_sequentially(", green")
    page.wait_for_timeout(1500)
    assert webui.post("/probe/live", {}) == before
    part = opened.part("live").locator("input")
    part.check()
    picture = page.locator("#wadi_preview img")
    picture.wait_for(state="visible")
    webui.calls()
    source = picture.get_attribute("src")
    page.locator("#txt2img_prompt textarea").press_sequentially(" and on a table", delay=40)
    page.wait_for_function("(old) => document.querySelector('#wadi_preview img').src !== old", arg=source)
    for _ in range(60):  # until each request has been drawn or dropped
        page.wait_for_timeout(1000)
        after = webui.post("/probe/live", {})
        settled = after["asked"] - before["asked"] == after["drawn"] - before["drawn"] + after["stale"] - before["stale"]
        if settled:
            break
    assert settled
    page.wait_for_timeout(1000)
    calls = webui.calls()
    assert len(calls) == after["drawn"] - before["drawn"] - 1 and {tuple(call["timesteps"]) for call in calls} == {(999.0,)}
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.get_attribute("src").partition(",")[2])))).astype(int)
    (typed,) = opened.base.pictures(f"{PROMPT}, green and on a table", [SEED], opened.base.adapters["one-step"])
    assert abs(shown - typed).mean() < 4  # a JPEG
    assert webui.post("/probe/last") == last
    opened.shot(shots, "live")
    opened.prompt(PROMPT)
    assert abs(opened.generate() - expected).max() <= PICTURES
    part.uncheck()
    picture.wait_for(state="hidden")


def test_a_released_network_is_fetched(opened: Opened, shots: Path, tmp_path: Path) -> None:
    """From a hub on the loopback device: its terms are agreed to first, and what goes wrong is one sentence."""
    page = opened.page
    base = hub_networks.base_repository(tmp_path / "base")
    network = hub_networks.released_network(tmp_path / "base", tmp_path / hub_networks.NETWORK)
    repositories = {hub_networks.BASE: base, hub_networks.AUTHORS: Repository({hub_networks.NETWORK: network})}
    place = opened.webui.data / "models" / "LoRaD" / "wadi-sd15-one-step.safetensors"
    with hub_server.running(repositories) as hub:
        offline = {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}
        opened.webui.post("/probe/environment", {**offline, "HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1"})
        opened.go()
        opened.part("accordion").get_by_text("WaDi", exact=True).first.click()
        opened.part("tools").get_by_text("Get, extract or merge").first.click()
        said = opened.part("tool_result")
        hub.status = 503
        opened.part("get").click()
        page.get_by_text("carries no licence").first.wait_for(state="visible")
        opened.shot(shots, "get-terms")
        assert not hub.requests
        opened.part("get_agree").click()
        said.locator(".wadi-warning").wait_for(state="visible")
        assert "\n" not in said.inner_text().strip() and "Traceback" not in said.inner_text()
        opened.shot(shots, "get-failed")
        hub.status = 0
        opened.part("get").click()
        opened.part("get_agree").click()
        page.get_by_text("wadi-sd15-one-step is there").first.wait_for(state="visible")
        assert opened.part("lorad").locator("input").first.input_value() == "wadi-sd15-one-step"
        opened.shot(shots, "get-done")
        assert LoRaD.load(place).one_step is not None
    place.unlink()


def test_a_card_writes_the_tag(opened: Opened, shots: Path) -> None:
    opened.go()
    opened.page.locator("#txt2img_extra_tabs button").filter(has_text=re.compile(r"^\s*LoRaD\s*$")).first.click()
    card = opened.page.locator(f"#txt2img_lorad_cards .card[data-name='{opened.base.adapters['one-step'].stem}']")
    card.wait_for(state="visible")
    preview = "(card) => card.querySelector('img')?.naturalWidth === 256"
    opened.page.wait_for_function(preview, arg=card.element_handle())
    other = opened.page.locator(f"#txt2img_lorad_cards .card[data-name='{opened.base.adapters['style'].stem}']")
    opened.page.wait_for_function(
        "(card) => card.querySelector('img')?.naturalWidth > 0 && card.querySelector('img').src.startsWith('data:image/jpeg')",
        arg=other.element_handle(),
    )
    opened.page.screenshot(path=shots / f"{opened.webui.kind}-cards.jpg", type="jpeg", quality=85)
    card.click()
    written = "(tag) => document.querySelector('#txt2img_prompt textarea').value.includes(tag)"
    opened.page.wait_for_function(written, arg=f"<lorad:{opened.base.adapters['one-step'].stem}:1>")


def test_in_japanese(opened: Opened, shots: Path) -> None:
    opened.webui.post("/sdapi/v1/options", {"localization": "ja_JP"})
    opened.go()
    opened.reload()
    opened.part("accordion").get_by_text("WaDi", exact=True).first.click()
    opened.page.get_by_text("入力中に生成する").first.wait_for(state="visible")
    for words in ("1ステップ生成: ここで1ステップ用のLoRaDを選ぶか", "強さ", "確認", "入手・抽出・マージ"):
        opened.part("accordion").get_by_text(words).first.wait_for(state="visible")
    opened.page.screenshot(path=shots / f"{opened.webui.kind}-japanese.jpg", type="jpeg", quality=85)
    opened.webui.post("/sdapi/v1/options", {"localization": "None"})
