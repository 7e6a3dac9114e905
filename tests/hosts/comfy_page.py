"""ComfyUI's front end in a browser, as the tests drive it: opened, given workflows, and asked what its panels say."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import comfy_facts
from comfy_server import PACK, ComfyServer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wadi_core import mini

WORKFLOWS = sorted(path.stem for path in comfy_facts.WORKFLOWS.glob("*.json"))
QUICKSTART, ONE_LORAD, WITH_LORA, LIVE = (
    next(name for name in WORKFLOWS if told in name)
    for told in ("Quickstart", "any SD 1.5 checkpoint", "style LoRA", "type and see")
)
FILES = {
    "checkpoints": ("v1-5-pruned-emaonly-fp16.safetensors", "v2-1_512-ema-pruned.safetensors"),
    "loras": "your-style-lora.safetensors",
    "diffusion_models": (
        *("rotated_unet-sdv1-5.safetensors", "rotated_unet-sdv2-1.safetensors"),
        "rotated_transformer.safetensors",
    ),
    "text_encoders": "t5xxl_fp16.safetensors",
    "vae": "vae-ft-mse-840000-ema-pruned.safetensors",
    "controlnet": "control_v11p_sd15_canny_fp16.safetensors",
}
ONE_STEP = "wadi-sd15-one-step.safetensors"
SHOWN = "lighthouse.safetensors"
STYLE, PERSONAL = "style.safetensors", "personal.safetensors"
TITLE = "A lighthouse in one step"
MODERN_SINCE = (1, 33)
PATIENCE = 90_000  # ms; the machine may have other work

READY = "() => !!(window.app?.vueAppReady && window.LiteGraph?.registered_node_types?.WaDi_LoadLoRaD)"
# What the panel of the first node of a type says, "" where it has none. Nodes in subgraphs are looked for too.
PANEL = """(type) => {
  const nodes = (graph) => graph.nodes.flatMap((node) => [node, ...(node.isSubgraphNode?.() ? nodes(node.subgraph) : [])]);
  const node = nodes(app.rootGraph ?? app.graph).find((node) => node.type === type);
  return node?.widgets?.find((widget) => widget.name === "wadi_panel")?.element.innerText ?? "";
}"""
SET = """([type, values]) => {
  const node = app.graph.nodes.find((node) => node.type === type);
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((widget) => widget.name === name);
    widget.value = value;
    widget.callback?.(value);
  }
}"""


def lay_files(comfy_base: Path) -> None:
    """Files of the names that the workflows ask for. The front end looks at names, and into LoRaDs for what to show."""
    for folder, names in FILES.items():
        for name in (names,) if isinstance(names, str) else names:
            path = comfy_base / "models" / folder / name
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                path.touch()
    picture = io.BytesIO()
    Image.linear_gradient("L").save(picture, "jpeg")
    thumbnail = "data:image/jpeg;base64," + base64.b64encode(picture.getvalue()).decode()
    embedded = comfy_base / "custom_nodes" / PACK / "wadi_core" / "mini" / mini.LORAD
    with safe_open(embedded, "pt") as opened:
        metadata = opened.metadata() | {"modelspec.thumbnail": thumbnail, "modelspec.title": TITLE}
    folder = comfy_base / "models" / "lorad"
    save_file(load_file(embedded), folder / SHOWN, metadata)
    ordinary = {key: value for key, value in metadata.items() if key not in ("wadi.alpha_T_squared", "wadi.timestep")}
    save_file(load_file(embedded), folder / STYLE, ordinary)
    for name, source in ((ONE_STEP, SHOWN), (PERSONAL, STYLE)):
        if not (folder / name).exists():
            shutil.copyfile(folder / source, folder / name)
    Image.linear_gradient("L").convert("RGB").save(comfy_base / "input" / "example.png")


def open_front_end(chromium: Any, server: ComfyServer, language: str = "en", modern: bool = False) -> Any:
    """A page of the browser with the front end in it; what goes wrong in the pack's scripts is in its ``wadi_errors``."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.Locale": language,
        "Comfy.VueNodes.Enabled": modern,
        "Comfy.Workflow.Persist": False,
    }
    for name, value in settings.items():
        server.post(f"/settings/{name}", value)
    page = chromium.new_page(viewport={"width": 1600, "height": 950})
    page.set_default_timeout(PATIENCE)
    page.wadi_errors = []
    ours = (f"/extensions/{PACK}/", "blueprint")
    page.on("pageerror", lambda error: page.wadi_errors.append(f"{error}\n{error.stack}"))
    page.on("console", lambda message: page.wadi_errors.append(message.text) if any(o in message.text for o in ours) else None)
    page.goto(f"http://127.0.0.1:{server.port}", wait_until="domcontentloaded")
    page.wait_for_function(READY)
    page.wait_for_timeout(1000)
    return page


def load(page: Any, name: str) -> None:
    """Open a workflow as the server offers it."""
    url = f"/api/workflow_templates/{PACK}/{quote(name)}.json"
    page.evaluate("async (url) => app.loadGraphData(await (await fetch(url)).json())", url)
    page.wait_for_timeout(1000)


def version_of(page: Any) -> tuple[int, ...]:
    """The front end's, major and minor."""
    version = page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__ ?? '0.0'")
    return tuple(int(part) for part in version.split(".")[:2])


def change(page: Any, type_: str, **values: Any) -> None:
    """Set widgets of the first node of a type; the click elsewhere is how the front end learns of any change."""
    page.evaluate(SET, [type_, values])
    touch(page)


def touch(page: Any) -> None:
    page.mouse.click(800, 930)
    page.wait_for_timeout(500)


def wait_for_panel(page: Any, type_: str, text: str) -> None:
    page.wait_for_function(f"([type, text]) => ({PANEL})(type).includes(text)", arg=[type_, text])


def panel(page: Any, type_: str) -> str:
    return page.evaluate(PANEL, type_)
