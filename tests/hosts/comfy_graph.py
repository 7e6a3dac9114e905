"""Prompts for ComfyUI's API: written node by node, or converted from the workflows that its front end saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "WEBCAM")
MUTED, BYPASSED = 2, 4


class Node:
    """A node in a :class:`Graph`; ``node[1]`` is a link to its second output."""

    def __init__(self, name: str) -> None:
        self.id = name

    def __getitem__(self, output: int) -> list[Any]:
        return [self.id, output]


class Graph:
    """A prompt: ``graph("KSampler", model=loader[0], ...)`` adds a node."""

    def __init__(self) -> None:
        self.prompt: dict[str, dict[str, Any]] = {}

    def __call__(self, class_type: str, **inputs: Any) -> Node:
        name = str(len(self.prompt) + 1)
        self.prompt[name] = {"class_type": class_type, "inputs": inputs}
        return Node(name)


def to_api(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A saved workflow as the front end would send it.

    Args:
        workflow: the JSON of a workflow file.
        object_info: of the server, which knows the order of widgets.
    """
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node.get("mode") in (MUTED, BYPASSED):
            continue
        declared = object_info[node["type"]]["input"]
        inputs: dict[str, Any] = {}
        values = list(node.get("widgets_values") or [])
        for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput"):
                inputs[name] = values.pop(0)
                # After a seed the front end keeps what becomes of it: "fixed", "randomize" and so on.
                if options.get("control_after_generate") or (name in ("seed", "noise_seed") and kind == "INT"):
                    values.pop(0)
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = list(links[slot["link"]])
        assert not values, f"{node['type']}: widgets {values} are left over"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
