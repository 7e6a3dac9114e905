"""LoRaD Stack: several LoRaD files on a model from one node, each with a strength and a switch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from . import files
from .loaders import is_there, one_step_input, outputs, put_on_file, told
from .schema import schema, strength_input

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

ROWS = 4
NONE = "none"


class LoRaDStack(io.ComfyNode):
    """Rows of LoRaD files on a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        rows: list[io.Input] = []
        for row in range(1, ROWS + 1):
            on = io.Boolean.Input(f"on_{row}", default=True, tooltip="Whether this row is applied.")
            name = io.Combo.Input(
                f"lorad_{row}", options=[NONE, *files.names()], default=NONE, tooltip="A LoRaD file, or none."
            )
            rows += [on, name, strength_input(f"strength_{row}")]
        return schema(
            node_id="WaDi_LoRaDStack",
            display_name="LoRaD Stack",
            category="WaDi/loaders",
            description="Applies up to four LoRaD files to a model, each with a strength and a switch. Their angles add, in "
            "any order. Connect another LoRaD Stack for more.",
            search_aliases=["lora stack", "multi lora", "several lorads", "power lora", "wadi"],
            inputs=[
                io.Model.Input("model", tooltip="The base of the LoRaDs: Stable Diffusion 1.5, 2.1-base, PixArt-alpha."),
                one_step_input(),
                *rows,
            ],
            outputs=outputs(),
        )

    @classmethod
    def validate_inputs(
        cls,
        lorad_1: str | None = None,
        lorad_2: str | None = None,
        lorad_3: str | None = None,
        lorad_4: str | None = None,
    ) -> bool | str:
        # Named one by one: ComfyUI checks what is not named here itself, such as the range of a strength.
        names = (name for name in (lorad_1, lorad_2, lorad_3, lorad_4) if name != NONE)
        return next((answer for name in names if (answer := is_there(name)) is not True), True)

    @classmethod
    def fingerprint_inputs(cls, **settings: Any) -> Any:
        return [files.stamp(settings[f"lorad_{row}"]) for row in range(1, ROWS + 1) if used(settings, row)]

    @classmethod
    def execute(cls, model: ModelPatcher, one_step: bool, **settings: Any) -> io.NodeOutput:
        reports = []
        for row in range(1, ROWS + 1):
            if used(settings, row):
                name = settings[f"lorad_{row}"]
                model, report = put_on_file(model, name, settings[f"strength_{row}"], one_step)
                reports.append((name, report))
        lines = [f"{name}: {report}" for name, report in reports]
        return io.NodeOutput(model, "\n".join(lines), ui=told(*(report for _, report in reports)))


def used(settings: dict[str, Any], row: int) -> bool:
    """Whether a row holds a file that is to be applied."""
    return settings.get(f"lorad_{row}", NONE) != NONE and settings.get(f"on_{row}", True) is not False
