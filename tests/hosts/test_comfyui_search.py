"""Searching for the pack's nodes in ComfyUI's front end: what comes first."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_server import ComfyServer

PATIENCE = 60_000  # milliseconds
BOX = "input[placeholder*='Search'], input[aria-autocomplete]"
ROWS = "[role=option]"
READY = "() => window.app?.canvas && window.app.graph && !document.querySelector('.p-progressspinner')"


@pytest.fixture(scope="module")
def page(comfy: ComfyServer, chromium: Any) -> Any:
    """The front end with an empty canvas and its search box."""
    for name, value in {"TutorialCompleted": True, "Locale": "en", "Workflow.Persist": False}.items():
        comfy.post(f"/settings/Comfy.{name}", value)
    opened = chromium.new_page(viewport={"width": 1600, "height": 950})
    opened.set_default_timeout(PATIENCE)
    opened.goto(f"http://127.0.0.1:{comfy.port}", wait_until="domcontentloaded")
    opened.wait_for_function(READY)
    opened.wait_for_timeout(1000)
    opened.evaluate("() => window.app.graph.clear()")
    opened.mouse.dblclick(800, 450)
    opened.locator(BOX).last.wait_for()
    return opened


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("one step", "One-Step Sampler"),
        ("one-step sampler", "One-Step Sampler"),
        ("wadi", "wadi-mini"),
        ("prompt batch", "Prompt Batch"),
        ("lorad stack", "LoRaD Stack"),
        ("strength x seed", "Strength x Seed Grid"),
    ],
)
def test_the_node_that_is_meant_comes_first(page: Any, shots: Any, words: str, first: str) -> None:
    page.locator(BOX).last.fill(words)
    page.locator(ROWS).filter(has_text=first).first.wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=str(shots / f"search-{words.replace(' ', '-')}.png"))
    found = [line for text in page.locator(ROWS).all_inner_texts() if (line := " ".join(text.split()))]
    assert found and found[0].startswith(first), found[:5]
