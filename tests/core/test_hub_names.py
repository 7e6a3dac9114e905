"""Names of the model hub in place of files: in the command line's options, in Python, and as the trainer's base."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_networks
import hub_server
import networks
import pytest
import torch
from control_networks import random_controlnet
from hub_server import ROOT, Hub, Repository, folder_files
from PIL import Image

from wadi_core import LoRaD, OneStepPipeline, images, pictures
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.lorad.weights import Weights

PROMPT = "a <thing> on a table"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, a ControlNet, a learned word and a control image."""
    place = tmp_path_factory.mktemp("place")
    hub_networks.base_repository(place / "base", changes=networks.small_settings("sd15"))
    unet = OneStepPipeline.from_pretrained(place / "base", device="cpu", precision="exact").base.unet
    networks.random_lorad(unet).save(place / "one-step.safetensors")
    networks.random_lorad(unet, rank=2, seed=4, one_step=False).save(place / "style.safetensors")
    random_controlnet(unet).save_pretrained(place / "control")
    write_safetensors(place / "learned_embeds.safetensors", {"<thing>": torch.ones(1, 32)})
    Image.new("RGB", (64, 64), "white").save(place / "map.png")
    return place


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Hub]:
    xl = folder_files(place / "base") | {"model_index.json": b'{"_class_name": "StableDiffusionXLPipeline"}'}
    repositories = {
        "org/base": Repository({**folder_files(place / "base"), **dict.fromkeys(hub_networks.STRANGERS, b"x")}),
        "org/xl": Repository(xl),
        "org/adapters": Repository({name: place / name for name in ("one-step.safetensors", "style.safetensors")}),
        "org/control": Repository(folder_files(place / "control")),
        "org/word": Repository({"learned_embeds.safetensors": place / "learned_embeds.safetensors", "README.md": b"x"}),
    }
    with hub_server.running(repositories) as running:
        yield running


def test_a_picture_of_names_alone(server: Hub, place: Path, tmp_path: Path) -> None:
    words = ["generate", PROMPT, "-o", "a.png", "--base", "org/base", "--lorad", "org/adapters:one-step.safetensors"]
    words += ["--lorad", "org/adapters@main:style.safetensors:0.5", "--embedding", "org/word"]
    words += ["--control", "org/control", "--control-image", str(place / "map.png")]
    words += ["--precision", "exact"]
    ended = server.wadi(tmp_path, *words)
    assert ended.returncode == 0, ended.stderr
    drawn = OneStepPipeline.from_pretrained(
        place / "base",
        [place / "one-step.safetensors", (place / "style.safetensors", 0.5)],
        device="cpu",
        control=place / "control",
        embeddings=place / "learned_embeds.safetensors",
        precision="exact",
    )(PROMPT, control_image=Image.open(place / "map.png"))
    assert images.read(tmp_path / "a.png").tobytes() == drawn.images[0].tobytes()
    settings = pictures.read_settings(tmp_path / "a.png")
    assert settings.base == "org/base"
    assert [(one.file, one.strength) for one in settings.lorad] == [
        ("org/adapters:one-step.safetensors", 1.0),
        ("org/adapters:style.safetensors", 0.5),
    ]
    assert settings.control[0].file == "org/control"
    assert settings.embeddings[0].file == "org/word"
    named = ("org/base", "org/adapters", "org/control", "org/word")
    assert all(any(name in path for name in named) for _, path, _ in server.requests)


def test_a_base_that_cannot_be_used_is_refused_before_its_weights_are_fetched(server: Hub, tmp_path: Path) -> None:
    ended = server.wadi(tmp_path, "generate", "x", "-o", "a.png", "--base", "org/xl")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("wadi: error: ") and "StableDiffusionXLPipeline" in ended.stderr
    assert not any("org/xl" in path and path.endswith(".safetensors") for method, path, _ in server.requests)


def test_offline_a_base_that_was_not_wholly_fetched_is_told(server: Hub, tmp_path: Path) -> None:
    (folder,) = server.ask(tmp_path, "org/base", kind="base")
    (Path(folder) / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    ended = server.wadi(tmp_path, "generate", "x", "-o", "a.png", "--base", "org/base", HF_HUB_OFFLINE="1")
    assert ended.returncode == 1
    line = "org/base: the cache (the hub was not asked) holds no weights vae/diffusion_pytorch_model.safetensors"
    assert ended.stderr == f"wadi: error: {line}\n"


def test_the_toolbox_takes_names(server: Hub, place: Path, tmp_path: Path) -> None:
    asked = len(server.requests)
    told = server.wadi(tmp_path, "inspect", "org/adapters:one-step.safetensors", "--base", "org/base", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["file"] == "org/adapters:one-step.safetensors"
    assert not any("text_encoder" in path or "vae" in path for _, path, _ in server.requests[asked:])  # the U-Net is enough

    merged = server.wadi(
        tmp_path, "merge", "--base", "org/base", "--lorad", "org/adapters:one-step.safetensors:0.5", "-o", "merged"
    )
    assert merged.returncode == 0, merged.stderr
    assert not any(path.is_symlink() for path in (tmp_path / "merged").rglob("*"))
    unet = OneStepPipeline.from_pretrained(place / "base", device="cpu", precision="exact").base.unet
    LoRaD.load(place / "one-step.safetensors").fuse_into(unet, 0.5)
    weights = Weights.open(tmp_path / "merged")
    assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in unet.state_dict().items())

    commands = [
        ["extract", "--base", "org/base", "--student", "merged", "-o", "again.safetensors"],
        ["analyze", "--base", "org/base", "--student", "merged", "--json"],
        ["convert", "org/adapters:one-step.safetensors", "--to", "factors", "-o", "factors.safetensors"],
        [
            "convert",
            "org/adapters:one-step.safetensors",
            "--to",
            "lora",
            "--base",
            "org/base",
            "--rank",
            "2",
            "-o",
            "lora.safetensors",
        ],
    ]
    code = "import json, sys\nfrom wadi_core.cli import main\nsys.exit(sum(main(words) for words in json.loads(sys.argv[1])))"
    ended = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=tmp_path, env=server.environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {"again", "factors", "lora"}


def test_the_trainer_takes_a_name_as_its_base(server: Hub, tmp_path: Path) -> None:
    def train(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "trainer" / "train.py"), "--config", str(ROOT / "trainer/configs/sd15-24gb.yaml")]
        command += ["base=org/base", f"output={tmp_path / 'run'}", "device=cpu", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=server.environment(tmp_path), capture_output=True, text=True, check=False
        )

    asked = len(server.requests)
    estimated = train("--dry-run")
    assert estimated.returncode == 0, estimated.stderr
    fetched = [path for _, path, _ in server.requests[asked:] if "/resolve/" in path]
    assert fetched and not any(path.endswith(".safetensors") for path in fetched)  # shapes are enough
    shape = train("base=", "base_config=org/base", "--dry-run")
    assert shape.returncode == 0, shape.stderr
    start = train("start_from=org/adapters:one-step.safetensors", "--dry-run")
    assert start.returncode == 0, start.stderr
    small = ["student_rank=2", "fake_rank=2", "precision=fp32", "base_weights=fp32", "optimizer=adamw", "prompts=starter"]
    small.append("start_from=org/adapters@main:style.safetensors")
    trained = train("steps=1", "batch=1", "micro_batch=0", "gradient_checkpointing=false", "compile=false", *small)
    assert trained.returncode == 0, trained.stderr
    assert list((tmp_path / "run").glob("*.safetensors"))
