"""Nodes that work on adapters and weights: the core's toolbox on loaded models."""

from __future__ import annotations

import base64
import dataclasses
import io as bytes_io
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..wadi_core.lorad import LoRaD
from ..wadi_core.lorad.analysis import analyze
from ..wadi_core.lorad.chart import picture
from ..wadi_core.lorad.convert import to_lora
from ..wadi_core.lorad.extract import extract
from ..wadi_core.lorad.reports import (
    adapter_facts,
    adapter_lines,
    analysis_table,
    base_facts,
    base_lines,
    extraction_lines,
    lines_as_text,
    lora_lines,
    table_as_text,
)
from ..wadi_core.schedule import OneStep
from . import files
from .model import ModelWeights, adapters_on, prediction_type, progress
from .sampling import OneStepSampling
from .schema import LORAD, schema, strength_input

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

THUMBNAIL = 256  # pixels of the longer side
RANK_FROM = ("automatic", "rank", "energy")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def rank_input(default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("rank", default=default, min=1, max=1024, tooltip=tooltip)


def report_output() -> io.String.Output:
    return io.String.Output(display_name="report", tooltip="The result as text.")


class ExtractLoRaD(io.ComfyNode):
    """The LoRaD between two networks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_ExtractLoRaD",
            display_name="Extract LoRaD",
            category="WaDi/tools",
            description="Finds the LoRaD between a base and a one-step student, such as a released complete network. "
            "Reports how much of their difference is a rotation. Takes minutes at the size of Stable "
            "Diffusion.",
            search_aliases=["wadi", "lorad", "extract lora", "difference", "svd"],
            inputs=[
                io.Model.Input("base", tooltip="The network before distillation. Patches such as LoRA are included."),
                io.Model.Input("student", tooltip="The one-step network."),
                io.Combo.Input(
                    "rank_from",
                    options=list(RANK_FROM),
                    default=RANK_FROM[0],
                    tooltip="automatic: the smallest rank that loses nothing, at most 256. rank, energy: as set below.",
                ),
                rank_input(256, "Rank of every layer; used with 'rank'."),
                io.Float.Input(
                    "energy",
                    default=0.99,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of each layer's squared angles to keep; used with 'energy'.",
                ),
            ],
            outputs=[
                LORAD.Output(display_name="lorad", tooltip="For Save LoRaD or Apply LoRaD."),
                report_output(),
            ],
        )

    @classmethod
    def execute(cls, base: ModelPatcher, student: ModelPatcher, rank_from: str, rank: int, energy: float) -> io.NodeOutput:
        turned = ModelWeights(student)
        turned.metadata |= _schedule_strings(student)
        lorad, found = extract(
            ModelWeights(base),
            turned,
            rank=rank if rank_from == "rank" else None,
            energy=energy if rank_from == "energy" else None,
            progress=progress(),
        )
        report = lines_as_text(extraction_lines(found))
        return io.NodeOutput(lorad, report, ui={"text": [report]})


class SaveLoRaD(io.ComfyNode):
    """A LoRaD written to models/lorad."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_SaveLoRaD",
            display_name="Save LoRaD",
            category="WaDi/tools",
            description="Writes a LoRaD into models/lorad, where Load LoRaD finds it. Nothing is overwritten. An "
            "existing name gets a number.",
            search_aliases=["wadi", "lorad", "save lora", "write adapter"],
            inputs=[
                LORAD.Input("lorad", tooltip="The adapter."),
                io.String.Input(
                    "filename", default="my-lorad", tooltip="A file name in models/lorad; may contain a subfolder."
                ),
                io.Combo.Input("dtype", options=list(DTYPES), default="float16", tooltip="Number format of the file."),
                io.Image.Input("thumbnail", optional=True, tooltip="A picture that Load LoRaD shows."),
            ],
            outputs=[io.String.Output(display_name="lorad_name", tooltip="The name under which Load LoRaD lists it.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lorad: LoRaD, filename: str, dtype: str, thumbnail: Tensor | None = None) -> io.NodeOutput:
        if thumbnail is not None:
            lorad = LoRaD(lorad.factors, dataclasses.replace(lorad.metadata, thumbnail=_data_uri(thumbnail)))
        with files.names_for_places():
            path = files.new_path(files.FOLDER, filename)
            lorad.save(path, DTYPES[dtype])
        name = files.name_of(files.FOLDER, path)
        return io.NodeOutput(name, ui={"text": [f"{name}, {path.stat().st_size / 1e6:.2f} MB"]})


class ConvertToLoRA(io.ComfyNode):
    """A plain LoRA that comes as close to a LoRaD as its rank allows, written to models/loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_ConvertToLoRA",
            display_name="Convert to LoRA",
            category="WaDi/tools",
            description="Writes a plain LoRA into models/loras, for programs without LoRaD support, and reports its "
            "error. A low-rank sum cannot represent a rotation exactly, and the error grows with the "
            "angles. It fits this base only.",
            search_aliases=["wadi", "lorad", "convert", "export lora", "svd"],
            inputs=[
                io.Model.Input("model", tooltip="The base alone, without the LoRaD."),
                LORAD.Input("lorad", tooltip="The adapter."),
                strength_input(),
                rank_input(128, "Rank of the LoRA. A higher rank is more accurate and gives a larger file."),
                io.String.Input("filename", default="my-lora", tooltip="A file name in models/loras; may contain a subfolder."),
            ],
            outputs=[report_output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelPatcher, lorad: LoRaD, strength: float, rank: int, filename: str) -> io.NodeOutput:
        if adapters_on(model):
            raise ValueError("there is a LoRaD on this model already: connect the base as it came from its loader")
        with files.names_for_places():
            path = files.new_path(files.LORA_FOLDER, filename)
            lora = to_lora(ModelWeights(model), [(lorad, strength)], rank, progress=progress())
            lora.save(path)
        report = "\n".join([*lora_lines(lora), files.name_of(files.LORA_FOLDER, path)])
        return io.NodeOutput(report, ui={"text": [report]})


class Inspect(io.ComfyNode):
    """What is in a LoRaD, and whether it fits a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_Inspect",
            display_name="Inspect LoRaD",
            category="WaDi/tools",
            description="Shows what is in a LoRaD: layers, ranks, size of its angles and metadata. Also reports how it "
            "fits a model.",
            search_aliases=["wadi", "lorad", "info", "metadata", "lora info"],
            inputs=[
                LORAD.Input("lorad", tooltip="The adapter, from Open LoRaD for example."),
                io.Model.Input("model", optional=True, tooltip="Also report how it fits this model."),
            ],
            outputs=[report_output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lorad: LoRaD, model: ModelPatcher | None = None) -> io.NodeOutput:
        lines = adapter_lines(adapter_facts(lorad))
        if model is not None:
            lines += base_lines(base_facts(lorad, ModelWeights(model, patched=False), "the model"))
        report = lines_as_text(lines)
        return io.NodeOutput(report, ui={"text": [report]})


class AnalyzeDirections(io.ComfyNode):
    """What training changed in a network: the norms of its weights, or their directions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_AnalyzeDirections",
            display_name="Analyze Directions",
            category="WaDi/tools",
            description="Compares two networks layer by layer: how far the norms and the directions of their weights "
            "changed. LoRaD is based on this analysis. It works on any base and a network trained from it.",
            search_aliases=["wadi", "lorad", "compare models", "weight analysis", "norm", "direction", "plot"],
            inputs=[
                io.Model.Input("base", tooltip="The teacher. Patches such as LoRA are included."),
                io.Model.Input("student", tooltip="The network trained from it, or the base with an adapter."),
            ],
            outputs=[io.Image.Output(display_name="plot", tooltip="A dot for each layer."), report_output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, base: ModelPatcher, student: ModelPatcher) -> io.NodeOutput:
        analysis = analyze(ModelWeights(base), ModelWeights(student), progress())
        with Image.open(bytes_io.BytesIO(picture(analysis, "What training changed"))) as drawn:
            pixels = np.asarray(drawn.convert("RGB"), dtype=np.float32) / 255
        report = table_as_text(analysis_table(analysis))
        return io.NodeOutput(torch.from_numpy(pixels)[None], report, ui={"text": [report]})


def _schedule_strings(model: ModelPatcher) -> dict[str, Any]:
    """The schedule at which a MODEL is sampled, in the words of an adapter file: the released one if it has none."""
    sampling = model.get_model_object("model_sampling")
    one_step = sampling.one_step if isinstance(sampling, OneStepSampling) else OneStep(prediction_type=prediction_type(model))
    return {
        "wadi.alpha_T_squared": repr(one_step.alpha_T_squared),
        "wadi.timestep": str(one_step.timestep),
        "wadi.prediction_type": one_step.prediction_type,
    }


def _data_uri(image: Tensor) -> str:
    """The first of (n, h, w, 3) pictures as a small JPEG inside a text."""
    pixels = image[0].mul(255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    content = bytes_io.BytesIO()
    picture.save(content, "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")
