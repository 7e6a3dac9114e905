"""What ComfyUI's users open and read, checked without ComfyUI: workflows, help pages, translations, registry data."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
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
WORKFLOWS = comfy_facts.read(comfy_facts.WORKFLOWS)
# Inside a blueprint links are written by name; here as in a workflow.
BLUEPRINTS = {
    name: {**graph, "links": [[link[key] for key in comfy_facts.LINK] for link in graph["links"]]}
    for name, graph in comfy_facts.subgraphs().items()
}
GRAPHS = WORKFLOWS | BLUEPRINTS
APP = ".app"  # what the name of an app ends with
NO_DOWNLOAD = "(no download)"
TITLE = 30  # pixels above a node's position
SCREEN = (1600, 900)  # pixels of a browser's window
SLOT = 20  # pixels from one socket to the next
OUTSIDE_IN, OUTSIDE_OUT = -10, -20  # what links to a blueprint's own inputs and outputs say instead of a node
ONE_STEP = "wadi-sd15-one-step.safetensors"
PYTHON_TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str, "WEBCAM": str}
AUTHORS = "https://huggingface.co/gudaochangsheng/WaDi/resolve/main/"
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
every_blueprint = pytest.mark.parametrize("name", BLUEPRINTS)
every_graph = pytest.mark.parametrize("name", GRAPHS)
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


def test_names_are_numbered_and_begin_with_what_needs_nothing() -> None:
    """They are the titles of the cards."""
    assert [name[:3] for name in WORKFLOWS] == [f"{number:02} " for number in range(1, len(WORKFLOWS) + 1)]
    first, second, *_ = WORKFLOWS
    assert "Quickstart" in first and NO_DOWNLOAD in first and "Released network" in second
    assert not [name for name in GRAPHS if re.search(r"""[<>:"/\\|?*#%_]""", name)]


@every_version
@every_graph
def test_nodes_have_the_inputs_widgets_and_outputs_that_comfyui_gives_them(name: str, version: str) -> None:
    for node in server_nodes(GRAPHS[name]):
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


@every_graph
def test_every_socket_that_has_to_be_linked_is(name: str) -> None:
    for node in server_nodes(GRAPHS[name]):
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
    assert not workflow["groups"]


def way(workflow: dict[str, Any], link: list[Any]) -> Iterator[tuple[float, float]]:
    """Points of a link as it is drawn: a curve that leaves to the right and arrives from the left."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    _, start, output, end, slot, _ = link
    (x, y), (width, _) = nodes[start]["pos"], nodes[start]["size"]
    begin = (x + width, y + (output + 0.7) * SLOT)
    (x, y), (_, height) = nodes[end]["pos"], nodes[end]["size"]
    sockets = [index for index, one in enumerate(nodes[end]["inputs"]) if "widget" not in one]
    goal = (x, y + ((sockets.index(slot) + 0.7) * SLOT if slot in sockets else height / 2))
    reach = math.dist(begin, goal) / 4
    points = (begin, (begin[0] + reach, begin[1]), (goal[0] - reach, goal[1]), goal)
    for step in range(61):
        t = step / 60
        shares = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
        yield tuple(sum(share * point[axis] for share, point in zip(shares, points, strict=True)) for axis in (0, 1))


@every_workflow
def test_no_link_passes_behind_a_node(name: str) -> None:
    workflow = WORKFLOWS[name]
    for link in workflow["links"]:
        points = list(way(workflow, link))
        for node in workflow["nodes"]:
            if node["id"] in (link[1], link[3]):
                continue
            (left, y), (width, height) = node["pos"], node["size"]
            hidden = [x for x, at in points if left < x < left + width and y - TITLE < at < y + height]
            assert not hidden, f"link {link[0]} ({link[5]}) behind node {node['id']} ({node['type']})"


@every_workflow
def test_the_first_view_is_readable_and_begins_with_the_note(name: str) -> None:
    workflow = WORKFLOWS[name]
    scale, (x, y) = (workflow["extra"]["ds"][key] for key in ("scale", "offset"))
    assert 0.65 <= scale <= 1 and x > 0 and y > TITLE
    note, *nodes = workflow["nodes"]
    assert note["type"] in comfy_facts.NOTES and note["pos"] == [0, 0]
    width, height = SCREEN[0] / scale - x, SCREEN[1] / scale - y
    assert note["size"][0] < width and note["size"][1] < height
    assert [node for node in nodes if node["pos"][0] + node["size"][0] < width and node["pos"][1] + node["size"][1] < height]


@every_workflow
def test_a_note_says_which_file_goes_where(name: str) -> None:
    workflow = WORKFLOWS[name]
    notes = "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in comfy_facts.NOTES)
    assert notes
    for node in server_nodes(workflow):
        for widget, value in widgets_of(node, NEWEST[node["type"]]).items():
            if widget in FOLDERS:
                assert any(value in line and FOLDERS[widget] in line for line in notes.splitlines()), value
        listed = {model["name"]: model for model in node["properties"].get("models", [])}
        for file, model in listed.items():
            assert file in node["widgets_values"] and f"models/{model['directory']}" in FOLDERS.values()
            assert model["url"].startswith("https://") if "url" in model else file == ONE_STEP
        for value in node.get("widgets_values", []):
            if str(value).startswith("rotated_"):  # a Download button for what the authors released
                assert listed[value] == {"name": value, "url": AUTHORS + value, "directory": "diffusion_models"}
            if value == ONE_STEP:  # which is nowhere to be had, but made
                assert listed[value]["directory"] == "lorad" and "wadi get sd15 --comfyui" in notes


def widget_names(node: dict[str, Any]) -> set[str]:
    return {slot["widget"]["name"] for slot in node["inputs"] if "widget" in slot}


@every_workflow
def test_app_mode_shows_what_a_beginner_changes_and_the_picture(name: str) -> None:
    workflow = WORKFLOWS[name]
    data = workflow["extra"].get("linearData")
    assert workflow["extra"].get("linearMode", False) == name.endswith(APP)
    assert data or not (name.endswith(APP) or NO_DOWNLOAD in name)
    if data is None:
        return
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node, widget in data["inputs"]:
        assert widget in widget_names(nodes[node])
        assert next(slot for slot in nodes[node]["inputs"] if slot["name"] == widget)["link"] is None
    shown = {widget for _, widget in data["inputs"]}
    assert shown & {"text", "strengths"} and shown & {"seed", "width"}
    assert data["outputs"] and {nodes[node]["type"] for node in data["outputs"]} <= {"SaveImage", "PreviewImage"}


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if "Live" in name])
def test_a_live_template_draws_one_picture_from_the_same_noise(name: str) -> None:
    nodes = server_nodes(WORKFLOWS[name])
    [sampler] = [widgets_of(node, NEWEST[node["type"]]) for node in nodes if node["type"] == "WaDi_OneStepSampler"]
    [control] = [node["widgets_values"][4] for node in nodes if node["type"] == "WaDi_OneStepSampler"]
    assert sampler["batch_size"] == 1 and control == "fixed"
    assert "PreviewImage" in {node["type"] for node in nodes} and "SaveImage" not in {node["type"] for node in nodes}
    assert "**Run (On Change)**" in WORKFLOWS[name]["nodes"][0]["widgets_values"][0] or "webcam" in name


@every_blueprint
def test_a_blueprint_joins_what_is_inside_with_what_is_outside(name: str) -> None:
    blueprint = comfy_facts.read(comfy_facts.BLUEPRINTS)[name]
    [host], inside = blueprint["nodes"], BLUEPRINTS[name]
    assert host["type"] == inside["id"] and inside["name"] == name and blueprint["extra"]["BlueprintDescription"]
    assert {"wadi", "one step"} & set(blueprint["extra"]["BlueprintSearchAliases"])
    nodes = {node["id"]: node for node in inside["nodes"]}
    links = {link[0]: link for link in inside["links"]}
    assert len(links) == len(inside["links"]) and max(links) <= inside["state"]["lastLinkId"]
    for number, start, output, end, slot, kind in links.values():
        if start == OUTSIDE_IN:
            assert number in inside["inputs"][output]["linkIds"] and inside["inputs"][output]["type"] == kind
        else:
            assert number in nodes[start]["outputs"][output]["links"] and nodes[start]["outputs"][output]["type"] == kind
        if end == OUTSIDE_OUT:
            assert number in inside["outputs"][slot]["linkIds"] and inside["outputs"][slot]["type"] == kind
        else:
            assert nodes[end]["inputs"][slot]["link"] == number and nodes[end]["inputs"][slot]["type"] == kind
    for there, here in ((inside["inputs"], host["inputs"]), (inside["outputs"], host["outputs"])):
        assert [(slot["name"], slot["type"]) for slot in there] == [(slot["name"], slot["type"]) for slot in here]
    lifted = [slot["name"] for slot in host["inputs"] if "widget" in slot]
    assert [widget for _, widget in host["properties"]["proxyWidgets"]] == lifted
    assert len(host["widgets_values"]) == len(lifted)


@every_workflow
def test_one_step_is_set_as_it_has_to_be(name: str) -> None:
    for node in server_nodes(WORKFLOWS[name]):
        if node["type"] == "KSampler":
            set_to = widgets_of(node, NEWEST["KSampler"])
            assert (set_to["steps"], set_to["cfg"], set_to["denoise"]) == (1, 1, 1)
            assert set_to["sampler_name"] == "wadi_one_step"


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if NO_DOWNLOAD in name])
def test_wadi_mini_is_asked_for_things_that_it_knows(name: str) -> None:
    known = {thing.name for thing in scenes.things()}
    kinds = ("CLIPTextEncode", "WaDi_PromptBatch")
    texts = [node["widgets_values"][0] for node in WORKFLOWS[name]["nodes"] if node["type"] in kinds]
    asked = [line for text in texts for line in text.splitlines()]
    assert asked
    for prompt in asked:
        told = re.sub(r"embedding:\S+", "and", prompt)
        told = re.split(r" on an? ", told)[0].replace("a sks ", "a ")  # the word of the subject that comes with it
        parts = [re.sub(r"^an? ", "", part) for part in told.split(" and ")]
        assert set(parts) <= known, prompt


def test_every_template_has_a_small_picture() -> None:
    pictures = sorted(comfy_facts.WORKFLOWS.glob("*.jpg"))
    assert [picture.stem for picture in pictures] == list(WORKFLOWS)
    for picture in pictures:
        assert picture.stat().st_size < 100_000
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
    sources = [*(ROOT / "comfy_nodes" / "web").glob("*.js"), *(ROOT / "comfy_nodes").glob("*.py")]
    script = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    used = set(re.findall(r'"((?:warn|note)_\w+)"', script)) | set(re.findall(r'say\("(\w+)"\)', script))
    assert used <= set(main["en"]["wadi"])
    assert set(main["en"]["wadi"]) - used <= {"one_step", "ordinary"}
    for name, message in main["en"]["wadi"].items():
        assert set(re.findall(r"%\w+%", message)) == set(re.findall(r"%\w+%", main["ja"]["wadi"][name])), name


def test_settings_are_translated_by_the_names_that_the_script_gives_them() -> None:
    script = (ROOT / "comfy_nodes" / "web" / "wadi.js").read_text(encoding="utf-8")
    names = {name.replace(".", "_") for name in re.findall(r'"(WaDi\.Nodes\.\w+)"', script)}
    said = {lang: json.loads((LOCALES / lang / "settings.json").read_text(encoding="utf-8")) for lang in LANGUAGES}
    assert names and all(set(words) == names for words in said.values())
    for words in said["en"].values():
        assert f'name: "{words["name"]}"' in script


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
