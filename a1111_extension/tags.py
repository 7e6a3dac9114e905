"""The tags ``<lora:name:strength>`` and ``<lorad:...>`` of a prompt, looked at before the program acts on them.

Nothing here applies an adapter: that is the program's own work, with the module type of :mod:`.network` or the weight
calculator of :mod:`.forge`. Here tags are put right, and what cannot work is left out and told in a sentence, instead
of half applied or lost in a traceback.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from wadi_core import entries
from wadi_core.lorad import LoRaD, check_together

from . import catalog, host

TAG = re.compile(r"<(lora|(?i:lorad)):([^>]*)>")
UNWRITABLE = re.compile(r"[:<>]")  # in a name: a tag would end there


@dataclass(frozen=True)
class Tag:
    """A tag of a prompt: the adapter's name and its strength on the denoising network.

    ``wrong`` says why the tag cannot be read, as the program would not read it either.
    """

    kind: str
    text: str
    name: str
    strength: float
    wrong: str = ""


@dataclass(frozen=True)
class Found:
    """A LoRaD that a tag names."""

    tag: Tag
    file: Path
    lorad: LoRaD


def tag(name: str, strength: float) -> str:
    """The tag of an adapter.

    Raises:
        ValueError: a name that no tag can hold, or no strength; one line.
    """
    if UNWRITABLE.search(name):
        raise ValueError(f"{name}: the name of an adapter's file cannot hold : < or >")
    return f"<lora:{name}:{entries.strength(strength):g}>"


def read(prompt: str) -> Iterator[Tag]:
    """The tags of a prompt in its order, also those that cannot be read."""
    for found in TAG.finditer(prompt):
        kind, text = found[1].lower(), found[0]
        parts = [part.split("=") for part in found[2].split(":")]
        named = {part[0]: part[1] for part in parts if len(part) == 2}
        name, *numbers = ["=".join(part) for part in parts if len(part) != 2] or [""]
        try:
            yield Tag(kind, text, name, _strength(name, numbers, named))
        except ValueError as error:
            yield Tag(kind, text, name, 0.0, str(error))


def _strength(name: str, numbers: list[str], named: dict[str, str]) -> float:
    """On the denoising network; every number of a tag has to be one, else the program drops all tags of the prompt.

    Raises:
        ValueError: one is none, or no adapter is named; one line.
    """
    if not name:
        raise ValueError("it names no adapter")
    for number in [*numbers[:2], *(named[key] for key in ("te", "unet") if key in named)]:
        entries.strength(number)
    for number in [*numbers[2:3], *(named[key] for key in ("dyn",) if key in named)]:
        entries.whole(number)
    on_words = named.get("te", numbers[0] if numbers else "1")
    return entries.strength(named.get("unet", numbers[1] if len(numbers) > 1 else on_words))


def prepare(prompts: list[str], own: str, tell: Callable[[str], None]) -> list[str]:
    """The prompts of a batch as the program is to read them.

    The panel's own tag comes first, tags of LoRaD files become such as the program knows, and tags that cannot work are
    left out. Programs read the tags of a batch from its first prompt, so the others lose theirs.

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
    place = itertools.count()

    def rewritten(found: re.Match[str]) -> str:
        return "" if next(place) in unusable else f"<lora:{found[2]}>"

    return [TAG.sub(rewritten, first), *(TAG.sub("", prompt) for prompt in prompts[1:])]


def scaled(prompt: str, factor: float) -> str:
    """A prompt whose LoRaD tags have this many times their strengths; others, and such as cannot be read, stay."""
    known = {found.tag.text: found.tag for found in lorads(prompt)}
    return TAG.sub(lambda found: _with_strength(known, found[0], factor), prompt)


def _with_strength(known: dict[str, Tag], text: str, factor: float) -> str:
    one = known.get(text)
    if one is None:
        return text
    options = [part for part in text.strip("<>").split(":")[2:] if "=" in part and not part.startswith(("te=", "unet="))]
    return f"<{':'.join([one.kind, one.name, f'{entries.strength(one.strength * factor):g}', *options])}>"


def no_file(name: str) -> str:
    """The sentence that there is no adapter of this name, with the names that come nearest."""
    return f"there is no adapter file of this name{nearest(name)}"


def nearest(name: str) -> str:
    """The known names that come nearest to one, as the end of a sentence; nothing where none does."""
    return entries.nearest(PureWindowsPath(name).name.removesuffix(catalog.ENDING), catalog.known_names(), 3)


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


def _unusable(tags: list[Tag], tell: Callable[[str], None]) -> set[int]:
    """The places of the tags that cannot work, each of them told."""
    unusable: dict[int, str] = {}  # place -> what to tell
    usable: dict[int, Found] = {}
    foreign: dict[int, str] = {}  # the program's business while no tag is meant for a LoRaD
    ordinary = named = False  # whether an ordinary adapter has come, and whether a tag is meant for a LoRaD
    for place, one in enumerate(tags):
        named = named or one.kind == "lorad"
        file = catalog.file_of(one.name)
        if one.wrong:
            foreign[place] = f"{one.text} is left out: {one.wrong}"
        elif file is None:
            foreign[place] = f"{one.name} is left out: {no_file(one.name)}"
        if file is None:
            continue
        try:
            lorad = catalog.look(file)
            named = named or lorad is not None
            if one.wrong:
                continue
            if lorad is not None:
                lorad.matched(host.layout().network).check()
        except (OSError, ValueError) as error:
            unusable[place] = f"{one.name} is left out: {error}"
            foreign.pop(place, None)
            continue
        if lorad is None:
            ordinary = ordinary or bool(one.strength)
            continue
        if ordinary and one.strength:
            tell(f"a LoRA stands before the LoRaD {one.name} in the prompt: rotation first, then LoRA is what was trained")
        before = next((place for place, other in usable.items() if same(file, other.file)), None)
        if before is not None and one.strength and not usable[before].tag.strength:
            unusable[before] = ""
            del usable[before]
        elif before is not None:
            unusable[place] = twice(one.name) if one.strength else ""
            continue
        usable[place] = Found(one, file, lorad)
    # While it looks for a name in vain, the program forgets the files of the folders that are not its own.
    # At a number that is none it drops all tags of the prompt. Without a LoRaD both are the program's business.
    if named:
        unusable |= foreign
    for sentence in filter(None, unusable.values()):
        tell(sentence)
    try:
        check_together(found.lorad for found in usable.values() if found.tag.strength)
    except ValueError as error:
        tell(f"all LoRaDs are left out: {error}")
        unusable |= dict.fromkeys(usable, "")
    return set(unusable)


def twice(name: str) -> str:
    """The sentence that a LoRaD is asked for again, by the panel and a tag or by two tags."""
    return f"{name} is asked for twice: the second is not applied, and a higher strength does what two of them would"


def same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)
