"""A finished student is sent to the hub by the hub's own library; only the server is ours."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from networks import random_lorad, write_base
from PIL import Image
from training import tiny

from trainer.distill.session import train
from trainer.distill.uploading import push


class Receiving(BaseHTTPRequestHandler):
    """The routes that an upload of small files asks."""

    requests: list[str] = []
    received: dict[str, bytes] = {}

    def do_POST(self) -> None:  # noqa: N802 - the name that the server looks for
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.requests.append(self.path)
        if self.path.endswith("/preupload/main"):
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            self.answer({"files": files})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": "http://127.0.0.1/org/mine/commit/0"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)  # older libraries say it in one way, newer ones in another
            assert asked.get("private") is True or asked.get("visibility") == "private"
            self.answer({"url": "http://127.0.0.1/org/mine"})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:  # noqa: N802
        self.requests.append(self.path)
        self.answer({"id": "org/mine", "siblings": [], "sha": "0" * 40})

    def answer(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Receiving)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    made.shutdown()
    made.server_close()


def test_a_student_is_sent(tmp_path: Path, server: ThreadingHTTPServer, caplog: pytest.LogCaptureFixture) -> None:
    student, picture = tmp_path / "one-step.safetensors", tmp_path / "a.png"
    random_lorad(write_base(tmp_path / "base")[1]["unet"]).save(student)
    Image.new("RGB", (64, 64), "red").save(picture)
    given = ("org/mine", student, "org/base", [picture], ["a red square"])
    with caplog.at_level("INFO", "wadi"):
        assert push(*given)
    assert "the student is on the hub: org/mine (private)" in caplog.text
    sent = Receiving.received
    assert set(sent) == {"one-step.safetensors", "README.md", "pipeline.py", "images/1.png", "thumbnail.jpg"}
    assert sent["one-step.safetensors"] == student.read_bytes()
    assert b"base_model: org/base" in sent["README.md"] and b"a red square" in sent["README.md"]
    server.shutdown()
    server.server_close()
    assert not push(*given)  # the hub is away: told, and the files are kept
    assert "send it later with: hf upload org/mine" in caplog.text
    assert (tmp_path / "hub" / "README.md").is_file()


def test_a_run_ends_well_though_its_base_is_unknown(
    base: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = train(tiny(base, prompts, tmp_path, steps=1, push_to_hub="org/mine", sheet_teacher_steps=0))
    assert written is not None and written.is_file()
    assert "push_to_hub: the files of the repository cannot be written: " in caplog.text


def test_what_is_no_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="push_to_hub: ORG/NAME is expected"):
        tiny(tmp_path, tmp_path, tmp_path, push_to_hub="mine")
