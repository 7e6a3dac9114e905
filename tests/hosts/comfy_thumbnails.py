"""Thumbnails of the workflows, made by running them in ComfyUI:

    COMFYUI_PATH=... [COMFYUI_PYTHON=...] python tests/hosts/comfy_thumbnails.py [--models DIR] 01-embedded-quickstart ...

The first workflow needs nothing but the pack's own weights; the others find their files in a folder that is laid out as
ComfyUI's ``models``. Up to four pictures of the last node that saves any, or else shows any, become
``workflows/<name>.jpg``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from comfy_graph import to_api
from comfy_server import ROOT, ComfyServer, host_python, lay_out
from PIL import Image

SIDE = 512  # pixels of a thumbnail


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+")
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
            for name in arguments.names:
                sheet(pictures_of(server, name)).save(ROOT / "workflows" / f"{name}.jpg", quality=88)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
