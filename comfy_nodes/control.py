"""Nodes for ControlNets: control maps from pictures, and the embedded model's own ControlNet."""

from __future__ import annotations

import importlib.util
import os

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..wadi_core import packages, preprocess
from . import embedded, files
from .schema import MAXIMUM_SEED, schema

MODELS = "preprocessors"  # a kind of ComfyUI's model folders
ENDINGS = {".pth", ".pt"}
PACKAGE, ITS_NAME = "controlnet_aux", "controlnet-aux"
KINDS_TOOLTIP = (
    "What the ControlNet was trained on. canny: edges. invert: light and dark exchanged, for drawings. shuffle: colours "
    "without shapes. lineart: lines. scribble: bold strokes. softedge: soft edges. tile, blur: the picture without details. "
    "Those in -standard, canny, invert, shuffle, tile and blur need no network. openpose: people. depth, normal: surfaces. "
    "mlsd: straight lines."
)


def register() -> None:
    """Tell ComfyUI of ``models/preprocessors``, beside those that its own settings name; a second time it does nothing."""
    folder_paths.add_model_folder_path(MODELS, os.path.join(folder_paths.models_dir, MODELS))
    paths, endings = folder_paths.folder_names_and_paths[MODELS]
    folder_paths.folder_names_and_paths[MODELS] = (paths, endings | ENDINGS)


def folder_for(kind: str) -> str | None:
    """The folder with all weights that a kind of control map needs; None if it needs none.

    Raises:
        OSError: weights or the package are missing; one line that says what to get, and from where.
    """
    files = preprocess.KINDS[kind].files
    if not files:
        return None
    own = os.environ.get(preprocess.MODELS)
    folders = [own] if own else folder_paths.get_folder_paths(MODELS)
    found = next((one for one in folders if all(os.path.isfile(os.path.join(one, name)) for name in files)), None)
    wanted = []
    if importlib.util.find_spec(PACKAGE) is None:
        where = "with the Python that ComfyUI runs in (python_embeded\\python.exe in the portable version), then start it anew"
        wanted.append(f"the package {ITS_NAME}: {packages.install(ITS_NAME)}, {where}")
    if found is None:
        place = preprocess.MODELS if own else f"models/{MODELS}"
        wanted.append(f"{' and '.join(files)} from {preprocess.ANNOTATORS} in {place}")
    if wanted:
        raise OSError(f"{kind} needs {'; and '.join(wanted)}. These need nothing more: {', '.join(preprocess.PLAIN)}")
    return found


class ControlPreprocessor(io.ComfyNode):
    """A control map from a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def threshold(name: str, default: int, what: str) -> io.Int.Input:
            return io.Int.Input(
                name, default=default, min=0, max=1000, tooltip=f"For canny: a stronger gradient {what} an edge."
            )

        return schema(
            node_id="WaDi_ControlPreprocessor",
            display_name="Control Preprocessor",
            category="WaDi/tools",
            description="Makes the kind of control map that a ControlNet was trained on, such as edges, poses or depth. "
            "Canny, soft edges, scribbles, lines, shuffle, tile, blur and invert need nothing more. Network-based kinds load "
            "their weights from models/preprocessors; nothing is downloaded.",
            search_aliases=["controlnet", "preprocessor", "canny", "openpose", "depth", "scribble", "annotator", "wadi"],
            inputs=[
                io.Image.Input("image", tooltip="Any picture; each picture of a batch gets its own map."),
                io.Combo.Input("kind", options=list(preprocess.KINDS), default="canny", tooltip=KINDS_TOOLTIP),
                threshold("low", 100, "that touches one above 'high' continues"),
                threshold("high", 200, "starts"),
                io.Int.Input("shuffle_seed", default=0, min=0, max=MAXIMUM_SEED, tooltip="Random seed of shuffle."),
            ],
            outputs=[io.Image.Output(display_name="map", tooltip="For Apply ControlNet, of the picture's size.")],
        )

    @classmethod
    def execute(cls, image: Tensor, kind: str, low: int, high: int, shuffle_seed: int) -> io.NodeOutput:
        models = folder_for(kind)
        device = comfy.model_management.get_torch_device()
        bar = comfy.utils.ProgressBar(len(image))
        maps = []
        for one in image:
            comfy.model_management.throw_exception_if_processing_interrupted()
            pixels = one.mul(255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
            with files.names_for_places():
                found = preprocess.run(Image.fromarray(pixels), kind, models, low, high, shuffle_seed, device)
            maps.append(torch.from_numpy(np.asarray(found, dtype=np.float32) / 255))
            bar.update(1)
        return io.NodeOutput(torch.stack(maps))


class EmbeddedControlNet(io.ComfyNode):
    """The ControlNet of wadi-mini, which comes with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_EmbeddedControlNet",
            display_name="Embedded ControlNet (wadi-mini)",
            category="WaDi/loaders",
            description="The ControlNet for edges of the embedded model. It was trained for the multi-step network and "
            "steers the one-step network unchanged. Included in the pack, no download.",
            search_aliases=["controlnet", "canny", "edges", "wadi", "wadi-mini"],
            inputs=[],
            outputs=[io.ControlNet.Output(display_name="control_net", tooltip="For Apply ControlNet, with a map of edges.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        with files.names_for_places():
            return io.NodeOutput(embedded.load_controlnet())
