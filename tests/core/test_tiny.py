"""Tiny decoders: both layouts of their files, in a pipeline and on the command line, from the hub, and what is refused."""

from __future__ import annotations

from pathlib import Path

import hub_server
import pytest
import torch
from hub_server import Repository
from PIL import Image
from pipeline_kit import Kit, largest_difference
from safetensors.torch import save_file

from wadi_core import catalog, pictures, tiny
from wadi_core.cli import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One decoder with random weights as diffusers writes it, folder and file, and as its author does."""
    from diffusers import AutoencoderTiny

    place = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(1)
    network = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(2, 1, 3, 1),
    )
    network.save_pretrained(place / "folder")
    state = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("decoder.")}
    save_file(tiny.from_layers(state), place / "taesd_decoder.safetensors")
    return {
        "folder": place / "folder",
        "file": place / "folder" / tiny.WEIGHTS,
        "author's": place / "taesd_decoder.safetensors",
    }


@pytest.mark.parametrize("form", ["folder", "file", "author's"])
def test_every_form_is_what_diffusers_decodes(files: dict[str, Path], form: str) -> None:
    from diffusers import AutoencoderTiny

    latents = torch.randn(2, 4, 5, 6)
    theirs = AutoencoderTiny.from_pretrained(files["folder"]).decode(latents).sample
    with torch.no_grad():
        torch.testing.assert_close(tiny.load(files[form], CPU, torch.float32).decode(latents).sample, theirs, rtol=0, atol=1e-6)


def test_the_authors_names_are_those_of_the_published_file(files: dict[str, Path]) -> None:
    from safetensors import safe_open

    with safe_open(files["author's"], "pt") as file:
        names = set(file.keys())
    assert {"1.weight", "1.bias", "3.conv.0.weight", "3.conv.2.weight", "3.conv.4.bias", "6.weight"} <= names
    assert "6.bias" not in names  # after an enlargement there is none


def test_a_pipeline_decodes_with_it_and_says_so(sd15: Kit, files: dict[str, Path], tmp_path: Path) -> None:
    pipe = sd15.load(vae=files["author's"])
    made = pipe("a cat", return_latents=True)
    with torch.no_grad():
        theirs = pictures.to_pictures(tiny.load(files["file"], CPU, torch.float32).decode(made.latents).sample)
    assert largest_difference(made.images[0], theirs[0]) <= 1
    (path,) = made.save(tmp_path / "p.png")
    assert pictures.read_settings(path).vae == "taesd_decoder.safetensors"
    with Image.open(path) as picture:
        assert "VAE: taesd_decoder.safetensors" in picture.info[pictures.TEXT_KEY]
    pipe.set_vae(None)
    own = pipe("a cat")
    assert own.images[0].tobytes() == sd15.load()("a cat").images[0].tobytes() and own.settings[0].vae is None


def test_on_the_command_line(sd15: Kit, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "a cat", "-o", str(tmp_path / "p.png"), "--base", str(sd15.folder), "--lorad", str(sd15.lorad)]
    words += ["--precision", "exact", "--device", "cpu", "--timings"]
    assert main([*words, "--vae", str(files["folder"])]) == 0
    told = capsys.readouterr().out
    assert "exact precision" in told
    assert all(f"{stage} " in told.splitlines()[-1] for stage in ("text", "network", "decode", "pictures", "files"))
    with Image.open(tmp_path / "p.png") as picture:
        assert largest_difference(picture, sd15.load(vae=files["folder"])("a cat").images[0]) <= 1


def test_wadi_get_fetches_it(files: dict[str, Path], tmp_path: Path) -> None:
    repo, _, file = catalog.DECODERS["taesd"].partition(":")
    with hub_server.running({repo: Repository({file: files["author's"], "taesd_encoder.safetensors": b"not wanted"})}) as hub:
        got = hub.wadi(tmp_path, "get", "taesd", "-o", tmp_path / "tiny.safetensors")
        assert got.returncode == 0, got.stderr
        assert hub.downloads("taesd_encoder.safetensors") == 0
        assert (tmp_path / "tiny.safetensors").read_bytes() == files["author's"].read_bytes()
        assert "--vae" in got.stdout
        (tmp_path / "tiny.safetensors").write_bytes(b"something else")
        again = hub.wadi(tmp_path, "get", "taesd", "-o", tmp_path / "tiny.safetensors")
        assert again.returncode == 1 and "another file is there" in again.stderr
        (tmp_path / "host" / "models").mkdir(parents=True)
        (tmp_path / "host" / "main.py").touch()
        assert hub.wadi(tmp_path, "get", "taesd", "--comfyui", tmp_path / "host").returncode == 0
    assert (tmp_path / "host" / "models" / "vae_approx" / file).read_bytes() == files["author's"].read_bytes()


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("vae", {"decoder.conv_in.weight": (8, 4, 3, 3)}, "this is no tiny decoder"),
        ("flux", {"1.weight": (8, 16, 3, 3)}, "this is no tiny decoder"),
        ("encoder", {"0.weight": (8, 3, 3, 3), "1.conv.0.weight": (8, 8, 3, 3)}, "this is no tiny decoder"),
        ("words", {"": (1,)}, "this is no tiny decoder"),
    ],
)
def test_other_files_are_refused(
    sd15: Kit, tmp_path: Path, name: str, tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    path = tmp_path / f"{name}.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, path)
    pipe = sd15.load()
    with pytest.raises(ValueError, match="this is no tiny decoder") as caught:
        pipe.set_vae(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and pipe.tiny is None


def test_a_decoder_with_a_layer_missing_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(files["author's"])
    del state["3.conv.2.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"layers.2.conv.2.weight is missing"):
        tiny.load(tmp_path / "less.safetensors", CPU, torch.float32)
    (tmp_path / "old.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="safetensors only"):
        tiny.load(tmp_path / "old.pth", CPU, torch.float32)
