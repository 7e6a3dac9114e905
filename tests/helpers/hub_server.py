"""A model hub on the loopback device: the routes that huggingface_hub asks, and everything that can go wrong there.

It stands in for the server only; the client is the real library, with HF_ENDPOINT set to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
PIECE = 1 << 16


@dataclass
class Fault:
    """What a file's download does instead of working.

    Attributes:
        kind: ``break`` closes the connection midway; ``hold`` waits midway until it is let go; ``short`` sends fewer
            bytes and says so; ``lie`` tells another size in the list of files.
        times: how often; afterwards the file is sent as it should be.
        reached: set when the fault has happened.
    """

    kind: str
    times: int = 1_000_000
    reached: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repository:
    """Files of one commit, and who may have them."""

    files: dict[str, Path | bytes]
    revisions: tuple[str, ...] = ("main",)
    token: str = ""
    gated: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1("".join(sorted(self.files)).encode()).hexdigest()

    def content(self, name: str) -> bytes:
        found = self.files[name]
        return found if isinstance(found, bytes) else found.read_bytes()

    def size(self, name: str) -> int:
        found = self.files[name]
        return len(found) if isinstance(found, bytes) else found.stat().st_size


def folder_files(folder: Path) -> dict[str, Path | bytes]:
    """The files of a folder, as those of a repository."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


class Hub:
    """The server.

    Attributes:
        repositories: by their names.
        faults: name of a file -> what is wrong with it.
        status: every answer's status, if the hub is down.
        requests: method, path and Range of every request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: dict[str, Fault] = {}
        self.status = 0
        self.requests: list[tuple[str, str, str]] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def downloads(self, name: str) -> int:
        """How often a file's content was asked for."""
        return sum(1 for method, path, _ in self.requests if method == "GET" and path.endswith(f"/{name}"))

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """Of a process that uses this hub, with nothing in its cache but what lies in ``home``."""
        left_out = ("HF_", "TRANSFORMERS_OFFLINE", "XDG_", "WADI_")
        kept = {name: text for name, text in os.environ.items() if not name.upper().startswith(left_out)}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home / "hf"), "HOME": str(home), "NO_PROXY": "127.0.0.1"}
        return {**kept, **own, "USERPROFILE": str(home), "PYTHONPATH": str(ROOT), **changes}

    def wadi(self, home: Path, *arguments: object, answer: str = "", **changes: str) -> subprocess.CompletedProcess[str]:
        """Run the command line, in the folder ``home``."""
        return subprocess.run(
            [sys.executable, "-m", "wadi_core", *map(str, arguments)],
            cwd=home, env=self.environment(home, **changes), input=answer, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def start(self, home: Path, *arguments: object, **changes: str) -> subprocess.Popen[str]:
        """The same, to be watched and killed."""
        return subprocess.Popen(
            [sys.executable, "-m", "wadi_core", *map(str, arguments)],
            cwd=home, env=self.environment(home, **changes), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, home: Path, *names: str, kind: str = "file", before: str = "", **changes: str) -> list[str]:
        """What each name is on the disk, from a process of its own; the error's kind and text for one that fails.

        ``before`` is code that this process runs first.
        """
        code = before + (
            "import json, sys\nfrom wadi_core import hub\nfound = []\n"
            "for name in sys.argv[2:]:\n"
            "    try: found.append(str(hub.local(name, sys.argv[1])))\n"
            "    except (OSError, ValueError) as error: found.append(f'{type(error).__name__}: {error}')\n"
            "print(json.dumps(found))"
        )
        words = [sys.executable, "-c", code, kind, *names]
        ended = subprocess.run(
            words, cwd=home, env=self.environment(home, **changes), capture_output=True, text=True, check=True
        )
        return json.loads(ended.stdout.splitlines()[-1])


@contextmanager
def running(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """A hub with these repositories."""
    hub = Hub()
    hub.repositories.update(repositories)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        for fault in hub.faults.values():
            fault.let_go.set()
        hub.server.shutdown()
        hub.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, split = self.server_hub, urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        hub.requests.append((self.command, path, self.headers.get("Range") or ""))
        if hub.status:
            return self._json({"error": "down"}, hub.status)
        if path == "/api/models":
            owner = query.get("author", [""])[0] + "/"
            return self._json([{"id": name, "modelId": name} for name in hub.repositories if name.startswith(owner)])
        words = path.removeprefix("/api/models").strip("/").split("/")
        repository = hub.repositories.get("/".join(words[:2]))
        if refused := self._refused(repository):
            return self._json({"error": refused[1]}, refused[0], {"X-Error-Code": refused[1], "X-Error-Message": refused[2]})
        assert repository is not None
        name, rest = "/".join(words[:2]), words[2:]
        if rest == ["refs"]:
            refs = [
                {"name": one, "ref": f"refs/heads/{one}", "targetCommit": repository.commit} for one in repository.revisions
            ]
            return self._json({"branches": refs, "tags": [], "converts": []})
        if rest and rest[1] not in (*repository.revisions, repository.commit):
            return self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if rest[:1] == ["resolve"]:
            return self._file(repository, "/".join(rest[2:]))
        if rest[:1] == ["tree"]:
            return self._json([self._entry(repository, one) for one in repository.files])
        siblings = [{"rfilename": one, "size": self._told(repository, one)} for one in repository.files]
        self._json({"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings, "private": False})

    def _refused(self, repository: Repository | None) -> tuple[int, str, str] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == "expired":
            return 401, "", "Invalid credentials in Authorization header"
        if repository is None or (repository.token and token != repository.token and not repository.gated):
            return (404 if token else 401), "RepoNotFound", "Repository not found"
        if repository.gated and token != repository.token:
            return 403, "GatedRepo", "Access to this model is restricted"
        return None

    def _told(self, repository: Repository, name: str) -> int:
        fault = self.server_hub.faults.get(name)
        return repository.size(name) + (7 if fault and fault.kind == "lie" else 0)

    def _entry(self, repository: Repository, name: str) -> dict[str, Any]:
        digest = hashlib.sha256(repository.content(name)).hexdigest()
        size = self._told(repository, name)
        return {"type": "file", "path": name, "oid": digest[:40], "size": size}

    def _file(self, repository: Repository, name: str) -> None:
        if name not in repository.files:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = repository.content(name)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        fault = self.server_hub.faults.get(name) if self.command == "GET" else None
        if fault and fault.times <= 0:
            fault = None
        if fault:
            fault.times -= 1
        whole = content[: len(content) // 2] if fault and fault.kind == "short" else content
        body = whole[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        self._send(body[:half])
        if fault and fault.kind in ("break", "hold"):
            self.wfile.flush()
            fault.reached.set()
            if fault.kind == "break":
                self.close_connection = True
                return
            fault.let_go.wait()
        self._send(body[half:])

    def _send(self, body: bytes) -> None:
        try:
            for place in range(0, len(body), PIECE):
                self.wfile.write(body[place : place + PIECE])
        except OSError:  # whoever asked has been killed
            self.close_connection = True

    def _json(self, content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
