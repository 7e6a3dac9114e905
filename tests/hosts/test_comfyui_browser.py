"""The pack in ComfyUI's real front end, in a headless Chromium: templates, panels, warnings, the Run button.

Besides ComfyUI it needs playwright (of any version) and a Chromium, of ``CHROMIUM_PATH`` or the one on the path.
Screenshots go to pytest's temporary folder, or to ``WADI_SCREENSHOTS``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy_facts
import comfy_thumbnails
import pytest
from comfy_page import (
    MODERN_SINCE,
    ONE_LORAD,
    PANEL,
    QUICKSTART,
    SHOWN,
    STYLE,
    TITLE,
    WITH_LORA,
    WORKFLOWS,
    change,
    load,
    panel,
    touch,
    version_of,
    wait_for_panel,
)
from comfy_server import PACK, ROOT, ComfyServer
from PIL import Image

pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")


def test_kept_facts_are_what_this_comfyui_says(comfy: ComfyServer) -> None:
    version = comfy.get("/system_stats")["system"]["comfyui_version"]
    if version not in comfy_facts.kept():
        pytest.skip(f"nothing is kept of ComfyUI {version}")
    assert comfy_facts.used(comfy.get("/object_info")) == comfy_facts.kept()[version]


def test_english_is_what_the_nodes_say_themselves(comfy: ComfyServer) -> None:
    words = comfy.get("/i18n")["en"]["nodeDefs"]
    declared = comfy.get("/object_info")
    for name, said in words.items():
        if not name.startswith(comfy_facts.PREFIX):
            continue
        node = declared[name]
        assert (said["display_name"], said["description"]) == (node["display_name"], node["description"])
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert {key: spec[1]["tooltip"] for key, spec in inputs.items()} == {
            key: slot["tooltip"] for key, slot in said.get("inputs", {}).items() if "tooltip" in slot
        }
        assert [slot["tooltip"] for slot in said["outputs"].values()] == node["output_tooltips"]


def test_help_pages_are_served(comfy: ComfyServer) -> None:
    pages = sorted((ROOT / "comfy_nodes" / "web" / "docs").rglob("*.md"))
    assert pages
    for file in pages:
        path = f"/extensions/{PACK}/docs/{file.parent.name}/{file.name}"
        assert comfy.bytes_of(path) == file.read_bytes()


def test_templates_are_listed_with_their_thumbnails(page: Any, shots: Path) -> None:
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_test_id("template-workflows-content").first.wait_for()
    page.wait_for_timeout(2000)
    page.get_by_text(PACK, exact=True).first.click()  # every pack has a page
    page.mouse.move(850, 600)
    for name in WORKFLOWS:
        card = page.get_by_test_id(f"template-workflow-{name}").first
        for _ in WORKFLOWS:  # older front ends make the cards and their pictures when one comes to them
            if card.count():
                break
            page.mouse.wheel(0, 4000)
            page.wait_for_timeout(500)
        card.scroll_into_view_if_needed()
        thumbnail = comfy_facts.WORKFLOWS / f"{name}.jpg"
        if thumbnail.is_file():
            # By its size: newer front ends show a copy, of another address.
            seen = "([card, width]) => [...card.querySelectorAll('img')].some((one) => one.naturalWidth === width)"
            page.wait_for_function(seen, arg=[card.element_handle(), Image.open(thumbnail).width])
    page.wait_for_timeout(1000)
    page.screenshot(path=shots / "templates.png")
    first = page.get_by_test_id(f"template-workflow-{QUICKSTART}").first
    first.scroll_into_view_if_needed()
    first.click()
    page.wait_for_function("() => app.graph.nodes.some((node) => node.type === 'WaDi_EmbeddedModel')")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_opens_whole(page: Any, shots: Path, name: str) -> None:
    page.wadi_errors.clear()
    load(page, name)
    page.keyboard.press(".")
    page.wait_for_timeout(1500)
    page.screenshot(path=shots / f"{name}.png")
    saved = json.loads((comfy_facts.WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    assert page.evaluate("() => app.graph.nodes.length") == len(saved["nodes"])
    missing = "() => app.graph.nodes.map((node) => node.type).filter((type) => !LiteGraph.registered_node_types[type])"
    assert page.evaluate(missing) == []
    wrong = """() => app.graph.nodes.flatMap((node) => (node.widgets ?? [])
      .filter((widget) => widget.type === "combo" && !widget.options.values.includes?.(widget.value))
      .map((widget) => `${node.type}.${widget.name}: ${widget.value}`))"""
    assert page.evaluate(wrong) == []
    assert page.get_by_text("errors found").count() == 0 and page.get_by_text("Missing", exact=False).count() == 0
    for node in saved["nodes"]:
        if node["type"] in comfy_facts.NOTES:
            continue
        values = page.evaluate("(id) => app.graph.getNodeById(id).serialize().widgets_values ?? []", node["id"])
        kept = node.get("widgets_values", [])
        # The buttons of these are saved as widgets too.
        assert values == kept + {"LoadImage": ["image"], "WebcamCapture": ["capture"]}.get(node["type"], [])
    for kind in ("WaDi_OneStepSampler", "KSampler"):
        assert panel(page, kind) == ""
    assert page.wadi_errors == []


def test_panels_overlap_no_node(page: Any) -> None:
    overlapping = """() => {
      const boxes = app.graph.nodes.map((node) => [node.title, ...node.boundingRect]);
      return boxes.flatMap(([a, x, y, w, h], i) => boxes.slice(i + 1)
        .filter(([, u, v, s, t]) => x < u + s && u < x + w && y < v + t && v < y + h).map(([b]) => `${a} and ${b}`));
    }"""
    for name in WORKFLOWS:
        load(page, name)
        if page.evaluate("() => app.graph.nodes.some((node) => node.type === 'WaDi_LoadLoRaD')"):
            change(page, "WaDi_LoadLoRaD", lorad_name=SHOWN)
            wait_for_panel(page, "WaDi_LoadLoRaD", TITLE)
            page.wait_for_timeout(1000)
        assert page.evaluate(overlapping) == [], name


def test_the_run_button_makes_the_picture_of_the_quickstart(page: Any, comfy: ComfyServer, shots: Path) -> None:
    comfy.post("/free", {"free_memory": True})  # another test may have run it: of what is kept, ComfyUI says nothing anew
    load(page, QUICKSTART)
    page.get_by_test_id("queue-button").click()
    there = """() => app.graph.nodes.find((node) => node.type === "SaveImage")?.imgs?.length === 4
      && app.graph.nodes.find((node) => node.type === "SaveImage").imgs.every((one) => one.naturalWidth === 128)"""
    page.wait_for_function(there)
    wait_for_panel(page, "WaDi_ApplyLoRaD", "layers")
    page.keyboard.press(".")
    page.wait_for_timeout(2000)
    page.screenshot(path=shots / "quickstart-run.png")
    assert panel(page, "WaDi_OneStepSampler") == ""


def test_the_chosen_file_is_shown(page: Any, shots: Path) -> None:
    load(page, ONE_LORAD)
    change(page, "WaDi_LoadLoRaD", lorad_name=SHOWN)
    wait_for_panel(page, "WaDi_LoadLoRaD", TITLE)
    assert "one-step weights" in panel(page, "WaDi_LoadLoRaD")
    picture = """() => app.graph.nodes.find((node) => node.type === "WaDi_LoadLoRaD").widgets
      .find((widget) => widget.name === "wadi_panel").element.querySelector("img")?.naturalWidth"""
    page.wait_for_function(f"() => ({picture})() === 256")
    change(page, "WaDi_LoadLoRaD", lorad_name=STYLE)
    wait_for_panel(page, "WaDi_LoadLoRaD", "ordinary adapter")
    wait_for_panel(page, "WaDi_OneStepSampler", "No one-step weights")
    page.screenshot(path=shots / "file.png")


def test_what_would_go_wrong_is_said_on_the_sampler(page: Any, shots: Path) -> None:
    load(page, WITH_LORA)
    assert panel(page, "KSampler") == ""
    change(page, "KSampler", steps=8, cfg=7, denoise=0.5, sampler_name="uni_pc", scheduler="kl_optimal")
    wait_for_panel(page, "KSampler", "Set steps to 1")
    said = panel(page, "KSampler")
    for sentence in ("Set cfg to 1", "Set denoise to 1", "This sampler fails", "This scheduler does not start"):
        assert sentence in said
    page.keyboard.press(".")
    page.wait_for_timeout(1500)
    page.screenshot(path=shots / "warnings.png")

    change(page, "KSampler", sampler_name="wadi_one_step")
    wait_for_panel(page, "KSampler", "wadi_one_step always takes one step")
    said = panel(page, "KSampler")
    assert "Set cfg to 1" in said and "Set steps" not in said and "This s" not in said
    change(page, "KSampler", steps=1, cfg=1, denoise=1)
    page.wait_for_function(f"() => ({PANEL})('KSampler') === ''")
    change(page, "KSampler", sampler_name="euler", scheduler="normal")
    assert panel(page, "KSampler") == ""  # a stock sampler agrees in one step


def test_the_model_is_found_through_what_lies_between(page: Any) -> None:
    load(page, WITH_LORA)
    change(page, "KSampler", cfg=7)
    wait_for_panel(page, "KSampler", "Set cfg to 1")
    mode = "([type, mode]) => { app.graph.nodes.find((node) => node.type === type).mode = mode }"
    page.evaluate(mode, ["LoraLoader", 4])
    touch(page)
    assert "Set cfg to 1" in panel(page, "KSampler")
    page.evaluate(mode, ["WaDi_LoadLoRaD", 4])
    touch(page)
    wait_for_panel(page, "KSampler", "No one-step weights")
    page.evaluate(mode, ["WaDi_LoadLoRaD", 0])
    rerouted = """() => {
      const reroute = LiteGraph.createNode("Reroute");
      app.graph.add(reroute);
      const find = (type) => app.graph.nodes.find((node) => node.type === type);
      find("LoraLoader").connect(0, reroute, 0);
      reroute.connect(0, find("KSampler"), 0);
    }"""
    page.evaluate(rerouted)
    touch(page)
    wait_for_panel(page, "KSampler", "Set cfg to 1")
    hidden = "() => { app.graph.convertToSubgraph(new Set([app.graph.nodes.find((node) => node.type === 'KSampler')])) }"
    page.evaluate(hidden)
    touch(page)
    wait_for_panel(page, "KSampler", "Set cfg to 1")
    page.evaluate(mode, ["WaDi_LoadLoRaD", 2])  # muted: nothing can be said of what does not run
    touch(page)
    page.wait_for_function(f"() => ({PANEL})('KSampler') === ''")


def test_custom_sampling_is_looked_through(page: Any) -> None:
    load(page, WITH_LORA)
    build = """() => {
      const find = (type) => app.graph.nodes.find((node) => node.type === type);
      const add = (type) => { const node = LiteGraph.createNode(type); app.graph.add(node); return node; };
      const sampler = add("SamplerCustomAdvanced"), guider = add("CFGGuider");
      const schedule = add("BasicScheduler"), choice = add("KSamplerSelect");
      find("LoraLoader").connect(0, guider, 0);
      find("LoraLoader").connect(0, schedule, 0);
      guider.connect(0, sampler, sampler.inputs.findIndex((input) => input.name === "guider"));
      choice.connect(0, sampler, sampler.inputs.findIndex((input) => input.name === "sampler"));
      schedule.connect(0, sampler, sampler.inputs.findIndex((input) => input.name === "sigmas"));
    }"""
    page.evaluate(build)
    touch(page)
    wait_for_panel(page, "SamplerCustomAdvanced", "Set cfg to 1")
    assert "Set steps to 1" in panel(page, "SamplerCustomAdvanced")
    change(page, "CFGGuider", cfg=1)
    change(page, "BasicScheduler", steps=1)
    page.wait_for_function(f"() => ({PANEL})('SamplerCustomAdvanced') === ''")


def test_panels_leave_no_trace_in_what_is_saved(page: Any) -> None:
    load(page, WITH_LORA)
    change(page, "KSampler", cfg=7)
    wait_for_panel(page, "KSampler", "Set cfg to 1")
    saved = page.evaluate("() => app.graph.serialize()")
    assert "wadi_panel" not in json.dumps(saved)
    before = json.loads((comfy_facts.WORKFLOWS / f"{WITH_LORA}.json").read_text(encoding="utf-8"))
    sampler, was = (next(n for n in graph["nodes"] if n["type"] == "KSampler") for graph in (saved, before))
    assert len(sampler["widgets_values"]) == len(was["widgets_values"])
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert "wadi_panel" not in json.dumps(sent)
    change(page, "KSampler", cfg=1)
    page.wait_for_function(f"() => ({PANEL})('KSampler') === ''")
    height = "() => app.graph.nodes.find((node) => node.type === 'KSampler').size[1]"
    assert page.evaluate(height) <= was["size"][1] + 1


def test_the_help_page_opens_beside_the_graph(page: Any, shots: Path) -> None:
    load(page, ONE_LORAD)
    page.evaluate("() => app.canvas.selectItems([app.graph.nodes.find((node) => node.type === 'WaDi_LoadLoRaD')])")
    page.get_by_test_id("info-button").click()
    heading = page.get_by_role("heading", name="What goes wrong, and why")
    heading.first.wait_for(state="visible")
    page.screenshot(path=shots / "help.png")


def test_in_japanese(open_page: Callable[..., Any], shots: Path) -> None:
    page = open_page(language="ja")
    load(page, WITH_LORA)
    change(page, "KSampler", steps=8)
    change(page, "KSampler", sampler_name="euler")
    wait_for_panel(page, "KSampler", "ステップを 1 にしてください")
    title = "() => app.graph.nodes.find((node) => node.type === 'WaDi_LoadLoRaD').title"
    assert page.evaluate(title) == "LoRaD を読み込む"
    page.screenshot(path=shots / "japanese.png")
    page.close()


def test_with_modern_nodes(open_page: Callable[..., Any], comfy: ComfyServer, shots: Path) -> None:
    """Nodes that the browser lays out itself."""
    page = open_page(modern=True)
    if version_of(page) < MODERN_SINCE:
        pytest.skip("this front end only tries such nodes out")
    load(page, WITH_LORA)
    change(page, "WaDi_LoadLoRaD", lorad_name=SHOWN)
    change(page, "KSampler", cfg=7)
    wait_for_panel(page, "KSampler", "Set cfg to 1")
    page.get_by_text("Set cfg to 1").first.wait_for(state="visible")
    page.get_by_text(TITLE).first.wait_for(state="visible")
    page.screenshot(path=shots / "modern.png")
    page.close()
    comfy.post("/settings/Comfy.VueNodes.Enabled", False)


def test_thumbnails_can_be_made(comfy: ComfyServer) -> None:
    pictures = comfy_thumbnails.pictures_of(comfy, QUICKSTART)
    assert [picture.size for picture in pictures] == [(128, 128)] * 4
    assert comfy_thumbnails.sheet(pictures).size == (comfy_thumbnails.SIDE, comfy_thumbnails.SIDE)


def test_a_workflow_that_needs_nothing_has_its_picture() -> None:
    assert (comfy_facts.WORKFLOWS / f"{QUICKSTART}.jpg").is_file()
