"""The entries of the program's settings page."""

from __future__ import annotations

import gradio as gr
from modules import shared

from . import catalog

SECTION = ("wadi", "WaDi")


def register() -> None:
    """Add the entries; called when the program builds its settings."""
    shared.opts.add_option(
        "wadi_default_lorad",
        shared.OptionInfo(
            catalog.NONE,
            "LoRaD that the panel begins with",
            gr.Dropdown,
            lambda: {"choices": catalog.choices()},
            section=SECTION,
            refresh=catalog.refresh,
        ).needs_reload_ui(),
    )
    shared.opts.add_option(
        "wadi_folder",
        shared.OptionInfo("", "Another folder of LoRaD files", section=SECTION).info(
            "beside the folders Lora and LoRaD among the models"
        ),
    )


def default_lorad() -> str:
    """The LoRaD that the panel begins with; none where the file has gone."""
    chosen = getattr(shared.opts, "wadi_default_lorad", catalog.NONE)
    return chosen if chosen in catalog.choices() else catalog.NONE
