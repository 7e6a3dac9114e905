"""An A1111, Forge or Forge Neo of its own for the tests: started on the CPU, asked over HTTP, and stopped again.

    A1111_PATH=... [A1111_PYTHON=...] python -m pytest tests/hosts/test_a1111.py
    FORGE_PATH=... [FORGE_PYTHON=...] python -m pytest tests/hosts/test_forge.py
    NEO_PATH=... [NEO_PYTHON=...] python -m pytest tests/hosts/test_neo.py

All that the program writes goes into a folder of the tests' own. A1111 wants the tokenizer and settings of
openai/clip-vit-large-patch14; they are laid out for it as its cache would be.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import urllib.error
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from host_server import PORT, ROOT, HostServer
from PIL import Image

from a1111_extension import programs
from wadi_core import configs

PROBE = Path(__file__).parent / "webui_probe"
NEEDED = ("scripts", "a1111_extension", "wadi_core", "localizations", "metadata.ini", "install.py", "requirements.txt")
START_SECONDS = 900
OPTIONS = {
    "a1111": ("--use-cpu", "all", "--no-half", "--precision", "full"),
    "forge": ("--always-cpu", "--all-in-fp32"),
    "neo": ("--cpu", "--force-fp32"),
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


class WebUI(HostServer):
    """A running program.

    Args:
        kind: one of ``OPTIONS``.
        data: its folder for models, extensions and all that it writes; see :func:`lay_out`.
        options: more of its command line.
        missing: packages that are not to be found in it, whether they are installed or not.
    """

    def __init__(self, kind: str, data: Path, options: tuple[str, ...] = (), missing: tuple[str, ...] = ()) -> None:
        super().__init__(Path(os.environ[f"{kind.upper()}_PATH"]), data / "server.log", START_SECONDS)
        self.kind, self.data, self.options, self.missing = kind, data, options, missing
        self.python = host_python(kind)
        self.size = 64

    def start(self) -> WebUI:
        """Start it and wait until it answers; see :meth:`HostServer.launch`."""
        command = [self.python, "launch.py", *COMMON, *OPTIONS[self.kind], "--port", PORT]
        # Forge serves its own scripts to the page only from where its data are, unless it is told.
        command += ["--data-dir", str(self.data), "--gradio-allowed-path", str(self.path), *self.options]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(self.data / "huggingface")}
        environment = {**os.environ, **offline, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
        if self.missing:
            environment["PYTHONPATH"] = str(self._hidden())
        self.launch(command, environment)
        return self

    def _hidden(self) -> Path:
        """A folder whose packages stand before the installed ones and cannot be imported."""
        folder = self.data / "hidden"
        for name in self.missing:
            (folder / name).mkdir(parents=True, exist_ok=True)
            text = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
            (folder / name / "__init__.py").write_text(text)
        return folder

    def ready(self) -> bool:
        return "Startup time" in self.said()

    def post(self, path: str, content: Any = None) -> Any:
        """Post JSON, get JSON.

        Raises:
            WebUIError: the program answers with an error.
        """
        try:
            return super().post(path, content)
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
        if self.kind == "a1111":  # it would not take note of the choice before it has loaded the first one
            self.post("/probe/loaded")
        self.post("/sdapi/v1/options", {"sd_model_checkpoint": f"{checkpoint}.safetensors"})


def host_python(kind: str) -> str:
    """The Python that a program runs under."""
    return os.environ.get(f"{kind.upper()}_PYTHON", sys.executable)


def lay_out(kind: str, data: Path, mini: Path | None = None, extension: bool = True) -> Path:
    """Folders for a program, with this repository and the tests' probe among the extensions; returns that of models.

    The repository is put there by its own installer: a link to a copy, because it may change while a program runs.

    Args:
        mini: a folder with weights of wadi-mini for the copy, which the installer then writes into the models' folders.
        extension: False leaves the repository out.
    """
    models = data / "models"
    for folder in ("Stable-diffusion", "Lora", "LoRaD"):
        (models / folder).mkdir(parents=True)
    shutil.copytree(PROBE, data / "extensions" / "probe", ignore=shutil.ignore_patterns("__pycache__"))
    if extension:
        copy = data / "repository"
        copy.mkdir()
        for name in NEEDED:
            source = ROOT / name
            copied = shutil.copytree if source.is_dir() else shutil.copyfile
            copied(source, copy / name)
        for sign in ("webui.py", *(sign.file for sign in (*programs.NEEDED, *programs.KNOWN))):
            if (file := Path(os.environ[f"{kind.upper()}_PATH"], sign)).is_file():  # by which the installer knows a program
                (data / sign).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, data / sign)
        command = [sys.executable, str(copy / "install.py"), "--webui", str(data)]
        if mini is not None:
            shutil.copytree(mini, copy / "wadi_core" / "mini", dirs_exist_ok=True)
            command += ["--mini", "--python", host_python(kind)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    clip = data / "huggingface" / "hub" / "models--openai--clip-vit-large-patch14"
    (clip / "refs").mkdir(parents=True)
    (clip / "refs" / "main").write_text("local")
    snapshot = clip / "snapshots" / "local"
    shutil.copytree(configs.TOKENIZER, snapshot)
    text = configs.read(configs.folder("sd15") / "text_encoder" / "config.json")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 768, "text_config": text}))
    settings = {"live_previews_enable": True, "show_progress_every_n_steps": 1, "samples_save": False, "grid_save": False}
    settings |= {"randn_source": "CPU", "CLIP_stop_at_last_layers": 1}
    if kind == "neo":
        settings["VERSION_UID"] = "PY313"  # else it waits for a key
        (data / "tmp").mkdir()
    (data / "config.json").write_text(json.dumps(settings))
    return models


def png(picture: np.ndarray) -> str:
    """A picture as the API takes it."""
    file = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
