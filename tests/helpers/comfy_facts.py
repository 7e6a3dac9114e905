"""What ComfyUI says of nodes at /object_info, boiled down to what a workflow has to agree with: names and types.

The facts of the stock nodes that the workflows use, and of the pack's own, are kept in ``data/comfyui-nodes.json`` for
each version of ComfyUI, so that workflows, help pages and translations are checked where there is no ComfyUI. The tests
of a running host compare the file with what it says; to write the file anew from one that runs:

    python tests/helpers/comfy_facts.py http://127.0.0.1:8188 0.33.0
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "data" / "comfyui-nodes.json"
WORKFLOWS = Path(__file__).parents[2] / "workflows"
BLUEPRINTS = Path(__file__).parents[2] / "subgraphs"
PREFIX = "WaDi_"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "WEBCAM")
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")  # a link's parts, in a workflow's order
NOTES = ("Note", "MarkdownNote")  # nodes of the front end, which the server does not know

Facts = dict[str, Any]


def facts_of(node: Facts) -> Facts:
    """Inputs in their order (name, type, and "optional" or "control" where it is so) and outputs (types) of a node."""
    inputs = []
    for section in ("required", "optional"):
        for name, (kind, *options) in node["input"].get(section, {}).items():
            # A list of values is the older way to write a combo; older nodes do not declare what follows a seed.
            plain = "COMBO" if isinstance(kind, list) else kind
            seed = plain == "INT" and name in ("seed", "noise_seed")
            control = seed or bool(options and options[0].get("control_after_generate"))
            inputs.append([name, plain, *(["optional"] if section == "optional" else []), *(["control"] if control else [])])
    return {"inputs": inputs, "outputs": list(node["output"])}


def read(folder: Path) -> dict[str, Facts]:
    """The JSON files of a folder by their names, in order."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def subgraphs() -> dict[str, Facts]:
    """What is inside the blueprints."""
    return {name: blueprint["definitions"]["subgraphs"][0] for name, blueprint in read(BLUEPRINTS).items()}


def used(object_info: Facts) -> dict[str, Facts]:
    """The facts of the pack's nodes and of those in its workflows and blueprints."""
    names = {node["type"] for graph in (*read(WORKFLOWS).values(), *subgraphs().values()) for node in graph["nodes"]}
    names -= set(NOTES)
    names |= {name for name in object_info if name.startswith(PREFIX)}
    return {name: facts_of(object_info[name]) for name in sorted(names)}


def kept() -> dict[str, dict[str, Facts]]:
    """The kept facts: version of ComfyUI -> node -> facts."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def main(url: str, version: str) -> None:
    """Write the facts of a running server into the file."""
    with urllib.request.urlopen(f"{url}/object_info", timeout=60) as answer:
        object_info = json.load(answer)
    versions = {**(kept() if FILE.is_file() else {}), version: used(object_info)}
    lines = []
    for name, nodes in sorted(versions.items()):
        body = ",\n".join(f"    {json.dumps(node)}: {json.dumps(facts)}" for node, facts in nodes.items())
        lines.append(f"  {json.dumps(name)}: {{\n{body}\n  }}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])
