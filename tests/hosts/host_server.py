"""A host program as a process of the tests' own: started, asked over HTTP, and stopped again."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REQUEST_SECONDS = 900
STOP_SECONDS = 20
PORT = "{port}"  # stands in a command for the port that is found


class HostServer:
    """A running program.

    Args:
        path: its folder, where it runs.
        log: file for all that it writes on its console.
        start_seconds: how long it may take until it answers.
    """

    def __init__(self, path: Path, log: Path, start_seconds: float) -> None:
        self.path, self.log, self.start_seconds = path, log, start_seconds
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def ready(self) -> bool:
        """Whether it can be asked."""
        raise NotImplementedError

    def launch(self, command: list[str], environment: dict[str, str]) -> None:
        """Start it and wait until it is ready.

        Args:
            command: its line, with ``PORT`` where the port goes.
            environment: of the process.

        Raises:
            RuntimeError: it ended, or is not ready in time; with the end of its log.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = [str(self.port) if word == PORT else word for word in command]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(words, cwd=self.path, stdout=log, stderr=subprocess.STDOUT, env=environment)
        begin = time.monotonic()
        while not self.ready():
            if self._process.poll() is not None or time.monotonic() - begin > self.start_seconds:
                self.stop()
                raise RuntimeError(f"{self.path.name} does not start:\n{self.said()[-3000:]}")
            time.sleep(0.2)

    def processor_seconds(self) -> float:
        """Processor time that the program has taken so far, in all of its threads."""
        import psutil

        assert self._process is not None
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def said(self) -> str:
        """All that it wrote on its console."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> Any:
        """JSON from the server."""
        return json.loads(self.bytes_of(path))

    def bytes_of(self, path: str) -> bytes:
        """Bytes from the server."""
        with urllib.request.urlopen(self.url(path), timeout=REQUEST_SECONDS) as answer:
            return answer.read()

    def post(self, path: str, content: Any = None) -> Any:
        """Post JSON, get JSON; None where the answer is empty."""
        data = json.dumps({} if content is None else content).encode()
        request = urllib.request.Request(self.url(path), data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else None
