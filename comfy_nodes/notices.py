"""What a node tells the user besides its result: lines of text, facts, and notices that the front end can translate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Keys of what is sent to the front end. ``text`` is what ComfyUI's own nodes send too.
TEXT, FACTS, NOTICES = "text", "wadi", "wadi_notices"


@dataclass(frozen=True)
class Notice:
    """Something that is likely to go wrong (its code begins with ``warn_``), or is good to know (``note_``).

    Attributes:
        code: its name among the translated messages of the pack.
        text: in English, for programs that translate nothing.
        values: what stands in the translated text in braces.
    """

    code: str
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)


def message(
    texts: Iterable[str] = (), notices: Sequence[Notice] = (), facts: Sequence[Mapping[str, Any]] = ()
) -> dict[str, list[Any]] | None:
    """All of it as the front end gets it; None if there is nothing.

    The English text of a notice is among the lines too, where every front end shows it.
    """
    lines = list(dict.fromkeys([*texts, *(notice.text for notice in notices)]))
    sent = {TEXT: lines, FACTS: list(facts), NOTICES: [asdict(notice) for notice in notices]}
    return {key: value for key, value in sent.items() if value} or None
