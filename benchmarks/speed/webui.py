"""What one step costs in A1111, Forge or Forge Neo beside their own Euler, and how fast the page draws while typing.

    A1111_PATH=/path/to/stable-diffusion-webui [A1111_PYTHON=its/python] python benchmarks/speed/webui.py a1111
    FORGE_PATH=... python benchmarks/speed/webui.py forge --rounds 5 --keys 0          the requests alone

With wadi-mini as the installer writes it, on the CPU. A request is made over HTTP, and the two kinds take turns, so that
a busy minute hits both alike. The time from a key to its picture is measured in the page, in a headless Chromium (with
playwright, which is needed for that part alone): from the event of the key to the frame after the picture is decoded.
Writes ``webui-HOST.json``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "hosts")]

from webui_models import installed_mini  # noqa: E402
from webui_server import SAMPLER, WebUI, lay_out  # noqa: E402

from benchmarks.report import ended, origin, table, write_json  # noqa: E402
from wadi_core import mini  # noqa: E402
from wadi_core.output import take_any_text  # noqa: E402

SIDE = 128  # pixels, native to wadi-mini
KINDS: dict[str, dict[str, Any]] = {
    "WaDi one-step": {"sampler_name": SAMPLER},
    "Euler, 1 step, CFG 1": {"sampler_name": "Euler", "steps": 1, "cfg_scale": 1.0},
}
WARM_UP = 3
# Write a word into the prompt, and wait for the frame that shows another picture.
KEY = """(word) => new Promise((done) => {
  const prompt = document.querySelector("#txt2img_prompt textarea");
  const place = document.querySelector("#wadi_preview").parentElement;
  const old = document.querySelector("#wadi_preview img")?.src;
  const seen = new MutationObserver(async () => {
    const picture = document.querySelector("#wadi_preview img");
    if (!picture || picture.src === old) return;
    seen.disconnect();
    await picture.decode();
    requestAnimationFrame(() => done(performance.now() - begin));
  });
  seen.observe(place, {subtree: true, childList: true, attributes: true});
  const begin = performance.now();
  prompt.value = "a red apple " + word;
  prompt.dispatchEvent(new Event("input", {bubbles: true}));
})"""


def request(webui: WebUI, prompt: str, kind: str) -> dict[str, float]:
    """One picture by HTTP: its time on the wall and of the processor, and the samples that the network evaluated."""
    webui.calls()
    before = webui.post("/probe/clock")
    webui.draw(prompt, width=SIDE, height=SIDE, **KINDS[kind])
    after, calls = webui.post("/probe/clock"), webui.calls()
    return {
        "evaluations": sum(call["shape"][0] for call in calls),
        "request_s": after["seconds"] - before["seconds"],
        "request_cpu_s": after["cpu_seconds"] - before["cpu_seconds"],
        "network_cpu_s": sum(call["cpu_seconds"] for call in calls),
    }


def requests(webui: WebUI, prompt: str, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of each kind; the prompt changes with every round, as it does for people."""
    made: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for turn in range(-WARM_UP, rounds):
        for kind in KINDS if turn % 2 else reversed(KINDS):
            one = request(webui, f"{prompt} {turn}", kind)
            made[kind] += [one] if turn >= 0 else []
    return {kind: {name: statistics.median(one[name] for one in all_) for name in all_[0]} for kind, all_ in made.items()}


def keys(webui: WebUI, lorad: str, count: int) -> dict[str, float]:
    """Milliseconds from a key to its picture, and what became of the requests."""
    from conftest import CHROMIUM, CHROMIUM_FLAGS
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_FLAGS))
        page = browser.new_page(viewport={"width": 1400, "height": 1050})
        page.set_default_timeout(180_000)
        page.goto(webui.url("/"), wait_until="domcontentloaded")
        page.locator("#txt2img_sampling input").wait_for(state="visible")
        page.wait_for_timeout(3000)
        for name in ("width", "height"):
            box = page.locator(f"#txt2img_{name} input[type=number]").first
            box.fill(str(SIDE))
            box.press("Tab")
        panel = "#script_txt2img_wadi"
        page.locator(f"{panel}_accordion .label-wrap").first.click()
        page.locator(f"{panel}_lorad input").first.click()
        page.locator("ul.options li").filter(has_text=lorad).first.click()
        page.locator("#txt2img_prompt textarea").fill("a red apple")
        page.locator(f"{panel}_live input").check()
        page.locator("#wadi_preview img").wait_for(state="visible")
        page.wait_for_timeout(2000)
        before, inside = webui.post("/probe/live", {}), webui.post("/probe/clock")["cpu_seconds"]
        times = []
        for turn in range(count):
            times.append(page.evaluate(KEY, f"{turn} {'x' * (turn % 3)}"))
            page.wait_for_timeout(300)
        after, spent = webui.post("/probe/live", {}), webui.post("/probe/clock")["cpu_seconds"] - inside
        browser.close()
    counts = {what: after[what] - before[what] for what in after}
    return {"median_ms": statistics.median(times), "best_ms": min(times), "server_cpu_ms": 1000 * spent / count, **counts}


def run(options: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        data = Path(temporary) / "data"
        base = installed_mini(lay_out(options.host, data, mini.FOLDER), mini.FOLDER)
        lorad = base.adapters["one-step"].stem
        webui = WebUI(options.host, data).start()
        try:
            webui.choose(base.name)
            rows = requests(webui, f"a red apple <lorad:{lorad}:1>", options.rounds)
            typed = keys(webui, lorad, options.keys) if options.keys else {}
        finally:
            webui.stop()
    ours, other = rows.values()
    ratio = {name: ours[name] / other[name] for name in ours}
    report = {
        **origin("webui", sys.argv[1:]),
        "host": options.host,
        "pixels": SIDE,
        "requests": rows,
        "ratio": ratio,
        "keys": typed,
    }
    write_json(options.work / f"webui-{options.host}.json", report)
    tables = [table("request", {**rows, "ratio": ratio})]
    return "\n".join([*tables, *([table("drawn while typing", {options.host: typed})] if typed else [])])


def main(arguments: list[str] | None = None) -> int:
    take_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("host", choices=("a1111", "forge", "neo"))
    add("--rounds", type=int, default=9, help="of both kinds of requests (default: 9)")
    add("--keys", type=int, default=20, help="pictures drawn while typing; 0 leaves them out (default: 20)")
    add("--work", type=Path, default=Path("runs/webui"), help="where networks and results are written")
    add("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args(arguments)
    if not os.environ.get(f"{options.host.upper()}_PATH"):
        parser.error(f"where is it? Set {options.host.upper()}_PATH")
    options.work.mkdir(parents=True, exist_ok=True)
    return ended("webui", options.debug, lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
