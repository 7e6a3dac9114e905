"""The tags ``<lora:name:strength>`` and ``<lorad:...>`` of a prompt, looked at before the program acts on them.

Nothing here applies an adapter: that is the program's own work, with the module type of :mod:`.network` or the weight
calculator of :mod:`.forge`. Here tags are put right, and what cannot work is left out and told in a sentence, instead
of half applied or lost in a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wadi_core.lorad import LoRaD, check_together

from . import catalog, host

TAG = re.compile(r"<(lora|lorad):([^>]+)>")
UNWRITABLE = re.compile(r"[:<>]")  # in a name: a tag would end there


@dataclass(frozen=True)
class Tag:
    """A tag of a prompt: the adapter's name and its strength on the denoising network."""

    kind: str
    text: str
    name: str
    strength: float


@dataclass(frozen=True)
class Found:
    """A LoRaD that a tag names."""

    tag: Tag
    file: Path
    lorad: LoRaD


def tag(name: str, strength: float) -> str:
    """The tag of an adapter.

    Raises:
        ValueError: a name that no tag can hold; one line.
    """
    if UNWRITABLE.search(name):
        raise ValueError(f"{name}: the name of an adapter's file cannot hold : < or >")
    return f"<lora:{name}:{strength:g}>"


def read(prompt: str) -> Iterator[Tag]:
    """The tags of a prompt in its order; those whose strength is no number are the program's to complain about."""
    for found in TAG.finditer(prompt):
        parts = found[2].split(":")
        named = dict(part.split("=", 1) for part in parts if "=" in part)
        positional = [part for part in parts if "=" not in part]
        try:
            text_strength = float(named.get("te", positional[1] if len(positional) > 1 else 1.0))
            strength = float(named.get("unet", positional[2] if len(positional) > 2 else text_strength))
            yield Tag(found[1], found[0], positional[0], strength)
        except (ValueError, IndexError):
            continue


def prepare(prompts: list[str], own: str, tell: Callable[[str], None]) -> list[str]:
    """The prompts of a batch as the program is to read them.

    The panel's own tag comes first, tags of LoRaD files become such as the program knows, and tags that cannot work are
    left out. Programs read the tags of a batch from its first prompt.

    Args:
        own: the tag to put before all others, or nothing.
        tell: called with each sentence for the user.
    """
    if not prompts:
        return prompts
    first = own + prompts[0]
    if not TAG.search(first):
        return prompts
    unusable = _unusable(list(read(first)), tell)

    def rewritten(found: re.Match[str]) -> str:
        return "" if found[0] in unusable else f"<lora:{found[2]}>"

    return [TAG.sub(rewritten, own + prompt) for prompt in prompts]


def lorads(prompt: str) -> list[Found]:
    """The LoRaDs that the tags of a prompt name, as far as they can be read, without those of strength 0."""
    found = []
    for one in read(prompt):
        file = catalog.file_of(one.name) if one.strength else None
        try:
            lorad = None if file is None else catalog.look(file)
        except (OSError, ValueError):  # told where the tag is left out
            continue
        if file is not None and lorad is not None:
            found.append(Found(one, file, lorad))
    return found


def _unusable(tags: list[Tag], tell: Callable[[str], None]) -> set[str]:
    """The texts of the tags that cannot work, each of them told."""
    unusable: set[str] = set()
    usable: list[Found] = []
    missing: list[Tag] = []
    ordinary = False
    for one in tags:
        file = catalog.file_of(one.name)
        if file is None:
            missing.append(one)
            continue
        try:
            lorad = catalog.look(file)
            if lorad is not None:
                lorad.matched(host.layout().network).check()
        except (OSError, ValueError) as error:
            tell(f"{one.name} is left out: {error}")
            unusable.add(one.text)
            continue
        if lorad is None:
            ordinary = ordinary or bool(one.strength)
        else:
            if ordinary and one.strength:
                tell(f"a LoRA stands before the LoRaD {one.name} in the prompt: rotation first, then LoRA is what was trained")
            usable.append(Found(one, file, lorad))
    # While it looks for a name in vain, the program forgets the files of the folders that are not its own.
    if usable or any(one.kind == "lorad" for one in missing):
        for one in missing:
            tell(f"{one.name} is left out: there is no adapter file of this name")
            unusable.add(one.text)
    try:
        check_together(found.lorad for found in usable if found.tag.strength)
    except ValueError as error:
        tell(f"all LoRaDs are left out: {error}")
        unusable |= {found.tag.text for found in usable}
    return unusable
