"""What happens at every start of the program, and at every "Reload UI": all is put into the program's own lists, once.

The program runs the extension's script again while imported modules stay as they are, and has then forgotten its
callbacks but not its samplers and networks. So each registration replaces what it finds.
"""

from __future__ import annotations

from typing import Any

from modules import extra_networks, script_callbacks

from . import catalog, grid, host, network, options, page, sampler

ALIAS = "lorad"


def register() -> None:
    """Register everything; called by the extension's script."""
    if host.FORGE:
        from . import forge

        forge.register()
    else:
        sampler.register()
        network.register()
    if host.lora_extension() is None:
        host.logger.warning("WaDi: the built-in extension for LoRA is off, so LoRaD files cannot be used; the sampler can")
    script_callbacks.on_before_ui(_before_ui, name="wadi")
    script_callbacks.on_ui_settings(options.register, name="wadi")
    script_callbacks.on_app_started(_started, name="wadi")


def _before_ui() -> None:
    catalog.refresh()
    grid.register()
    page.register()


def _started(demo: Any, app: Any) -> None:
    """The alias waits for the program's extension for LoRA, which makes its own object anew before each interface."""
    extension = host.lora_extension()
    if extension is not None and extension.extra_network_lora is not None:
        extra_networks.register_extra_network_alias(extension.extra_network_lora, ALIAS)
