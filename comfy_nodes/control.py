"""Nodes for ControlNets: control maps from pictures, and the embedded model's own ControlNet."""

from __future__ import annotations

import os

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..wadi_core import preprocess
from . import embedded
from .schema import MAXIMUM_SEED, schema

MODELS = "preprocessors"  # folder among ComfyUI's models
KINDS_TOOLTIP = (
    "What the ControlNet was trained on. canny: edges. invert: light and dark exchanged, for drawings. shuffle: colours "
    "without shapes. lineart: lines. scribble: bold strokes. softedge: soft edges. openpose: people. depth, normal: surfaces. "
    "mlsd: straight lines."
)


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
            "Network-based kinds load their weights from models/preprocessors; nothing is downloaded.",
            search_aliases=["wadi", "controlnet", "preprocessor", "canny", "openpose", "depth", "scribble", "annotator"],
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
        models = os.environ.get(preprocess.MODELS) or os.path.join(folder_paths.models_dir, MODELS)
        device = comfy.model_management.get_torch_device()
        bar = comfy.utils.ProgressBar(len(image))
        maps = []
        for one in image:
            comfy.model_management.throw_exception_if_processing_interrupted()
            pixels = one.mul(255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
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
            search_aliases=["wadi", "wadi-mini", "controlnet", "canny", "edges"],
            inputs=[],
            outputs=[io.ControlNet.Output(display_name="control_net", tooltip="For Apply ControlNet, with a map of edges.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(embedded.load_controlnet())
