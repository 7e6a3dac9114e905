"""A message to a web address when something of note happens to a run: for Slack, Discord, or one's own server."""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from typing import Any

logger = logging.getLogger("wadi")

SECONDS = 10.0  # after which nobody waits for an answer


def notify(address: str, text: str, **facts: Any) -> None:
    """Send a message as JSON: ``text`` (Slack), ``content`` (Discord), and the facts; a failure is told and no more.

    Args:
        address: of the web hook; ``$NAME`` is a variable of the environment, so that no secret is in a file. Empty: nobody.
    """
    if not address:
        return
    url = os.path.expandvars(address)
    if not url.startswith(("https://", "http://")):
        logger.warning("webhook: an address that begins with https:// is expected, or a variable that holds one")
        return
    body = json.dumps({"text": text, "content": text, **facts}).encode()
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json", "User-Agent": "wadi"})
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS):
            pass
    except (OSError, urllib.error.URLError, ValueError) as error:
        logger.warning("webhook: the message could not be sent: %s", getattr(error, "reason", error))
