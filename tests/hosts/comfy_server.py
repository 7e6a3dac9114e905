"""A ComfyUI server of its own for the tests: started, asked over HTTP and websocket, and stopped again."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import sys
import time
import urllib.error
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host_server import PORT, ROOT, HostServer

PROBE = Path(__file__).parent / "comfy_probe"
PACK = "wadi"
START_SECONDS = 300
RUN_SECONDS = 900

Prompt = dict[str, dict[str, Any]]


class ComfyError(Exception):
    """A prompt was refused or failed: what ComfyUI's dialog would show.

    Attributes:
        node: the id of the node that it is about.
    """

    def __init__(self, message: str, node: str = "") -> None:
        super().__init__(message)
        self.node = node


@dataclass
class Result:
    """What a prompt did.

    Attributes:
        ui: node id -> what it sent to the front end.
        events: the websocket's messages about this prompt, in order.
        prompt_id: its name at the server.
    """

    ui: dict[str, dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)
    prompt_id: str = ""


def lay_out(base: Path) -> None:
    """Folders for a server in an empty folder, with the pack and the tests' probe in it."""
    for name in ("custom_nodes", "input", "output", "temp", "user", "models/checkpoints", "models/diffusion_models"):
        (base / name).mkdir(parents=True)
    for name in ("loras", "lorad", "vae", "controlnet", "embeddings"):
        (base / "models" / name).mkdir()
    needed = ("__init__.py", "pyproject.toml", "comfy_nodes", "wadi_core", "locales", "workflows", "subgraphs")
    compiled = shutil.ignore_patterns("__pycache__")

    def other_rooms(folder: str, names: list[str]) -> set[str]:
        """Only of the root: ``docs`` of the web folder are the help pages."""
        return set(names) - set(needed) if Path(folder) == ROOT else compiled(folder, names)

    shutil.copytree(ROOT, base / "custom_nodes" / PACK, ignore=other_rooms)
    shutil.copytree(PROBE, base / "custom_nodes" / "probe", ignore=compiled)


class ComfyServer(HostServer):
    """A running server.

    Args:
        path: ComfyUI's folder.
        python: the Python that it runs under.
        base: the server's own folders, see :func:`lay_out`.
        options: more of its command line.
    """

    def __init__(self, path: Path, python: str, base: Path, options: tuple[str, ...] = ()) -> None:
        super().__init__(path, base / "server.log", START_SECONDS)
        self.python, self.base, self.options = python, base, options
        self.client = uuid.uuid4().hex

    def start(self) -> None:
        """Start it and wait until it answers; see :meth:`HostServer.launch`."""
        command = [self.python, "main.py", "--cpu", "--disable-api-nodes", "--port", PORT]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:", *self.options]
        self.launch(command, environment())

    def ready(self) -> bool:
        try:
            return bool(self.get("/system_stats"))
        except (OSError, ValueError):
            return False

    def queue(self, prompt: Prompt) -> str:
        """Queue a prompt; its id.

        Raises:
            ComfyError: the server refuses it, as the front end would show.
        """
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"]
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
            for node, found in answer.get("node_errors", {}).items():
                said = "; ".join(f"{one['message']}: {one['details']}" for one in found["errors"])
                raise ComfyError(said, node) from None
            raise ComfyError(str(answer.get("error"))) from None

    def run(self, prompt: Prompt, interrupt_at: str = "") -> Result:
        """Run a prompt to its end, listening to the websocket.

        Args:
            interrupt_at: interrupt when this node has made progress.

        Raises:
            ComfyError: a node failed (or was interrupted: the message is then ``interrupted``).
        """
        with websocket(self.port, self.client) as messages:
            prompt_id = self.queue(prompt)
            events, ui = [], {}
            begin = time.monotonic()
            for message in messages:
                if time.monotonic() - begin > RUN_SECONDS:
                    raise TimeoutError(f"no end after {RUN_SECONDS} s")
                kind, data = message["type"], message["data"]
                if data.get("prompt_id") not in (prompt_id, None):
                    continue
                events.append(message)
                if kind == "progress" and interrupt_at == str(data.get("node")):
                    self.post("/interrupt", {})
                    interrupt_at = ""
                elif kind == "executed":
                    ui[data["node"]] = data["output"]
                elif kind == "execution_error":
                    raise ComfyError(data["exception_message"].strip(), str(data["node_id"]))
                elif kind == "execution_interrupted":
                    raise ComfyError("interrupted", str(data["node_id"]))
                elif kind == "execution_success":
                    return Result(ui, events, prompt_id)
        raise ComfyError("the connection was closed")

    def restarted(self) -> None:
        """Stop and start it: nothing of earlier prompts is in memory."""
        self.stop()
        self.start()


def environment() -> dict[str, str]:
    """Of the server's process: nothing is fetched, and the pack's folder stays as it is."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "Agg"}


def host_python() -> str:
    """The Python that ComfyUI runs under."""
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


@contextmanager
def websocket(port: int, client: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The messages that ComfyUI sends to one front end, parsed; previews (binary) are left out. RFC 6455, reading only."""
    with socket.create_connection(("127.0.0.1", port), timeout=RUN_SECONDS) as connection:
        key = base64.b64encode(os.urandom(16)).decode()
        head = f"GET /ws?clientId={client} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        connection.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        with connection.makefile("rb") as stream:
            while stream.readline().strip():
                pass
            yield _messages(stream, connection)


def _messages(stream: Any, connection: socket.socket) -> Iterator[dict[str, Any]]:
    text = b""
    while True:
        head = stream.read(2)
        if len(head) < 2:
            return
        final, code, length = head[0] & 0x80, head[0] & 0x0F, head[1] & 0x7F
        if length > 125:
            length = int.from_bytes(stream.read(2 if length == 126 else 8), "big")
        content = stream.read(length)
        if code == 8:
            return
        if code == 9:  # a ping, answered by a masked pong
            mask = os.urandom(4)
            masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(content[:125]))
            connection.sendall(bytes([0x8A, 0x80 | len(masked)]) + mask + masked)
        elif code in (0, 1):
            text += content
            if final:
                yield json.loads(text)
                text = b""
