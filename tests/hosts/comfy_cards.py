"""Drawn cards for the workflows whose pictures need networks that are not in the pack: graph, title, and what is needed.

    python tests/hosts/comfy_cards.py [NAME ...]

writes ``workflows/<name>.jpg`` for the names given, or for every workflow that needs files of its own or a camera.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WORKFLOWS = Path(__file__).parents[2] / "workflows"
SIDE = 512  # pixels
EDGE = 32  # pixels kept free around everything
TOP, BOTTOM = (22, 27, 46), (66, 32, 84)  # colours of the background
PAPER, FAINT, LINK, PLAIN = (245, 245, 250), (190, 190, 210), (150, 150, 180), (72, 76, 92)
MAP = 196  # height of the drawn graph
NOTES = ("Note", "MarkdownNote")
# Files by how their names begin, and nodes, in people's words.
NEEDS = {
    "v1-5-": "Stable Diffusion 1.5",
    "v2-1_": "Stable Diffusion 2.1",
    "rotated_": "the authors' network",
    "wadi-sd15-one-step.safe": "the one-step LoRaD",
    "t5xxl": "the T5 text encoder",
    "vae-ft": "a VAE",
    "control_": "a ControlNet",
    "your-style": "a style LoRA",
    "personal": "a LoRaD of your own",
    "WebcamCapture": "a camera",
}


def needs(workflow: dict[str, Any]) -> list[str]:
    """What a workflow asks for besides the pack."""
    nodes = workflow["nodes"]
    asked = [value for node in nodes if node["type"] not in NOTES for value in (node["type"], *node.get("widgets_values", []))]
    if any("embedding:relation" in str(value) for value in asked):
        return [*_named(asked), "a learned word"]
    return _named(asked)


def _named(asked: list[Any]) -> list[str]:
    return [words for start, words in NEEDS.items() if any(str(value).startswith(start) for value in asked)]


def card(name: str, workflow: dict[str, Any]) -> Image.Image:
    """A workflow's card."""
    shade = Image.linear_gradient("L").resize((SIDE, SIDE))
    made = Image.composite(Image.new("RGB", shade.size, BOTTOM), Image.new("RGB", shade.size, TOP), shade)
    draw = ImageDraw.Draw(made)
    _draw_graph(draw, workflow)
    number, _, title = name.removesuffix(".app").partition(" ")
    y = EDGE + MAP + 36
    for line in _wrapped(draw, title.partition(" (")[0], _font(38)):
        draw.text((EDGE, y), line, PAPER, _font(38))
        y += 46
    _, bracket, inside = title.partition(" (")
    if bracket:
        draw.text((EDGE, y + 2), inside.rstrip(")"), FAINT, _font(26))
    lines = _wrapped(draw, f"Needs {', '.join(needs(workflow))}", _font(22))
    for row, line in enumerate(lines):
        draw.text((EDGE, SIDE - EDGE - 28 * (len(lines) - row)), line, FAINT, _font(22))
    draw.text((SIDE - EDGE, EDGE - 18), number, FAINT, _font(22), anchor="ra")
    return made


def _draw_graph(draw: ImageDraw.ImageDraw, workflow: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    left, top = (min(node["pos"][axis] for node in nodes.values()) for axis in (0, 1))
    right, bottom = (max(node["pos"][axis] + node["size"][axis] for node in nodes.values()) for axis in (0, 1))
    scale = min((SIDE - 2 * EDGE) / (right - left), MAP / (bottom - top))
    aside, above = (SIDE - (right - left) * scale) / 2, EDGE + (MAP - (bottom - top) * scale) / 2

    def at(x: float, y: float) -> tuple[float, float]:
        return aside + (x - left) * scale, above + (y - top) * scale

    for _, start, _, end, _, _ in workflow["links"]:
        (x, y), (width, height) = nodes[start]["pos"], nodes[start]["size"]
        into, size = nodes[end]["pos"], nodes[end]["size"]
        draw.line((*at(x + width, y + height / 2), *at(into[0], into[1] + size[1] / 2)), LINK, 2)
    for node in nodes.values():
        (x, y), (width, height) = node["pos"], node["size"]
        colour = tuple(int(part * 2, 16) for part in node["bgcolor"][1:]) if "bgcolor" in node else PLAIN
        lighter = tuple(min(255, part + 50) for part in colour)
        draw.rounded_rectangle((*at(x, y), *at(x + width, y + height)), 4, lighter, FAINT)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= SIDE - 2 * EDGE:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def main(names: list[str]) -> None:
    for path in sorted(WORKFLOWS.glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        if path.stem in names or (not names and needs(workflow)):
            card(path.stem, workflow).save(path.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main(sys.argv[1:])
