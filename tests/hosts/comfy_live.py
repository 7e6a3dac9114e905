"""How long after a keystroke the picture of the live template is in the page.

    COMFYUI_PATH=... [COMFYUI_PYTHON=...] [CHROMIUM_PATH=...] python tests/hosts/comfy_live.py [--keys 20] [--modern]

starts that ComfyUI on the CPU, opens the template in a browser with Run (On Change), and types. Times are taken in the
page: from the key's event to the first frame in which the new picture is loaded. Of each keystroke it also tells how long
ComfyUI worked (from ``execution_start`` to ``execution_success``), and its processor time, which other work does not lengthen
much. Needs playwright and a Chromium, as the tests do.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [
        str(path) for path in (Path(__file__).parent, Path(__file__).parents[1] / "helpers", Path(__file__).parents[2])
    ]

import comfy_page
from comfy_server import ComfyServer, host_python, lay_out

WORDS = " and a fox on a light blue background and a sunflower"
# Records, for each key: when it was pressed, when ComfyUI began and ended, when the page had the picture (all in ms).
WATCH = """() => {
  window.wadiTimes = [];
  const preview = () => app.graph.nodes.find((node) => node.type === "PreviewImage");
  const shown = () => {
    const pictures = [...(preview().imgs ?? []), ...document.querySelectorAll("img")];
    return pictures.filter((one) => one.complete && one.naturalWidth === 128).map((one) => one.src).join();
  };
  const now = () => performance.now();
  const last = () => window.wadiTimes.at(-1) ?? {};
  window.addEventListener("keydown", () => {
    const times = { key: now(), before: shown() };
    window.wadiTimes.push(times);
    const look = () => {
      if (shown() && shown() !== times.before) times.picture = now();
      else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
  }, true);
  const { api } = window.comfyAPI.api;
  api.addEventListener("promptQueued", () => { last().queued ??= now(); });
  api.addEventListener("execution_start", () => { last().start ??= now(); });
  api.addEventListener("execution_success", () => { last().end ??= now(); });
  api.addEventListener("status", ({ detail }) => { window.wadiWaiting = detail?.exec_info?.queue_remaining; });
}"""
DONE = """() => {
  const { picture, end } = window.wadiTimes.at(-1) ?? {};
  return picture !== undefined && end !== undefined && !window.wadiWaiting;
}"""
# The text field of the prompt; notes have some too.
FIELD = """() => {
  const prompt = app.graph.nodes.find((node) => node.type === "CLIPTextEncode").widgets[0].value;
  return [...document.querySelectorAll("textarea")].find((field) => field.value === prompt && field.offsetParent);
}"""


def run_on_change(page: Any) -> None:
    """Choose Run (On Change) in the menu beside the button, as a person does."""
    _choose(page, "Run (On Change)")


def run_by_button(page: Any) -> None:
    """Choose Run again."""
    _choose(page, "Run")


def _choose(page: Any, mode: str) -> None:
    page.get_by_test_id("queue-mode-menu-trigger").or_(
        page.locator(".queue-button-group .p-splitbutton-dropdown")
    ).first.click()
    exactly = re.compile(rf"^\s*{re.escape(mode)}\s*$")
    page.locator("[role^=menuitem]").filter(has_text=exactly, visible=True).first.click()
    page.keyboard.press("Escape")  # where the menu stays open, it takes the keys
    page.wait_for_timeout(500)


def type_and_time(page: Any, keys: int) -> list[dict[str, float]]:
    """Type into the prompt of the open live template, each key when the picture of the one before is there.

    Returns:
        For each key: milliseconds ``to_queue``, ``to_start``, ``working`` and ``to_picture``.
    """
    field = page.evaluate_handle(FIELD).as_element()
    field.click()
    field.press("End")
    page.evaluate(WATCH)
    for key in WORDS[: keys + 2]:  # the first two warm up
        page.keyboard.type(key)
        page.wait_for_function(DONE)
        page.wait_for_timeout(300)
    times = page.evaluate("() => window.wadiTimes")[2:]
    return [
        {
            "to_queue": one["queued"] - one["key"],
            "to_start": one["start"] - one["key"],
            "working": one["end"] - one["start"],
            "to_picture": one["picture"] - one["key"],
        }
        for one in times
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keys", type=int, default=20)
    parser.add_argument("--modern", action="store_true", help="nodes that the browser lays out (Nodes 2.0)")
    options = parser.parse_args()
    from conftest import CHROMIUM, CHROMIUM_FLAGS
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        base = Path(folder) / "comfyui"
        lay_out(base)
        server = ComfyServer(Path(os.environ["COMFYUI_PATH"]), host_python(), base)
        server.start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_FLAGS))
        try:
            page = comfy_page.open_front_end(browser, server, modern=options.modern)
            comfy_page.load(page, comfy_page.LIVE)
            run_on_change(page)
            used = server.processor_seconds()
            times = type_and_time(page, options.keys)
            used = (server.processor_seconds() - used) / (options.keys + 2)
        finally:
            browser.close()
            server.stop()
    for part in times[0]:
        values = [one[part] for one in times]
        print(f"{part}: median {statistics.median(values):.0f} ms, {min(values):.0f} to {max(values):.0f}")  # noqa: T201

    print(f"processor time of ComfyUI: {used * 1000:.0f} ms a key")  # noqa: T201


if __name__ == "__main__":
    main()
