"""wadi-mini written as A1111 loads it: the checkpoint against an independent writer and the core's own reader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import networks
import pytest
import torch

from wadi_core import OneStepPipeline, configs, mini
from wadi_core.lorad import layouts
from wadi_core.lorad.checkpoint import read_header, read_tensors
from wadi_core.lorad.layers import linear_shapes
from wadi_core.mini import export as exporting
from wadi_core.mini import ldm

yaml = pytest.importorskip("yaml")


def random_folder(folder: Path, architecture: str = "wadi-mini", changes: dict[str, Any] | None = None) -> Path:
    """A base with random weights, and an adapter for it under the name of wadi-mini's."""
    networks.write_settings(folder, architecture, changes)
    made = networks.make_networks(folder)
    weights = {part: {k: t.half() for k, t in state.items()} for part, state in networks.states(made).items()}
    networks.write_folder(folder, weights)
    networks.random_lorad(made["unet"]).save(folder / mini.LORAD)
    return folder


@pytest.fixture
def random_mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mini, "FOLDER", random_folder(tmp_path / "mini"))
    return mini.FOLDER


def test_the_checkpoint_has_the_names_and_bits_that_others_write(random_mini: Path, tmp_path: Path) -> None:
    written = exporting.export(tmp_path / "out")
    weights = mini.state_dicts()
    weights["text_encoder"] = {k.removeprefix("text_model."): t for k, t in weights["text_encoder"].items()}
    reference = networks.write_single_file(tmp_path / "reference.safetensors", weights, random_mini)
    ours, theirs = (read_tensors(read_header(path)) for path in (written.checkpoint, reference))
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("position_ids")}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_core_draws_the_same_from_it(random_mini: Path, tmp_path: Path) -> None:
    written = exporting.export(tmp_path / "models" / "Stable-diffusion", tmp_path / "models" / "Lora")
    assert list(written) == [written.checkpoint, written.settings, written.text_encoder, written.lorad]
    made = [
        OneStepPipeline.from_pretrained(base, lorad=lorad, device="cpu", precision="exact")("a cat", seed=3).images[0].tobytes()
        for base, lorad in (("mini", mini.lorad_path()), (written.checkpoint, written.lorad))
    ]
    assert made[0] == made[1]


def test_both_directions_of_names_agree(random_mini: Path, tmp_path: Path) -> None:
    """What layouts reads out of the exported names is what the names were made of."""
    found = layouts.detect(read_header(exporting.export(tmp_path / "out").checkpoint).shapes)
    settings = configs.read(random_mini / "unet" / "config.json")
    shapes = linear_shapes(read_header(random_mini / mini.WEIGHTS["unet"]).shapes)
    assert (found.name, found.architecture) == ("ldm", "wadi-mini")
    assert found.shapes == shapes
    for path, place in found.places.items():
        assert place.name == f"{ldm.PREFIXES['unet']}{ldm.unet_layer(path, settings)}.weight"


def test_the_settings_file_describes_the_networks(random_mini: Path, tmp_path: Path) -> None:
    written = exporting.export(tmp_path / "out")
    model = yaml.safe_load(written.settings.read_text(encoding="utf-8"))["model"]["params"]
    unet, vae = model["unet_config"]["params"], model["first_stage_config"]["params"]["ddconfig"]
    own = {part: configs.read(random_mini / part / "config.json") for part in ("unet", "vae")}
    widths = [unet["model_channels"] * factor for factor in unet["channel_mult"]]
    assert widths == own["unet"]["block_out_channels"]
    assert unet["attention_resolutions"] == [1, 2] and unet["num_heads"] == own["unet"]["attention_head_dim"]
    assert unet["context_dim"] == own["unet"]["cross_attention_dim"] and unet["num_res_blocks"] == 1
    assert [vae["ch"] * factor for factor in vae["ch_mult"]] == own["vae"]["block_out_channels"]
    assert model["scale_factor"] == own["vae"]["scaling_factor"]
    assert (model["linear_start"], model["linear_end"], "parameterization" in model) == (0.00085, 0.012, False)
    assert model["cond_stage_config"]["params"] == {"folder": written.text_encoder.name}
    assert str(tmp_path) not in written.settings.read_text(encoding="utf-8")  # the folders can be moved
    assert written.text_encoder.parent == written.checkpoint.parent
    assert {path.name for path in written.text_encoder.iterdir()} == {"config.json", *exporting.TOKENIZER_FILES}


def test_a_base_that_predicts_velocity_says_so(tmp_path: Path) -> None:
    folder = random_folder(tmp_path / "base", "sd15", networks.small_settings("sd15"))
    schedule = folder / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps({**configs.read(schedule), "prediction_type": "v_prediction"}))
    written = exporting.export(tmp_path / "out", base=folder, name="mine")
    model = yaml.safe_load(written.settings.read_text(encoding="utf-8"))["model"]["params"]
    assert model["parameterization"] == "v"
    assert [path.name for path in written] == ["mine.safetensors", "mine.yaml", "mine-text-encoder"]


def test_again_it_replaces_what_is_there(random_mini: Path, tmp_path: Path) -> None:
    first = exporting.export(tmp_path / "out", tmp_path / "loras")
    bits = {path: path.read_bytes() for path in first if path.is_file()}
    first.checkpoint.write_bytes(b"damaged")
    assert {
        path: path.read_bytes() for path in exporting.export(tmp_path / "out", tmp_path / "loras") if path.is_file()
    } == bits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder": {"hidden_act": "gelu"}}, "only bases with OpenAI's CLIP"),
        ({"scheduler": {"beta_schedule": "linear"}}, "knows no schedule linear"),
        ({"unet": {"block_out_channels": [64, 96]}}, "multiples of the first"),
        ({"unet": {"attention_head_dim": [1, 2]}}, "same number of heads"),
    ],
)
def test_what_the_layout_has_no_words_for_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    small = networks.small_settings("sd15")
    folder = random_folder(tmp_path / "base", "sd15", small)
    for part, values in changes.items():
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps({**configs.read(path), **values}))
    with pytest.raises(ValueError, match=message):
        exporting.export(tmp_path / "out", base=folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer", ["mid_block.resnets", "down_blocks.0.motion_modules.0.proj_in"])
def test_names_of_other_networks_are_refused(layer: str) -> None:
    with pytest.raises(ValueError, match="no layer of this name"):
        ldm.unet_layer(layer, configs.read(configs.folder("sd15") / "unet" / "config.json"))
    with pytest.raises(ValueError, match="no layer of this name"):
        ldm.vae_layer(layer, 4)


def test_the_command_line_needs_neither_diffusers_nor_transformers(random_mini: Path, tmp_path: Path) -> None:
    root = Path(mini.__file__).parents[2]
    copy = shutil.copytree(root / "wadi_core", tmp_path / "copy" / "wadi_core", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(random_mini, copy / "mini", dirs_exist_ok=True)
    code = (
        "import sys; sys.modules.update(diffusers=None, transformers=None)\n"
        "from wadi_core.mini.export import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--checkpoints", str(tmp_path / "models"), "--loras", str(tmp_path / "loras")]
    result = subprocess.run(command, cwd=copy.parent, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == [
        *(str(tmp_path / "models" / name) for name in ("wadi-mini.safetensors", "wadi-mini.yaml", "wadi-mini-text-encoder")),
        str(tmp_path / "loras" / mini.LORAD),
    ]
    (copy / "mini" / mini.LORAD).unlink()
    result = subprocess.run(command, cwd=copy.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.startswith("wadi: ") and result.stderr.count("\n") == 1
