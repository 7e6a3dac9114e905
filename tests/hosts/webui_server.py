"""An A1111 or Forge of its own for the tests: started on the CPU, asked over HTTP, and stopped again.

    A1111_PATH=... [A1111_PYTHON=...] python -m pytest tests/hosts/test_a1111.py
    FORGE_PATH=... [FORGE_PYTHON=...] python -m pytest tests/hosts/test_forge.py

All that the program writes goes into a folder of the tests' own. A1111 wants the tokenizer and settings of
openai/clip-vit-large-patch14; they are laid out for it as its cache would be.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wadi_core import configs

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).parent / "webui_probe"
NEEDED = ("scripts", "a1111_extension", "wadi_core", "localizations", "metadata.ini", "install.py", "requirements.txt")
START_SECONDS = 900
RUN_SECONDS = 900
OPTIONS = {
    "a1111": ("--use-cpu", "all", "--no-half", "--precision", "full"),
    "forge": ("--always-cpu", "--all-in-fp32"),
}
COMMON = ("--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-version-check", "--no-hashing", "--api")
SAMPLER = "WaDi one-step"


class WebUIError(Exception):
    """The program answered with an error; the message is what it says."""


@dataclass
class Made:
    """What a request made: pictures (h, w, 3) from 0 to 255, an infotext for each, and the rest of the answer."""

    pictures: list[np.ndarray]
    infotexts: list[str]
    info: dict[str, Any] = field(repr=False)

    @property
    def fields(self) -> dict[str, str]:
        """The last line of the first infotext, as names and values; quoted values as they are."""
        pairs = next(line for line in reversed(self.infotexts[0].split("\n")) if "Steps: " in line)
        return dict(pair.split(": ", 1) for pair in pairs.replace(", ", "\n").split("\n") if ": " in pair)


class WebUI:
    """A running program.

    Args:
        kind: ``a1111`` or ``forge``.
        data: its folder for models, extensions and all that it writes; see :func:`lay_out`.
        options: more of its command line.
        environment: more variables of its process.
    """

    def __init__(self, kind: str, data: Path, options: tuple[str, ...] = (), **environment: str) -> None:
        self.kind, self.data, self.options = kind, data, options
        self.path = Path(os.environ[f"{kind.upper()}_PATH"])
        self.python = os.environ.get(f"{kind.upper()}_PYTHON", sys.executable)
        self.environment = environment
        self.log = data / "server.log"
        self.size = 64
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> WebUI:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: it ended, or does not answer in time; with the end of its log.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [self.python, "launch.py", *COMMON, *OPTIONS[self.kind], "--port", str(self.port)]
        command += ["--data-dir", str(self.data), *self.options]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(self.data / "huggingface")}
        environment = {**os.environ, **offline, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", **self.environment}
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(command, cwd=self.path, stdout=log, stderr=subprocess.STDOUT, env=environment)
        begin = time.monotonic()
        while "Startup time" not in self.said():
            if self._process.poll() is not None or time.monotonic() - begin > START_SECONDS:
                self.stop()
                raise RuntimeError(f"{self.kind} does not start:\n{self.said()[-3000:]}")
            time.sleep(0.5)
        return self

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def said(self) -> str:
        """All that it wrote on its console."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def get(self, path: str) -> Any:
        """JSON from the server."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=RUN_SECONDS) as answer:
            return json.loads(answer.read())

    def post(self, path: str, content: Any = None) -> Any:
        """Post JSON, get JSON.

        Raises:
            WebUIError: the program answers with an error.
        """
        data = json.dumps({} if content is None else content).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=RUN_SECONDS) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise WebUIError(error.read().decode(errors="replace")) from None

    def draw(self, prompt: str = "a cat", tab: str = "txt2img", **values: Any) -> Made:
        """One request; by default one picture of the base's size with the one-step sampler and senseless steps and scale."""
        asked = {"prompt": prompt, "seed": 3, "steps": 20, "cfg_scale": 7.0, "sampler_name": SAMPLER}
        asked |= {"width": self.size, "height": self.size, **values}
        answer = self.post(f"/sdapi/v1/{tab}", asked)
        pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in answer["images"]]
        info = json.loads(answer["info"])
        return Made([picture.astype(int) for picture in pictures], info["infotexts"], info)

    def calls(self) -> list[dict[str, Any]]:
        """The calls of the network since the last time, each with its timesteps and the shape of its input."""
        return self.post("/probe/calls")

    def comments(self) -> list[str]:
        """What stands below the last pictures."""
        return self.post("/probe/comments")

    def choose(self, checkpoint: str) -> None:
        """Load another checkpoint."""
        self.post("/sdapi/v1/options", {"sd_model_checkpoint": f"{checkpoint}.safetensors"})


def lay_out(data: Path, probe: bool = True, extension: bool = True) -> Path:
    """Folders for a program, with this repository and the tests' probe among the extensions; returns that of models."""
    models = data / "models"
    for folder in ("Stable-diffusion", "Lora", "LoRaD"):
        (models / folder).mkdir(parents=True)
    (data / "extensions").mkdir()
    if extension:
        # A link, as the installer makes it, to a copy: the repository may change while a program runs.
        copy = data / "repository"
        for name in NEEDED:
            source = ROOT / name
            copied = shutil.copytree if source.is_dir() else shutil.copyfile
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            copied(source, copy / name)
        (data / "extensions" / "wadi").symlink_to(copy, target_is_directory=True)
    if probe:
        shutil.copytree(PROBE, data / "extensions" / "probe", ignore=shutil.ignore_patterns("__pycache__"))
    clip = data / "huggingface" / "hub" / "models--openai--clip-vit-large-patch14"
    (clip / "refs").mkdir(parents=True)
    (clip / "refs" / "main").write_text("local")
    snapshot = clip / "snapshots" / "local"
    shutil.copytree(configs.TOKENIZER, snapshot)
    text = configs.read(configs.folder("sd15") / "text_encoder" / "config.json")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 768, "text_config": text}))
    settings = {"live_previews_enable": True, "show_progress_every_n_steps": 1, "samples_save": False, "grid_save": False}
    settings |= {"randn_source": "CPU"}
    (data / "config.json").write_text(json.dumps(settings))
    return models


def png(picture: np.ndarray) -> str:
    """A picture as the API takes it."""
    file = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
