"""Thumbnails of the workflows, made by running them in ComfyUI:

    COMFYUI_PATH=... [COMFYUI_PYTHON=...] python tests/hosts/comfy_thumbnails.py [--models DIR] [NAME ...]

Without names it runs those that need nothing but the pack; the others find their files in a folder that is laid out as
ComfyUI's ``models``, and ``comfy_cards.py`` draws cards for them where there is none. Up to four pictures of the last
node that saves any, or else shows any, become ``workflows/<name>.jpg``; with the drawing that it began with, if it did.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import comfy_cards
import comfy_facts
from comfy_graph import to_api
from comfy_server import ROOT, ComfyServer, host_python, lay_out
from PIL import Image, ImageDraw

SIDE = 512  # pixels of a thumbnail
INSET = 176


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """One picture as it is, or four in a square."""
    pictures = pictures[:4] if len(pictures) >= 4 else pictures[:1]
    rows = 2 if len(pictures) == 4 else 1
    side = SIDE // rows
    made = Image.new("RGB", (SIDE, SIDE))
    for index, picture in enumerate(pictures):
        scaled = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        made.paste(scaled, (index % rows * side, index // rows * side))
    return made


def pictures_of(server: ComfyServer, name: str) -> list[Image.Image]:
    """What the last node of a workflow that saves pictures saves; previews are beside the point, unless there is no more."""
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    shown = server.run(to_api(workflow, server.get("/object_info"))).ui
    rank = {str(node["id"]): (node["type"] == "SaveImage", node["order"]) for node in workflow["nodes"]}
    last = max((node for node, output in shown.items() if output.get("images")), key=rank.__getitem__)
    images: list[dict[str, Any]] = shown[last]["images"]
    queries = (f"filename={one['filename']}&subfolder={one['subfolder']}&type={one['type']}" for one in images)
    return [Image.open(io.BytesIO(server.bytes_of(f"/view?{query}"))) for query in queries]


def drawing() -> Image.Image:
    """What somebody drew in the mask editor: an apple's outline, transparent as the editor leaves it."""
    mask = Image.new("L", (SIDE, SIDE), 255)
    pen = ImageDraw.Draw(mask)
    pen.ellipse((100, 140, 410, 430), outline=0, width=8)
    pen.line((256, 150, 280, 70), fill=0, width=8)
    pen.ellipse((280, 60, 360, 110), outline=0, width=8)
    picture = Image.new("RGBA", mask.size, "white")
    picture.putalpha(mask)
    return picture


def thumbnail(server: ComfyServer, name: str) -> Image.Image:
    """A workflow's thumbnail, from what it makes."""
    made = sheet(pictures_of(server, name))
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    if any(node["type"] == "LoadImage" for node in workflow["nodes"]):
        lines = Image.eval(drawing().getchannel("A"), lambda value: 255 - value).resize(
            (INSET, INSET), Image.Resampling.LANCZOS
        )
        made.paste(lines.convert("RGB"), (12, SIDE - INSET - 12))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--models", type=Path, help="a folder laid out as ComfyUI's models")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "comfyui"
        lay_out(base)
        if arguments.models:
            shutil.rmtree(base / "models")
            (base / "models").symlink_to(arguments.models.resolve(), target_is_directory=True)
        server = ComfyServer(Path(os.environ["COMFYUI_PATH"]), host_python(), base)
        server.start()
        try:
            drawing().save(base / "input" / "example.png")
            workflows = comfy_facts.read(comfy_facts.WORKFLOWS)
            for name in arguments.names or [name for name in workflows if not comfy_cards.needs(workflows[name])]:
                thumbnail(server, name).save(ROOT / "workflows" / f"{name}.jpg", quality=88)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
