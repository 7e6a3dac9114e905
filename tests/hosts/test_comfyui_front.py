"""What is more than panels in ComfyUI's front end: reports that stay, settings, blueprints, App Mode, the live template.

It needs what ``test_comfyui_browser.py`` needs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import comfy_facts
import comfy_live
import pytest
from comfy_page import (
    LIVE,
    ONE_LORAD,
    QUICKSTART,
    SHOWN,
    STYLE,
    WITH_LORA,
    WORKFLOWS,
    change,
    load,
    panel,
    touch,
    version_of,
    wait_for_panel,
)
from comfy_server import PACK, ComfyServer

pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")

APP_MODE_SINCE = (1, 40)
LIVE_SINCE = (1, 58)  # before, a change is one when the text field is left
APP = next(name for name in WORKFLOWS if name.endswith(".app"))
CHAIN = """(count) => {
  app.graph.clear();
  const add = (type) => { const node = LiteGraph.createNode(type); app.graph.add(node); return node; };
  let last = add("CheckpointLoaderSimple");
  for (let index = 0; index < count; index++) {
    const merge = add("ModelMergeSimple");
    last.connect(0, merge, 0);
    last.connect(0, merge, 1);
    last = merge;
  }
  last.connect(0, add("KSampler"), 0);
}"""
VISITS = f"""async () => {{
  const {{ Walk }} = await import("/extensions/{PACK}/links.js");
  const {{ remarksOn }} = await import("/extensions/{PACK}/remarks.js");
  const sampler = app.graph.nodes.find((node) => node.type === "KSampler");
  const walk = new Walk();
  remarksOn(walk, sampler, [], () => null);
  return walk.visits;
}}"""


def test_a_look_at_the_graph_visits_every_place_once(page: Any) -> None:
    """Merges in a chain have two ways from each to the next: 2^30 in all."""
    visits = {}
    for count in (15, 30, 60):
        page.evaluate(CHAIN, count)
        visits[count] = page.evaluate(VISITS)
        assert count < visits[count] <= 3 * (count + 2)
    assert visits[60] - visits[30] == 2 * (visits[30] - visits[15])
    load(page, QUICKSTART)


def test_a_loop_of_bypassed_nodes_ends_the_look(page: Any) -> None:
    page.evaluate(CHAIN, 2)
    page.evaluate("""() => {
      const [first, second] = app.graph.nodes.filter((node) => node.type === "ModelMergeSimple");
      first.mode = second.mode = 4;
      second.connect(0, first, 0);
    }""")
    assert page.evaluate(VISITS) < 10
    load(page, QUICKSTART)


def test_what_a_node_reported_stays_when_it_is_cached_and_when_the_page_is_loaded_again(page: Any, comfy: ComfyServer) -> None:
    comfy.post("/free", {"free_memory": True})
    load(page, QUICKSTART)
    page.get_by_test_id("queue-button").click()
    wait_for_panel(page, "WaDi_ApplyLoRaD", "layers")
    said = panel(page, "WaDi_ApplyLoRaD")
    saved = page.evaluate("() => JSON.stringify(app.graph.serialize())")
    page.evaluate("(saved) => app.loadGraphData(JSON.parse(saved))", saved)
    wait_for_panel(page, "WaDi_ApplyLoRaD", said)
    pictures = "() => app.graph.nodes.find((node) => node.type === 'SaveImage').imgs?.[0]?.src"
    before = page.evaluate(pictures)
    page.get_by_test_id("queue-button").click()  # of the sampler's new seed; what lies before it is cached
    page.wait_for_function(f"(before) => ({pictures})() && ({pictures})() !== before", arg=before)
    touch(page)
    assert panel(page, "WaDi_ApplyLoRaD") == said
    change(page, "WaDi_ApplyLoRaD", strength=0.5)
    assert panel(page, "WaDi_ApplyLoRaD") == ""  # it was not said of this
    change(page, "WaDi_ApplyLoRaD", strength=1)
    wait_for_panel(page, "WaDi_ApplyLoRaD", said)


def test_a_size_that_does_not_suit_is_said_on_the_sampler_until_it_is_changed(page: Any, shots: Path) -> None:
    load(page, QUICKSTART)
    change(page, "WaDi_OneStepSampler", width=256, height=256, batch_size=1)
    page.get_by_test_id("queue-button").click()
    wait_for_panel(page, "WaDi_OneStepSampler", "256x256 is not the size")
    assert panel(page, "WaDi_OneStepSampler").count("256x256") == 1
    page.screenshot(path=shots / "size.png")
    change(page, "WaDi_OneStepSampler", width=128, height=128)
    assert panel(page, "WaDi_OneStepSampler") == ""


def test_a_lorad_of_the_stock_lora_loader_counts_as_one_step(page: Any, comfy_base: Path) -> None:
    loras, lorads = comfy_base / "models/loras", comfy_base / "models/lorad"
    shutil.copyfile(lorads / SHOWN, loras / f"stock-{SHOWN}")
    shutil.copyfile(lorads / STYLE, loras / f"stock-{STYLE}")
    load(page, WITH_LORA)
    page.evaluate("() => { app.graph.nodes.find((node) => node.type === 'WaDi_LoadLoRaD').mode = 4 }")
    change(page, "LoraLoader", lora_name=f"stock-{STYLE}")
    wait_for_panel(page, "KSampler", "No one-step weights")
    change(page, "LoraLoader", lora_name=f"stock-{SHOWN}")
    page.wait_for_timeout(1000)
    touch(page)
    assert panel(page, "KSampler") == ""
    change(page, "LoraLoader", strength_model=0)
    wait_for_panel(page, "KSampler", "No one-step weights")


def test_a_file_that_has_changed_is_read_again(page: Any, comfy_base: Path) -> None:
    folder = comfy_base / "models/lorad"
    shutil.copyfile(folder / SHOWN, folder / "swapped.safetensors")
    page.evaluate("() => app.refreshComboInNodes()")
    load(page, ONE_LORAD)
    change(page, "WaDi_LoadLoRaD", lorad_name="swapped.safetensors")
    wait_for_panel(page, "WaDi_LoadLoRaD", "one-step weights")
    shutil.copyfile(folder / STYLE, folder / "swapped.safetensors")
    page.evaluate("() => app.refreshComboInNodes()")
    wait_for_panel(page, "WaDi_LoadLoRaD", "ordinary adapter")
    (folder / "swapped.safetensors").unlink()


def test_settings_of_the_pack(page: Any, shots: Path) -> None:
    put = "([name, value]) => app.extensionManager.setting.set(name, value)"
    page.evaluate(put, ["WaDi.Nodes.Strength", 0.7])
    new = "() => LiteGraph.createNode('WaDi_LoadLoRaD').widgets.find((widget) => widget.name === 'strength').value"
    assert page.evaluate(new) == 0.7
    load(page, WITH_LORA)
    saved = "() => app.graph.nodes.find((node) => node.type === 'WaDi_LoadLoRaD').widgets[1].value"
    assert page.evaluate(saved) == 1
    page.evaluate(put, ["WaDi.Nodes.Strength", 1])
    change(page, "KSampler", cfg=7)
    wait_for_panel(page, "KSampler", "Set cfg to 1")
    page.evaluate(put, ["WaDi.Nodes.Warnings", False])
    page.wait_for_timeout(500)
    assert panel(page, "KSampler") == ""
    page.evaluate(put, ["WaDi.Nodes.Warnings", True])
    wait_for_panel(page, "KSampler", "Set cfg to 1")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    page.get_by_text("WaDi", exact=True).first.click()
    page.get_by_text("Strength of a new LoRaD node").first.wait_for()
    page.screenshot(path=shots / "settings.png")
    page.keyboard.press("Escape")


def test_the_slot_of_an_adapter_has_its_colour_in_every_palette(page: Any) -> None:
    for palette in ("light", "dark"):
        page.evaluate("(id) => app.extensionManager.setting.set('Comfy.ColorPalette', id)", palette)
        page.wait_for_timeout(500)
        touch(page)
        assert page.evaluate("() => app.canvas.default_connection_color_byType.LORAD").startswith("#")
        variable = "getComputedStyle(document.documentElement).getPropertyValue('--color-datatype-LORAD')"
        assert page.evaluate(f"() => {variable}").strip().startswith("#")


def test_templates_are_listed_in_their_order(page: Any) -> None:
    listed = page.evaluate("async () => (await window.comfyAPI.api.api.getWorkflowTemplates())")
    assert listed[PACK] == WORKFLOWS


@pytest.mark.parametrize("name", comfy_facts.subgraphs())
def test_blueprint_opens_and_is_sent_whole(page: Any, comfy: ComfyServer, shots: Path, name: str) -> None:
    if version_of(page) < APP_MODE_SINCE:
        pytest.skip("this front end has no blueprints of packs")
    listed = comfy.get("/global_subgraphs")
    [key] = [key for key, one in listed.items() if one["name"] == name and one["info"]["node_pack"].endswith(f".{PACK}")]
    blueprint = json.loads(comfy.get(f"/global_subgraphs/{key}")["data"])
    assert page.wadi_errors == []  # among them what it could not load of blueprints
    page.evaluate("(graph) => app.loadGraphData(graph)", blueprint)
    page.wait_for_timeout(1500)
    page.screenshot(path=shots / f"blueprint-{name}.png")
    host = blueprint["nodes"][0]
    lifted = [slot["name"] for slot in host["inputs"] if "widget" in slot]
    values = page.evaluate("() => app.graph.nodes[0].widgets.map((widget) => [widget.name, widget.value])")
    assert [row for row in values if row[0] in lifted] == [
        list(row) for row in zip(lifted, host["widgets_values"], strict=True)
    ]
    inside = comfy_facts.subgraphs()[name]["nodes"]
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert sorted(node["class_type"] for node in sent.values()) == sorted(node["type"] for node in inside)
    sampler = next((node["inputs"] for node in sent.values() if node["class_type"] == "WaDi_OneStepSampler"), None)
    if sampler is not None:
        shown = dict(values)
        assert {key: sampler[key] for key in ("width", "height", "seed")} == {
            key: shown[key] for key in ("width", "height", "seed")
        }
    assert page.wadi_errors == []


def test_an_app_opens_as_one(page: Any, shots: Path) -> None:
    if version_of(page) < APP_MODE_SINCE:
        pytest.skip("this front end has no App Mode")
    load(page, APP)
    page.get_by_test_id("linear-run-button").or_(page.get_by_role("button", name="Run")).first.wait_for(state="visible")
    page.get_by_text("strength", exact=True).filter(visible=True).first.wait_for()
    skip = page.get_by_role("button", name="Skip", exact=True)  # the front end's own tour of App Mode
    if skip.count():
        skip.first.click()
        page.wait_for_timeout(500)
    page.screenshot(path=shots / "app-mode.png")
    load(page, QUICKSTART)


def test_typing_into_the_live_template_draws(page: Any, shots: Path) -> None:
    if version_of(page) < LIVE_SINCE:
        pytest.skip("this front end runs when the text field is left")
    load(page, LIVE)
    comfy_live.run_on_change(page)
    times = comfy_live.type_and_time(page, 2)
    page.screenshot(path=shots / "live.png")
    assert len(times) == 2 and all(0 < one["working"] <= one["to_picture"] for one in times)
    comfy_live.run_by_button(page)
