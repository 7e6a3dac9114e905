"""The training of wadi-mini's ControlNet: its data, its steps, and that a stopped run goes on as if it had not been."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from lorad_networks import MINI

from trainer.mini import controlnet as training
from trainer.mini import denoising, export, scenes
from trainer.mini.controlnet import ControlNetConfig, Scenes, draw_batch, partial_caption
from trainer.mini.edges import agreement, edges, pack, unpack
from trainer.settings import fields as settings
from wadi_core import base as bases
from wadi_core import control, mini
from wadi_core.files import sha256_of_file
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.pictures import to_tensor

# Widths of three channels a group, as the starting values need them; otherwise as small as can be.
TINY = {
    "unet": {
        "block_out_channels": [96, 96],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 32,
        "layers_per_block": 1,
        "sample_size": 16,
        "attention_head_dim": 2,
    },
    "vae": networks.TINY["vae"],
    "text_encoder": networks.TINY["text_encoder"],
}
SHARD = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return networks.write_base(tmp_path_factory.mktemp("tiny") / "base", "sd15", TINY)[0]


@pytest.fixture
def config(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ControlNetConfig:
    """Settings of a tiny run, with two shards of latents of its own autoencoder."""
    for module in (training, __import__("trainer.mini.latents", fromlist=["SHARD"])):
        monkeypatch.setattr(module, "SHARD", SHARD)
    monkeypatch.setattr(training, "SHEET_SCENES", 2)
    monkeypatch.setattr(training, "many_steps", lambda unet, z, text, null, **_: unet(z, 999, text).sample)
    loaded = bases.load(base, torch.device("cpu"), torch.float32)
    (tmp_path / "latents").mkdir()
    for index in range(2):
        plans = [scenes.scene(seed) for seed in range(index * SHARD, (index + 1) * SHARD)]
        with torch.no_grad():
            means = loaded.vae.encode(to_tensor([scenes.draw(plan) for plan in plans])).latent_dist.mean
        tensors = {"latents": (means * loaded.vae.config.scaling_factor).half()}
        captions = {"captions": json.dumps([plan.caption for plan in plans])}
        write_safetensors(tmp_path / "latents" / f"shard-{index:03d}.safetensors", tensors, captions)
    return ControlNetConfig(
        base=str(base),
        latents=str(tmp_path / "latents"),
        maps=str(tmp_path / "maps"),
        output=str(tmp_path / "run"),
        steps=4,
        batch=2,
        warmup=1,
        save_every=2,
        sheet_every=100,
    )


# --- edges -----------------------------------------------------------------------------------------------------------


def test_edges_come_back_from_their_bits() -> None:
    found = edges(scenes.draw(scenes.scene(seed)) for seed in range(3))
    assert found.shape == (3, 128, 128) and 0.01 < found.float().mean() < 0.3
    assert pack(found).shape == (3, 128, 16)
    assert torch.equal(unpack(pack(found)), found)


def test_agreement_forgives_what_is_near() -> None:
    line = torch.zeros(1, 32, 32, dtype=torch.bool)
    line[0, 10, 4:28] = True
    assert agreement(line, line) == 1
    assert agreement(line.roll(1, 1), line, tolerance=1) == 1
    assert agreement(line.roll(2, 1), line, tolerance=1) == 0 and agreement(line.roll(2, 1), line, tolerance=2) == 1
    nothing = torch.zeros_like(line)
    assert agreement(nothing, nothing) == 1 and agreement(nothing, line) == 0 and agreement(line, nothing) == 0
    both = line | line.roll(12, 1)
    assert agreement(both, line).item() == pytest.approx(2 / 3)  # precision a half, recall one
    assert agreement(line, both).item() == pytest.approx(2 / 3)
    assert agreement(torch.cat([line, nothing]), torch.cat([line, line])).tolist() == [1, 0]


# --- data ------------------------------------------------------------------------------------------------------------


def test_captions_that_tell_a_part() -> None:
    plan = scenes.scene(4, pair=True)
    names = [item.thing.phrase for item in plan.placed]
    assert [partial_caption(plan, which) for which in (0, 1, 2)] == [names[0], names[1], names[0]]
    single = scenes.scene(4, pair=False)
    assert partial_caption(single, 1) == single.caption


def test_maps_are_made_once_and_belong_to_their_latents(config: ControlNetConfig, base: Path) -> None:
    tokenizer = bases.load(base, torch.device("cpu"), torch.float32).tokenizer
    data = Scenes.read(config, tokenizer)
    assert len(data) == 2 * SHARD and data.first == 0
    for row in (0, 30):
        assert torch.equal(unpack(data.maps[row : row + 1]), edges([scenes.draw(scenes.scene(row))]))
    differing = (data.ids != data.part_ids).any(1)
    pairs = torch.tensor([len(scenes.scene(seed).placed) == 2 for seed in range(2 * SHARD)])
    assert torch.equal(differing, pairs)
    files = sorted(Path(config.maps).iterdir())
    hashes = [sha256_of_file(path) for path in files]
    again = Scenes.read(config, tokenizer)
    assert torch.equal(again.maps, data.maps) and [sha256_of_file(path) for path in files] == hashes


def test_a_mirrored_scene_has_a_mirrored_map(config: ControlNetConfig) -> None:
    one = torch.arange(128).expand(1, 128, 128) < 40
    latents = torch.arange(16.0).expand(1, 4, 16, 16).half()
    data = Scenes(latents, pack(one), torch.ones(1, 77, dtype=torch.long), torch.full((1, 77), 2))
    null = torch.zeros(77, dtype=torch.long)
    torch.manual_seed(0)
    batch = draw_batch(data, null, replace(config, batch=200))
    assert batch.maps.shape == (200, 3, 128, 128)
    mirrored = batch.x0[:, 0, 0, 0] == 15
    assert 60 < mirrored.sum() < 140
    assert torch.equal(batch.maps[:, 0, 0, 0] == 0, mirrored)
    counts = [(batch.ids[:, 0] == token).sum().item() / 200 for token in range(3)]
    assert counts == pytest.approx([0.1, 0.6, 0.3], abs=0.12)


def test_latents_of_another_autoencoder_are_refused(config: ControlNetConfig, base: Path) -> None:
    loaded = bases.load(base, torch.device("cpu"), torch.float32)
    data = Scenes.read(config, loaded.tokenizer)
    training.check_latents(loaded.vae, data)
    with pytest.raises(ValueError, match="made by another autoencoder"):
        training.check_latents(loaded.vae, replace(data, latents=data.latents.roll(1, 1) + 1))


# --- training --------------------------------------------------------------------------------------------------------


def test_only_the_controlnet_learns_and_it_begins_as_nothing(config: ControlNetConfig, base: Path) -> None:
    loaded = bases.load(base, torch.device("cpu"), torch.float32)
    data = Scenes.read(config, loaded.tokenizer)
    made = training.make_controlnet(loaded.unet)
    batch = draw_batch(data, data.ids[0], config)
    x, t = torch.randn_like(batch.x0), torch.tensor([999, 500])
    found = training.predict(loaded, made, batch, x, t)
    text = loaded.text_encoder(batch.ids).last_hidden_state
    assert torch.allclose(found, loaded.unet(x, t, text).sample, atol=1e-5)
    found.square().mean().backward()
    assert all(parameter.grad is None for parameter in loaded.unet.parameters())
    reached = {name for name, parameter in made.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert any(name.startswith("controlnet_down_blocks.0") for name in reached)
    assert not any("downsamplers" in name for name in reached)


def test_a_run_and_one_that_was_stopped(config: ControlNetConfig, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training.run(config)
    output = Path(config.output)
    assert {path.name for path in output.iterdir()} >= {"losses.csv", "losses.png", "controlnet", "sheet-000004.png"}
    whole = control.load(output / "controlnet", bases.load(base, torch.device("cpu"), torch.float32), *CPU).network
    assert "f1_1_step" in (output / "losses.csv").read_text().splitlines()[0]

    stopped = replace(config, output=f"{config.output}-stopped")
    update = denoising.update_average
    calls: list[int] = []

    def killed(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        update(*arguments)

    monkeypatch.setattr(denoising, "update_average", killed)
    with pytest.raises(KeyboardInterrupt):
        training.run(stopped)
    monkeypatch.setattr(denoising, "update_average", update)
    training.run(stopped)
    again = control.load(Path(stopped.output) / "controlnet", bases.load(base, *CPU), *CPU).network
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


CPU = (torch.device("cpu"), torch.float32)


def test_the_committed_settings_are_understood() -> None:
    config = settings.load(ControlNetConfig, "trainer/configs/mini-controlnet.yaml")
    assert (config.base, config.batch) == ("mini", 64)


def test_the_real_size_fits_into_the_package(tmp_path: Path) -> None:
    """At most 14 MB, and the exported folder is what the pipeline loads."""
    from diffusers import UNet2DConditionModel

    made = training.make_controlnet(UNet2DConditionModel(**MINI))
    assert sum(parameter.numel() for parameter in made.parameters()) == 6_152_272
    made.save_pretrained(tmp_path / "trained")
    export.export_part(tmp_path / "trained", "controlnet", tmp_path / "package")
    weights = tmp_path / "package" / mini.CONTROL / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 14e6
    settings_of_it = json.loads((weights.parent / "config.json").read_text())
    assert settings_of_it["_class_name"] == "ControlNetModel" and "_diffusers_version" not in settings_of_it


def test_what_was_learned_is_put_where_the_package_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("left-of", "sks-hibiscus"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    words = ["--word", str(tmp_path / "left-of.safetensors"), "--adapter", str(tmp_path / "sks-hibiscus.safetensors")]
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr("sys.argv", ["export", *words, "--output", str(package)])
    export.main()
    assert (package / mini.EMBEDDINGS / "left-of.safetensors").read_bytes() == b"left-of"
    assert (package / mini.ADAPTERS / "wadi-mini-sks-hibiscus.safetensors").read_bytes() == b"sks-hibiscus"
