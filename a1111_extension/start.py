"""What happens at every start of the program, and at every "Reload UI": all is put into the program's own lists, once.

The program runs the extension's script again while imported modules stay as they are, and has then forgotten its
callbacks but not its samplers and networks. So each registration replaces what it finds.

A part for which a program has no place is left out with a sentence, and the others work.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from wadi_core.files import one_line

from . import host, programs

ALIAS = "lorad"
# What is raised where a program lacks something, or has changed it.
LACKING = (ImportError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, OSError)


def register() -> Any:
    """Register everything; called by the extension's script.

    Returns:
        The panel's class, for the program to find; None where there is no place for it.
    """
    if not host.supported():
        host.logger.warning("WaDi: %s", programs.refusal(host.folder()))
        return None
    attempt("the sampler", lambda: _of(host.sampler_module())())
    if host.lora_extension() is None:
        host.logger.warning("WaDi: the built-in extension for LoRA is off, so LoRaD files cannot be used; the sampler can")
    else:
        attempt("LoRaD files", lambda: _of(host.adapter_module())())
    if host.knows_networks_by_widths():
        attempt("wadi-mini", lambda: _of("mini")())
    attempt("what belongs to the page", _callbacks)
    return attempt("the panel", lambda: _of("panel", "Panel"))


def attempt(part: str, work: Callable[[], Any]) -> Any:
    """What ``work`` returns; None, and a sentence, where the program has no place for that part."""
    try:
        return work()
    except LACKING as error:
        said = one_line(f"{type(error).__name__}: {error}")
        host.logger.warning("WaDi: %s cannot be used in this program (%s); the rest can", part, said)
        return None


def _of(module: str, name: str = "register") -> Any:
    """Something of one of the extension's modules, imported only now: the import may be what fails."""
    return getattr(import_module(f"{__package__}.{module}"), name)


def _callbacks() -> None:
    from modules import script_callbacks

    script_callbacks.on_before_ui(_before_ui, name="wadi")
    script_callbacks.on_ui_settings(_settings, name="wadi")
    script_callbacks.on_app_started(_started, name="wadi")


def _before_ui() -> None:
    attempt("the folder models/LoRaD", lambda: _of("catalog", "refresh")())
    attempt("the axes of the X/Y/Z plot", lambda: _of("grid")())
    attempt("the page of cards", lambda: _of("page")())


def _settings() -> None:
    attempt("the page of settings", lambda: _of("options")())


def _started(demo: Any, app: Any) -> None:
    attempt(f"the tag <{ALIAS}:...>", _alias)


def _alias() -> None:
    """The alias waits for the program's extension for LoRA, which makes its own object anew before each interface."""
    from modules import extra_networks

    extension = host.lora_extension()
    if extension is not None and extension.extra_network_lora is not None:
        extra_networks.register_extra_network_alias(extension.extra_network_lora, ALIAS)
