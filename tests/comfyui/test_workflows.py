"""What ComfyUI's users open and read, checked without ComfyUI: workflows, help pages, translations, registry data."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import comfy_facts
import pytest
from PIL import Image

from trainer.mini import scenes

ROOT = Path(__file__).parents[2]
HELP = ROOT / "comfy_nodes" / "web" / "docs"
LOCALES = ROOT / "locales"
LANGUAGES = ("en", "ja")
FACTS = comfy_facts.kept()
NEWEST = FACTS["0.33.0"]
OURS = sorted(name for name in NEWEST if name.startswith(comfy_facts.PREFIX))
WORKFLOWS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(comfy_facts.WORKFLOWS.glob("*.json"))}
TITLE = 30  # pixels above a node's position
PYTHON_TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}
# The loaders' files and where ComfyUI looks for them.
FOLDERS = {
    "ckpt_name": "models/checkpoints",
    "lorad_name": "models/lorad",
    "lora_name": "models/loras",
    "unet_name": "models/diffusion_models",
    "clip_name": "models/text_encoders",
    "vae_name": "models/vae",
    "control_net_name": "models/controlnet",
}
every_workflow = pytest.mark.parametrize("name", WORKFLOWS)
every_version = pytest.mark.parametrize("version", FACTS)


def widgets_of(node: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """A saved node's widget values by name."""
    values, named = list(node.get("widgets_values", [])), {}
    for name, kind, *more in facts["inputs"]:
        if kind in comfy_facts.WIDGETS:
            named[name] = values.pop(0)
            if "control" in more:
                assert values.pop(0) in ("fixed", "randomize", "increment", "decrement")
    assert not values, f"{node['type']}: {values} are left over"
    return named


def server_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in workflow["nodes"] if node["type"] not in comfy_facts.NOTES]


def test_the_promised_workflows_are_there() -> None:
    assert list(WORKFLOWS)[:5] == [
        "01-embedded-quickstart",
        "02-sd15-one-step",
        "03-sd15-lora-stack",
        "04-released-unet-to-lorad",
        "05-pixart-one-step",
    ]


@every_version
@every_workflow
def test_nodes_have_the_inputs_widgets_and_outputs_that_comfyui_gives_them(name: str, version: str) -> None:
    for node in server_nodes(WORKFLOWS[name]):
        facts = FACTS[version][node["type"]]
        declared = {input_name: kind for input_name, kind, *_ in facts["inputs"]}
        assert {slot["name"]: slot["type"] for slot in node["inputs"]} == declared
        for slot, kind in zip(node["outputs"], facts["outputs"], strict=False):
            assert slot["type"] == kind
        assert len(node["outputs"]) <= len(facts["outputs"])
        for widget, value in widgets_of(node, facts).items():
            assert isinstance(value, PYTHON_TYPES[declared[widget]]), f"{node['type']}.{widget}: {value!r}"
            assert isinstance(value, bool) == (declared[widget] == "BOOLEAN")


@every_workflow
def test_links_join_the_slots_that_they_say(name: str) -> None:
    workflow = WORKFLOWS[name]
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    links = {link[0]: link for link in workflow["links"]}
    assert len(links) == len(workflow["links"]) and max(links) == workflow["last_link_id"]
    for number, start, output, end, slot, kind in workflow["links"]:
        assert number in nodes[start]["outputs"][output]["links"] and nodes[end]["inputs"][slot]["link"] == number
        assert kind == nodes[start]["outputs"][output]["type"] == nodes[end]["inputs"][slot]["type"]
        assert nodes[start]["order"] < nodes[end]["order"]
    for node in nodes.values():
        assert {slot["link"] for slot in node["inputs"] if slot["link"] is not None} <= set(links)
        assert {number for slot in node["outputs"] for number in slot["links"]} <= set(links)


@every_workflow
def test_every_socket_that_has_to_be_linked_is(name: str) -> None:
    for node in server_nodes(WORKFLOWS[name]):
        linked = {slot["name"] for slot in node["inputs"] if slot["link"] is not None}
        sockets = [row for row in NEWEST[node["type"]]["inputs"] if row[1] not in comfy_facts.WIDGETS]
        assert {row[0] for row in sockets if "optional" not in row} <= linked, node["type"]


@every_workflow
def test_nothing_lies_over_anything_else(name: str) -> None:
    workflow = WORKFLOWS[name]
    boxes = {
        node["id"]: (node["pos"][0], node["pos"][1] - TITLE, node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
        for node in workflow["nodes"]
    }
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"nodes {one} and {other}"
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        for a in boxes.values():
            inside = x <= a[0] and y <= a[1] and a[2] <= x + width and a[3] <= y + height
            outside = a[2] <= x or x + width <= a[0] or a[3] <= y or y + height <= a[1]
            assert inside or outside, group["title"]


@every_workflow
def test_a_note_says_which_file_goes_where(name: str) -> None:
    workflow = WORKFLOWS[name]
    notes = "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in comfy_facts.NOTES)
    assert notes
    for node in server_nodes(workflow):
        for widget, value in widgets_of(node, NEWEST[node["type"]]).items():
            if widget in FOLDERS:
                assert any(value in line and FOLDERS[widget] in line for line in notes.splitlines()), value
        for model in node["properties"].get("models", []):
            assert model["name"] in node["widgets_values"] and model["url"].startswith("https://")
            assert f"models/{model['directory']}" in FOLDERS.values()


@every_workflow
def test_one_step_is_set_as_it_has_to_be(name: str) -> None:
    for node in server_nodes(WORKFLOWS[name]):
        if node["type"] == "KSampler":
            set_to = widgets_of(node, NEWEST["KSampler"])
            assert (set_to["steps"], set_to["cfg"], set_to["denoise"]) == (1, 1, 1)
            assert set_to["sampler_name"] == "wadi_one_step"


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name.endswith("embedded")])
def test_wadi_mini_is_asked_for_things_that_it_knows(name: str) -> None:
    known = {thing.name for thing in scenes.things()}
    asked = [node["widgets_values"][0] for node in WORKFLOWS[name]["nodes"] if node["type"] == "CLIPTextEncode"]
    assert asked
    for prompt in asked:
        told = re.sub(r"embedding:\S+", "and", prompt)
        told = re.split(r" on an? ", told)[0].replace("a sks ", "a ")  # the word of the subject that comes with it
        parts = [re.sub(r"^an? ", "", part) for part in told.split(" and ")]
        assert set(parts) <= known, prompt


def test_thumbnails_belong_to_workflows_and_are_small() -> None:
    for picture in sorted(comfy_facts.WORKFLOWS.glob("*.jpg")):
        assert picture.stem in WORKFLOWS and picture.stat().st_size < 200_000
        with Image.open(picture) as opened:
            assert opened.format == "JPEG" and 256 <= min(opened.size) and max(opened.size) <= 1024


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", OURS)
def test_every_node_has_a_help_page(node: str, language: str) -> None:
    page = (HELP / node / f"{language}.md").read_text(encoding="utf-8")
    names = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))[node]
    assert page.startswith(f"# {names['display_name']}\n") and len(page) > 400
    assert bool(re.search("[ぁ-ん]", page)) == (language == "ja")
    table = page[page.index("\n## ") :]
    for name, words in names.get("inputs", {}).items():
        if name != "control_after_generate":
            assert words["name"] in table, name
    for words in names["outputs"].values():
        assert words["name"].lower() in table.lower()


def test_help_is_of_nodes_that_exist() -> None:
    assert sorted(path.name for path in HELP.iterdir()) == OURS


def test_help_links_no_address_but_files_of_the_pack() -> None:
    assert not [page for page in HELP.rglob("*.md") if re.search(r"https?://|<script|<img", page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_and_tooltips_are_translated(language: str) -> None:
    words = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert sorted(words) == OURS
    for node, said in words.items():
        inputs = {name: row for name, *row in NEWEST[node]["inputs"]}
        declared = set(inputs) | ({"control_after_generate"} if any("control" in row for row in inputs.values()) else set())
        assert set(said.get("inputs", {})) == declared and said["display_name"] and said["description"]
        assert set(said["outputs"]) == {str(index) for index in range(len(NEWEST[node]["outputs"]))}
        assert all(slot["name"] and slot["tooltip"] for slot in said["outputs"].values())
        assert all(slot["name"] and slot["tooltip"] for name, slot in said.get("inputs", {}).items() if name in inputs)


def test_languages_say_the_same_things() -> None:
    main = {lang: json.loads((LOCALES / lang / "main.json").read_text(encoding="utf-8")) for lang in LANGUAGES}
    assert set(main["en"]["wadi"]) == set(main["ja"]["wadi"])
    script = (ROOT / "comfy_nodes" / "web" / "wadi.js").read_text(encoding="utf-8")
    used = set(re.findall(r'"((?:warn|note)_\w+)"', script)) | set(re.findall(r'say\("(\w+)"\)', script))
    assert used <= set(main["en"]["wadi"])
    assert set(main["en"]["wadi"]) - used <= {"one_step", "ordinary"}


@pytest.mark.parametrize("file", sorted(LOCALES.rglob("*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_translations_have_nothing_that_the_front_end_takes_for_its_own_signs(file: Path) -> None:
    texts = re.findall(r'": "(.*)"', file.read_text(encoding="utf-8"))
    assert texts and not [text for text in texts if re.search(r"[{}@|]|\$t", text)]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_registry_data_are_complete() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    comfy = project["tool"]["comfy"]
    assert not project["project"]["name"].lower().startswith("comfy")
    assert "version" in project["project"]["dynamic"]
    found = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', (ROOT / comfy["version"]["path"]).read_text(), re.MULTILINE)
    assert len(found) == 1
    assert comfy["PublisherId"] and comfy["DisplayName"]
    with Image.open(ROOT / "docs/images/icon.png") as icon, Image.open(ROOT / "docs/images/banner.png") as banner:
        assert comfy["Icon"].endswith("docs/images/icon.png") and icon.size == (400, 400)
        assert comfy["Banner"].endswith("docs/images/banner.png") and abs(banner.width / banner.height - 21 / 9) < 0.01
