"""What ComfyUI gets when it loads the pack: the nodes, and the names that they add to ComfyUI's own lists."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import control, embedded, files, routes, sampling, weight_adapter
from .control import ControlPreprocessor, EmbeddedControlNet
from .grid import StrengthSeedGrid
from .highres import HighResolution
from .loaders import ApplyLoRaD, EmbeddedModel, LoadLoRaD, OpenLoRaD
from .prompts import PromptBatch
from .sampling import OneStepCustomSampling, OneStepModel, OneStepSampler
from .stack import LoRaDStack
from .tools import AnalyzeDirections, ConvertToLoRA, ExtractLoRaD, Inspect, SaveLoRaD

NODES: list[type[io.ComfyNode]] = [
    *(LoadLoRaD, LoRaDStack, OpenLoRaD, ApplyLoRaD, EmbeddedModel, EmbeddedControlNet),
    *(OneStepSampler, OneStepModel, OneStepCustomSampling, HighResolution, PromptBatch),
    *(ExtractLoRaD, SaveLoRaD, ConvertToLoRA, Inspect, AnalyzeDirections, ControlPreprocessor, StrengthSeedGrid),
]


def register() -> None:
    """Make folders, weight adapter, sampler and small network known to ComfyUI; a second time it does nothing."""
    for part in (files, control, weight_adapter, sampling, embedded, routes):
        part.register()


class WadiExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Not in on_load(), which only newer versions of ComfyUI call.
        register()
        return NODES
