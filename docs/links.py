"""A hook of mkdocs: links from a page to files outside docs/ lead to the repository, where there is one."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Rewrite ``[text](../file)``; without a repository's address only the text is left."""
    address = config.get("repo_url")
    return OUTSIDE.sub(lambda link: f"[{link[1]}]({address}/blob/main/{link[2]})" if address else link[1], markdown)
