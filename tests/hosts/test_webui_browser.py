"""The panel in the real pages of A1111 and Forge, in a headless Chromium: what a user sees and presses.

    A1111_PATH=... FORGE_PATH=... [WADI_SCREENSHOTS=FOLDER] python -m pytest tests/hosts/test_webui_browser.py

Besides a program it needs playwright (of any version) and a Chromium, of ``CHROMIUM_PATH`` or the one on the path.
The picture in the README is ``a1111-panel.jpg`` of a run with wadi-mini's trained weights.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

KINDS = [kind for kind in ("a1111", "forge") if os.environ.get(f"{kind.upper()}_PATH")]
if not KINDS:
    pytest.skip("no A1111 and no Forge: set A1111_PATH, FORGE_PATH", allow_module_level=True)

from PIL import Image  # noqa: E402
from webui_cases import PICTURES  # noqa: E402
from webui_models import Base, installed_mini, wide  # noqa: E402
from webui_server import SAMPLER, WebUI, lay_out  # noqa: E402

from wadi_core import mini  # noqa: E402

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

    def generate(self) -> np.ndarray:
        """Press the button, wait for the picture and fetch it: (h, w, 3) from 0 to 255."""
        before = self.sources()
        self.page.locator("#txt2img_generate").click()
        there = """(before) => [...document.querySelectorAll("#txt2img_gallery img")]
          .some((one) => one.naturalWidth > 0 && !one.src.includes("live-preview") && !before.includes(one.src))"""
        self.page.wait_for_function(there, arg=before)
        self.page.locator("#html_info_txt2img").get_by_text(SAMPLER).first.wait_for()
        source = next(one for one in self.sources() if one not in before)
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
    data, work = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("bases")
    if request.param == "a1111":
        base = installed_mini(lay_out("a1111", data, mini.FOLDER), mini.FOLDER)
    else:
        base = wide(lay_out("forge", data), work)
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
    opened.choose(opened.part("lorad"), opened.base.adapters["one-step"].stem)
    opened.part("enabled").locator("input").check()


def test_a_picture_by_hand_and_again_after_reload_ui(opened: Opened, shots: Path) -> None:
    (expected,) = opened.base.pictures(PROMPT, [SEED], opened.base.adapters["one-step"])
    opened.go()
    count = len(opened.base.lorad_layers)
    for turn in ("panel", "reloaded"):
        prepared(opened)
        opened.said(f"{count} of {count} layers")
        assert "⚠" not in opened.part("check").inner_text()
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
    opened.said(f"choose the sampler {SAMPLER} instead of Euler")
    opened.type("width", 2 * opened.base.size)
    opened.page.screenshot(path=shots / f"{opened.webui.kind}-warnings.jpg", type="jpeg", quality=85)
    opened.choose(opened.page.locator("#txt2img_sampling"), SAMPLER)
    opened.choose(opened.part("lorad"), "None")
    opened.said("no one-step weights are loaded")
    prompt = opened.page.locator("#txt2img_prompt textarea")
    prompt.fill(f"{PROMPT} <lorad:{opened.base.adapters['one-step'].stem}:0.5>")
    prompt.press("Tab")
    opened.said("angles times 0.5")


def test_a_card_writes_the_tag(opened: Opened, shots: Path) -> None:
    opened.go()
    opened.page.locator("#txt2img_extra_tabs button").filter(has_text=re.compile(r"^\s*LoRaD\s*$")).first.click()
    card = opened.page.locator(f"#txt2img_lorad_cards .card[data-name='{opened.base.adapters['one-step'].stem}']")
    card.wait_for(state="visible")
    preview = "(card) => card.querySelector('img')?.naturalWidth === 256"
    opened.page.wait_for_function(preview, arg=card.element_handle())
    opened.page.screenshot(path=shots / f"{opened.webui.kind}-cards.jpg", type="jpeg", quality=85)
    card.click()
    written = "(tag) => document.querySelector('#txt2img_prompt textarea').value.includes(tag)"
    opened.page.wait_for_function(written, arg=f"<lorad:{opened.base.adapters['one-step'].stem}:1>")


def test_in_japanese(opened: Opened, shots: Path) -> None:
    opened.webui.post("/sdapi/v1/options", {"localization": "ja_JP"})
    opened.go()
    opened.reload()
    opened.part("accordion").get_by_text("WaDi", exact=True).first.click()
    opened.page.get_by_text("このLoRaDを使う").first.wait_for(state="visible")
    for words in ("1ステップ生成: ここで1ステップ用のLoRaDを選ぶか", "強さ", "確認", "抽出とマージ"):
        opened.part("accordion").get_by_text(words).first.wait_for(state="visible")
    opened.page.screenshot(path=shots / f"{opened.webui.kind}-japanese.jpg", type="jpeg", quality=85)
    opened.webui.post("/sdapi/v1/options", {"localization": "None"})
