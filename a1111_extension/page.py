"""The page "LoRaD" among the extra networks: a card for each LoRaD file, wherever it lies."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from modules import ui_extra_networks

from . import catalog, host

TITLE = "LoRaD"
THUMBNAIL = "modelspec.thumbnail"  # in a file's metadata
LONGEST = 400_000  # characters: the page holds every card's picture
_PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}")


def register() -> None:
    """Add the page, where the program's extension for LoRA is on; called before each building of the interface."""
    cards = sys.modules.get("ui_extra_networks_lora")
    if cards is None or host.lora_extension() is None:
        return
    if not any(page.title == TITLE for page in ui_extra_networks.extra_pages):
        ui_extra_networks.register_page(_page(cards))


def thumbnail(metadata: Mapping[str, Any]) -> str | None:
    """The picture that a file carries in its metadata, as an address for the page; None where there is none."""
    said = metadata.get(THUMBNAIL)
    return said if isinstance(said, str) and len(said) <= LONGEST and _PICTURE.fullmatch(said) else None


def _page(cards: Any) -> Any:
    """The page, made of the program's own for LoRA, so that previews, metadata and the editor are the same."""

    class LoRaDPage(cards.ExtraNetworksPageLora):
        def __init__(self) -> None:
            super().__init__()
            self.title = TITLE
            self.name = self.extra_networks_tabname = TITLE.lower()

        def refresh(self) -> None:
            super().refresh()
            catalog.refresh()

        def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> dict[str, Any] | None:
            item = super().create_item(name, index, enable_filter)
            if item is not None:
                item["prompt"] = item["prompt"].replace("<lora:", "<lorad:", 1)
                item["preview"] = item["preview"] or thumbnail(item["metadata"])
            return item

        def list_items(self) -> Iterator[dict[str, Any]]:
            for index, name in enumerate(catalog.names()):
                item = self.create_item(name, index)
                if item is not None:
                    yield item

        def allowed_directories_for_previews(self) -> list[str]:
            return [*super().allowed_directories_for_previews(), *map(str, catalog.folders())]

    return LoRaDPage()
