"""The X/Y/Z plot's axes: which LoRaD, and its strength. An axis stands above what the panel says."""

from __future__ import annotations

from typing import Any

from modules import scripts

from . import catalog, negative

FILE, STRENGTH = "wadi_lorad", "wadi_strength"  # attributes of the program's object for a generation
LABELS = {FILE: "[WaDi] LoRaD", STRENGTH: "[WaDi] Strength"}


def register() -> None:
    """Append the axes to the list of the program's X/Y/Z plot; once, however often it is called."""
    for data in scripts.scripts_data:
        if data.module.__name__ == "xyz_grid.py":
            grid = data.module
            away = negative.axes(grid)
            labels = {*LABELS.values(), *(axis.label for axis in away)}
            grid.axis_options[:] = [axis for axis in grid.axis_options if axis.label not in labels]
            grid.axis_options += [
                *away,
                grid.AxisOption(LABELS[FILE], str, _setter(FILE), confirm=_confirm, choices=catalog.choices),
                grid.AxisOption(LABELS[STRENGTH], float, _setter(STRENGTH)),
            ]
            return


def _setter(attribute: str) -> Any:
    return lambda p, value, values: setattr(p, attribute, value)


def _confirm(p: Any, values: list[str]) -> None:
    """Raises RuntimeError, as the program's own axes do, before the first picture is drawn."""
    for name in values:
        if name != catalog.NONE and catalog.file_of(name) is None:
            raise RuntimeError(f"Unknown LoRaD: {name}")
