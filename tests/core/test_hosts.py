"""Host programs on the disk: where they look, what they have, and the checkpoint that is written where one is missing."""

from __future__ import annotations

import os
from pathlib import Path

import networks
import pytest
import torch
from pipeline_kit import Kit
from torch import Tensor

from wadi_core import base as bases
from wadi_core import checkpoint_writer, configs, hosts
from wadi_core.lorad.checkpoint import read_header, read_tensors, write_safetensors
from wadi_core.single_file import renamed

pytestmark = pytest.mark.usefixtures("no_network")

ENTRY = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A folder of ComfyUI."""
    folder = tmp_path / "ComfyUI"
    (folder / "models" / "checkpoints").mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


def test_comfyuis_list_of_paths_is_read_as_comfyui_does(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = program / "models"
    assert hosts.comfyui(program).checkpoints == (own / "checkpoints",)
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    (program / hosts.EXTRA_PATHS).write_text(
        "#comfyui:\n#  checkpoints: nowhere\n"
        "a111:\n    base_path: $DISK/webui/\n    checkpoints: models/Stable-diffusion\n    vae: models/VAE\n"
        "more:\n    checkpoints: |\n        shared\n        /absolute/place\n"
        "mine:\n    is_default: true\n    base_path: ../mine\n    checkpoints: ckpt\n    lorad: lorad\n"
        "empty:\njunk: [1, 2]\n"
    )
    found = hosts.comfyui(program)
    expected = (program / "../mine/ckpt", own / "checkpoints", tmp_path / "disk/webui/models/Stable-diffusion",
                program / "shared", Path("/absolute/place"))  # fmt: skip
    assert (found.checkpoints, found.lorads) == (expected, program / "../mine/lorad")
    (program / hosts.EXTRA_PATHS).write_text("# nothing but a comment\n")
    assert hosts.comfyui(program).checkpoints == (own / "checkpoints",)


@pytest.mark.parametrize("text", [b"a: [1,\nb: 2", b"\xff\xfe", b"a:\n\tb: c\n"], ids=["open list", "no text", "tabs"])
def test_a_list_that_is_no_yaml_is_one_line(text: bytes, program: Path) -> None:
    (program / hosts.EXTRA_PATHS).write_bytes(text)
    with pytest.raises(ValueError, match=r"extra_model_paths\.yaml: this is no YAML") as caught:
        hosts.comfyui(program)
    assert "\n" not in str(caught.value)


def test_a_folder_of_models_alone_is_a_program_too(tmp_path: Path) -> None:
    (tmp_path / "data" / "models" / "Stable-diffusion").mkdir(parents=True)
    found = hosts.webui(tmp_path / "data")
    assert found.lorads == tmp_path / "data" / "models" / "LoRaD"
    assert found.checkpoints == (tmp_path / "data" / "models" / "Stable-diffusion",)
    with pytest.raises(OSError, match=r"is no folder of ComfyUI: there is no main\.py"):
        hosts.comfyui(tmp_path / "data")


def test_a_checkpoint_is_known_by_what_is_in_it(sd15: Kit, program: Path) -> None:
    content = read_tensors(read_header(sd15.single_file))
    places = hosts.comfyui(program)
    folder = places.checkpoints[0] / "sub"
    folder.mkdir()
    unet = {name: tensor for name, tensor in content.items() if name.startswith("model.diffusion_model.")}
    others: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
        "a-v-prediction": ({**content, "v_pred": torch.empty(0)}, {}),
        "b-inpainting": ({**content, ENTRY: torch.zeros(32, 9, 3, 3)}, {}),
        "c-one-step": (content, {"wadi.alpha_T_squared": "0.0047", "wadi.timestep": "999"}),
        "d-vae": ({name: tensor for name, tensor in content.items() if name not in unet}, {}),
    }
    for name, (tensors, metadata) in others.items():
        write_safetensors(folder / f"{name}.safetensors", tensors, metadata)
    (folder / "e.safetensors").write_text("a download that failed")
    assert hosts.checkpoint_of(places, "unet-custom", "epsilon") is None
    os.link(sd15.single_file, folder / "z.safetensors")
    assert hosts.checkpoint_of(places, "unet-custom", "epsilon") == folder / "z.safetensors"
    assert hosts.checkpoint_of(places, "sd15", "epsilon") is None


def test_the_checkpoint_of_a_folder_is_that_folder(sd15: Kit, tmp_path: Path) -> None:
    folder = networks.write_settings(tmp_path / "base", "sd15", networks.small_settings("sd15"))
    weights = networks.states(networks.make_networks(folder))
    old = {new: before for before, new in bases.OLD_ATTENTION.items()}  # as the published folders have them
    weights["vae"] = {renamed(name, old): tensor for name, tensor in weights["vae"].items()}
    networks.write_folder(folder, weights)
    assert checkpoint_writer.can_be_one_file(folder)
    assert not checkpoint_writer.can_be_one_file(configs.folder("sd21"))
    told: list[tuple[int, int]] = []
    checkpoint_writer.write(
        checkpoint_writer.entries_of(folder), tmp_path / "one.safetensors", "a base", lambda *done: told.append(done)
    )
    assert told[-1][0] == told[-1][1]
    found = bases.load(tmp_path / "one.safetensors", torch.device("cpu"), torch.float32, folder)
    expected = bases.load(folder, torch.device("cpu"), torch.float32)
    for part in bases.PARTS:
        theirs = getattr(found, part).state_dict()
        for name, tensor in getattr(expected, part).state_dict().items():
            assert torch.equal(theirs[name], tensor.half().float()), name


def test_a_number_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    folder, _ = networks.write_base(tmp_path / "base")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = read_tensors(read_header(file))
    state["conv_out.bias"][0] = 1e6
    write_safetensors(file, state)
    with pytest.raises(ValueError, match=r"conv_out\.bias is too large for float16"):
        checkpoint_writer.write(checkpoint_writer.entries_of(folder), tmp_path / "one.safetensors", "a base")
    assert not (tmp_path / "one.safetensors").exists()
