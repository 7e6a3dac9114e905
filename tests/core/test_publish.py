"""``wadi publish``: the files of a repository, which diffusers loads and which say what is in them."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pipeline_kit import count_calls, largest_difference

from wadi_core import LoRaD, OneStepPipeline, mini
from wadi_core.cli import main
from wadi_core.lorad import Metadata
from wadi_core.pipeline import noise

pytestmark = pytest.mark.usefixtures("no_network")
FILE = "wadi-mini-one-step.safetensors"
PROMPT = 'a "red" apple\nand [a] cat'


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Published with a picture of our own and one that says nothing of itself."""
    OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")(PROMPT, seed=7).save(tmp_path / "own.png")
    Image.new("RGB", (700, 900), "red").save(tmp_path / "other.jpg")
    arguments = ["--lorad", str(mini.lorad_path()), "--base", "org/wadi-mini", "--license", "apache-2.0"]
    arguments += ["--picture", str(tmp_path / "own.png"), "--picture", str(tmp_path / "other.jpg")]
    assert main(["publish", str(tmp_path / "repository"), *arguments]) == 0
    return tmp_path / "repository"


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_files_and_what_the_card_says(repository: Path, tmp_path: Path) -> None:
    files = {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}
    assert files == {"README.md", "pipeline.py", FILE, "thumbnail.jpg", "images/1.png", "images/2.png"}
    assert (repository / FILE).read_bytes() == mini.lorad_path().read_bytes()
    about, text = card(repository)
    assert about == {
        "base_model": "org/wadi-mini",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "one-step", "lorad", "wadi"],
        "instance_prompt": PROMPT,
        "thumbnail": "thumbnail.jpg",
        "widget": [{"text": PROMPT, "output": {"url": "images/1.png"}}, {"text": " ", "output": {"url": "images/2.png"}}],
    }
    assert "$" not in text and f'load_lorad(pipe, "{FILE}")' in text and "alpha_T^2 = 0.0047" in text
    assert "![a 'red' apple and  a  cat](images/1.png)" in text
    assert str(tmp_path) not in text
    for block in text.split("```python\n")[1:]:
        compile(block.partition("```")[0], "README.md", "exec")
    assert max(Image.open(repository / "thumbnail.jpg").size) <= 512


def test_diffusers_loads_the_folder_and_draws_the_same(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    named = {"custom_pipeline": str(repository), "trust_remote_code": True}
    pipe = DiffusionPipeline.from_pretrained(mini.folder(), **named, lorad=str(repository / FILE))
    assert type(pipe).__name__ == "OneStepLoRaDPipeline"
    calls = count_calls(pipe.unet)
    made = pipe("a red apple", latents=noise([7], 128, 128)).images[0]
    ours = OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")("a red apple", seed=7).images[0]
    assert calls == [1] and largest_difference(made, ours) <= 1
    with pytest.raises(ValueError, match="add lorad=FOLDER/wadi-mini-one-step.safetensors"):
        DiffusionPipeline.from_pretrained(mini.folder(), **named)


def test_on_the_hub_the_code_finds_the_file_of_its_own_commit(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    code = tmp_path / "diffusers_modules" / "local" / "some-one--one-step" / commit / "pipeline.py"
    snapshot = tmp_path / "hub" / "models--some-one--one-step" / "snapshots" / commit
    for folder, name in ((code.parent, "pipeline.py"), (snapshot, FILE)):
        folder.mkdir(parents=True)
        shutil.copyfile(repository / name, folder / name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    spec = importlib.util.spec_from_file_location("published", code)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert Path(module._of_this_repository()) == snapshot / FILE


def test_pixart_and_ordinary_adapters(tmp_path: Path) -> None:
    factors = {"transformer.transformer_blocks.0.attn1.to_q": (torch.zeros(4, 2), torch.zeros(2, 2))}
    LoRaD(factors, Metadata("pixart-alpha", license="mit", title="A *style*")).save(tmp_path / "style.safetensors")
    assert main(["publish", str(tmp_path / "r"), "--lorad", str(tmp_path / "style.safetensors"), "--prompt", "a boat"]) == 0
    about, text = card(tmp_path / "r")
    assert (about["base_model"], about["license"]) == ("PixArt-alpha/PixArt-XL-2-256x256", "mit")
    assert about["instance_prompt"] == "a boat" and "widget" not in about and text.startswith("\n# A  style\n")
    assert "class OneStepLoRaDPipeline(PixArtAlphaPipeline)" in (tmp_path / "r" / "pipeline.py").read_text()
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"README.md", "pipeline.py", "style.safetensors"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lorad", "missing.safetensors"], "missing.safetensors: there is no such file"),
        (["--lorad", "MINI"], "no base is known for wadi-mini: name it with --base ORG/NAME"),
        (["--lorad", "MINI", "--base", "../folder/x"], "'../folder/x' is no repository's name"),
        (["--lorad", "MINI", "--base", "org/x", "--picture", "none.png"], "none.png"),
        (["--lorad", "factors.pth"], "there is no such file"),
    ],
)
def test_what_is_refused_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(mini.lorad_path()) if one == "MINI" else one for one in arguments]
    assert main(["publish", str(tmp_path / "r"), *arguments]) == 1
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert main(["publish", str(tmp_path), "--lorad", str(mini.lorad_path()), "--base", "org/x"]) == 1
    assert "choose another one" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
