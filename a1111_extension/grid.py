"""The X/Y/Z plot's axes: which LoRaD, and its strength. An axis stands above what the panel says.

The strength is that of the panel's LoRaD, and where the panel has none on, the one of the tags is multiplied by it.
"""

from __future__ import annotations

from typing import Any

from modules import scripts

from . import catalog, negative, tags

FILE, STRENGTH = "wadi_lorad", "wadi_strength"  # attributes of the program's object for a generation
LABELS = {FILE: "[WaDi] LoRaD", STRENGTH: "[WaDi] Strength"}
PLOT, PANEL = "xyz_grid.py", "WaDi"
TYPES = (0, 3, 6)  # which of the plot's arguments name its three axes
MAY_NAME_ONE = {LABELS[FILE], "Prompt S/R", "Prompt order", "Styles"}  # axes that bring a LoRaD with them


def register() -> None:
    """Append the axes to the list of the program's X/Y/Z plot; once, however often it is called."""
    for data in scripts.scripts_data:
        if data.module.__name__ == PLOT:
            grid = data.module
            away = negative.axes(grid)
            labels = {*LABELS.values(), *(axis.label for axis in away)}
            grid.axis_options[:] = [axis for axis in grid.axis_options if axis.label not in labels]
            grid.axis_options += [
                *away,
                grid.AxisOption(LABELS[FILE], str, _setter(FILE), confirm=_confirm_files, choices=catalog.choices),
                grid.AxisOption(LABELS[STRENGTH], float, _setter(STRENGTH), confirm=_confirm_strengths),
            ]
            return


def strengthen(p: Any) -> bool:
    """Multiply the strengths of the tags of a whole generation by the axis' value; whether there was a LoRaD among them."""
    factor = getattr(p, STRENGTH)
    acts = any(tags.lorads(prompt) for prompt in p.all_prompts)
    for name in ("all_prompts", "all_hr_prompts"):
        written = getattr(p, name, None)
        if written:
            setattr(p, name, [tags.scaled(prompt, factor) for prompt in written])
    return acts


def _setter(attribute: str) -> Any:
    return lambda p, value, values: setattr(p, attribute, value)


def _confirm_files(p: Any, values: list[str]) -> None:
    """Raises RuntimeError, as the program's own axes do, before the first picture is drawn."""
    for name in values:
        if name != catalog.NONE and catalog.file_of(name) is None:
            raise RuntimeError(f"Unknown LoRaD: {name}{tags.nearest(name)}")


def _confirm_strengths(p: Any, values: list[float]) -> None:
    """Raises RuntimeError where every picture of the plot would be the same."""
    on, name, *_ = [*_arguments(p, PANEL), None, None]
    chosen = on and name not in (None, "", catalog.NONE)
    if chosen or p.styles or tags.lorads(str(p.prompt)) or MAY_NAME_ONE & set(_axes(p)):
        return
    raise RuntimeError(f"{LABELS[STRENGTH]} has no LoRaD to act on: switch one on in the panel, or write <lorad:NAME:1>")


def _axes(p: Any) -> list[str]:
    """The labels of the plot's axes for this generation."""
    chosen = _arguments(p, PLOT)
    script = next((one for one in _scripts(p) if _name(one) == PLOT), None)
    labels = [axis.label for axis in getattr(script, "current_axis_options", [])]
    return [labels[place] for place in (chosen[one] or 0 for one in TYPES if one < len(chosen)) if place in range(len(labels))]


def _arguments(p: Any, name: str) -> list[Any]:
    """What a script was given for this generation."""
    script = next((one for one in _scripts(p) if name in (_name(one), one.title())), None)
    return [] if script is None else list(p.script_args[script.args_from : script.args_to])


def _scripts(p: Any) -> list[Any]:
    return [] if p.scripts is None else list(p.scripts.scripts)


def _name(script: Any) -> str:
    return str(getattr(script, "filename", "")).replace("\\", "/").rpartition("/")[2]
