"""Nodes that load: LoRaD files, and the embedded model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..wadi_core.files import one_line
from ..wadi_core.lorad import LoRaD
from ..wadi_core.schedule import OneStep
from . import embedded, files
from .model import Applied, adapters_on, apply
from .notices import message
from .sampling import is_one_step, with_one_step
from .schema import LORAD, schema, strength_input
from .sizes import square_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

ALIASES = ["wadi", "lorad", "lora", "rotation", "adapter", "one step", "single step"]


def name_input() -> io.Combo.Input:
    """The choice of an adapter file."""
    return io.Combo.Input(
        "lorad_name",
        options=files.names(),
        tooltip="A file in models/lorad, or a LoRaD among models/loras.",
    )


def one_step_input() -> io.Boolean.Input:
    """Whether sampling follows the file."""
    return io.Boolean.Input(
        "one_step",
        default=True,
        label_on="as the file says",
        label_off="leave as it is",
        tooltip="Sets the one-step sampling that the adapter was trained with. An adapter without it leaves the "
        "sampling unchanged.",
    )


def outputs() -> list[io.Output]:
    """What the nodes that put an adapter on a model return."""
    return [
        io.Model.Output(display_name="model", tooltip="The model with rotated weights."),
        io.String.Output(display_name="report", tooltip="Number of matched layers, rank, architecture, and notes."),
    ]


@dataclass(frozen=True)
class Report:
    """What a node says of an adapter that it put on a model: to a person, and to the script in the front end."""

    applied: Applied
    one_step: OneStep | None

    def __str__(self) -> str:
        parts = [str(self.applied)]
        if self.one_step:
            parts.append(f"one step at t = {self.one_step.timestep}, alpha_T^2 = {self.one_step.alpha_T_squared:g}")
        return one_line("; ".join([", ".join(parts), *self.applied.notes]))

    def facts(self) -> dict[str, Any]:
        """For the script in the front end."""
        match = self.applied.match
        return {
            "layers": len(match.paths),
            "of": max(self.applied.layers, match.layers),
            "rank": match.rank,
            "architecture": match.architecture,
            "strength": self.applied.strength,
            "one_step": self.one_step is not None,
            "notes": list(self.applied.notes),
        }


def told(*reports: Report) -> dict[str, list[Any]] | None:
    """What a node sends to the front end of the adapters that it put on."""
    notices = [notice for report in reports for notice in report.applied.notices]
    return message([str(report) for report in reports], notices, [report.facts() for report in reports])


def put_on(model: ModelPatcher, lorad: LoRaD, strength: float, one_step: bool) -> tuple[ModelPatcher, Report]:
    """A MODEL with an adapter, and with its one-step sampling where it is wanted and the adapter has one.

    Raises:
        ValueError: the adapter does not fit; one line.
    """
    schedule = lorad.one_step if one_step and strength else None
    if schedule is not None and is_one_step(model) and not any(other.one_step for other in adapters_on(model)):
        raise ValueError("a one-step LoRaD needs the multi-step base: take One-Step Model away, or this LoRaD")
    turned, applied = apply(model, lorad, strength)
    if schedule is not None:
        turned = with_one_step(turned, schedule, square_of(lorad))
    return turned, Report(applied, schedule)


def put_on_file(model: ModelPatcher, name: str, strength: float, one_step: bool) -> tuple[ModelPatcher, Report]:
    """:func:`put_on` with the adapter of a file.

    Raises:
        OSError, ValueError: there is no such file, it is no LoRaD, or it does not fit; one line with its name.
    """
    lorad = files.load(name)
    try:
        return put_on(model, lorad, strength, one_step)
    except ValueError as error:
        raise ValueError(one_line(f"{name}: {error}")) from error


class LoadLoRaD(io.ComfyNode):
    """A LoRaD file put on a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_LoadLoRaD",
            display_name="Load LoRaD",
            category="WaDi/loaders",
            description="Rotates the weight directions of a model by a LoRaD file and sets the exact one-step sampling. "
            "The angles of several LoRaDs add. Put it before any LoRA.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The base of the LoRaD: Stable Diffusion 1.5, 2.1-base, PixArt-alpha."),
                name_input(),
                strength_input(),
                one_step_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def validate_inputs(cls, lorad_name: str | None = None) -> bool | str:
        return is_there(lorad_name)

    @classmethod
    def fingerprint_inputs(cls, lorad_name: str, **kwargs: Any) -> Any:
        return files.stamp(lorad_name)

    @classmethod
    def execute(cls, model: ModelPatcher, lorad_name: str, strength: float, one_step: bool) -> io.NodeOutput:
        turned, report = put_on_file(model, lorad_name, strength, one_step)
        return io.NodeOutput(turned, str(report), ui=told(report))


class OpenLoRaD(io.ComfyNode):
    """A LoRaD file as it is, for the tools."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_OpenLoRaD",
            display_name="Open LoRaD",
            category="WaDi/loaders",
            description="Reads a LoRaD file for Inspect LoRaD, Convert to LoRA, Save LoRaD or Apply LoRaD.",
            search_aliases=ALIASES,
            inputs=[name_input()],
            outputs=[LORAD.Output(display_name="lorad", tooltip="The adapter, not applied to a model.")],
        )

    @classmethod
    def validate_inputs(cls, lorad_name: str | None = None) -> bool | str:
        return is_there(lorad_name)

    @classmethod
    def fingerprint_inputs(cls, lorad_name: str, **kwargs: Any) -> Any:
        return files.stamp(lorad_name)

    @classmethod
    def execute(cls, lorad_name: str) -> io.NodeOutput:
        return io.NodeOutput(files.load(lorad_name))


class ApplyLoRaD(io.ComfyNode):
    """A LoRaD that another node made, put on a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_ApplyLoRaD",
            display_name="Apply LoRaD",
            category="WaDi/loaders",
            description="Applies a LoRaD from Extract LoRaD, wadi-mini or Open LoRaD to a model, as Load LoRaD does.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The base that the LoRaD is made for."),
                LORAD.Input("lorad", tooltip="The adapter."),
                strength_input(),
                one_step_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, model: ModelPatcher, lorad: LoRaD, strength: float, one_step: bool) -> io.NodeOutput:
        turned, report = put_on(model, lorad, strength, one_step)
        return io.NodeOutput(turned, str(report), ui=told(report))


class EmbeddedModel(io.ComfyNode):
    """wadi-mini, which comes with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_EmbeddedModel",
            display_name="wadi-mini",
            category="WaDi/loaders",
            description="A small trained model of 128x128 pixels, included in the pack, no download. It generates "
            "simple scenes of everyday objects. With Apply LoRaD it needs one step.",
            search_aliases=["wadi", "embedded model", "checkpoint", "demo", "tiny model", "one step"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The multi-step network. Apply LoRaD makes it a one-step network."
                ),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder."),
                LORAD.Output(display_name="lorad", tooltip="The adapter that makes it a one-step network."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        with files.names_for_places():
            return io.NodeOutput(embedded.load_model(), embedded.load_clip(), embedded.load_vae(), embedded.load_lorad())


def is_there(name: str | None) -> bool | str:
    """True, or what is wrong with a file's name; names that arrive over a link are looked at when the node runs."""
    try:
        if name is not None:
            files.path_of(name)
    except OSError as error:
        return str(error)
    return True
