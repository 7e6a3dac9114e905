"""wadi-mini as it comes with the package: where it is, what it is made of, and that it draws."""

from __future__ import annotations

import shutil
from pathlib import Path

import networks
import pytest
import torch
from pipeline_kit import largest_difference

from wadi_core import LoRaD, OneStepPipeline, building, configs, mini
from wadi_core import base as bases
from wadi_core.pipeline import noise

BUDGET = 80_000_000  # bytes of all weights together
INSTALLED = all((mini.FOLDER / name).is_file() for name in (*mini.WEIGHTS.values(), mini.LORAD))
needs_weights = pytest.mark.skipif(not INSTALLED, reason="the trained weights are not in this checkout")


@pytest.fixture
def random_mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights where the package keeps its own."""
    folder = networks.write_settings(tmp_path / "mini", "wadi-mini")
    made = networks.make_networks(folder)
    weights = {part: {k: t.half() for k, t in state.items()} for part, state in networks.states(made).items()}
    networks.write_folder(folder, weights)
    networks.random_lorad(made["unet"]).save(folder / mini.LORAD)
    monkeypatch.setattr(mini, "FOLDER", folder)
    return folder


def test_settings_are_those_of_a_small_stable_diffusion() -> None:
    unet, vae, text = (configs.read(mini.FOLDER / part / "config.json") for part in bases.PARTS)
    sd15 = configs.read(configs.folder("sd15") / "unet" / "config.json")
    assert unet["down_block_types"] == ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    assert unet["up_block_types"] == ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    for name in ("in_channels", "out_channels", "norm_num_groups", "flip_sin_to_cos", "use_linear_projection"):
        assert unet.get(name, False) == sd15[name]
    assert all(width % 32 == 0 for width in unet["block_out_channels"] + vae["block_out_channels"])
    assert len(vae["block_out_channels"]) == 4 and vae["latent_channels"] == 4
    assert unet["sample_size"] * 8 == vae["sample_size"] == 128
    assert unet["cross_attention_dim"] == text["hidden_size"] and text["vocab_size"] == 49408
    schedule = configs.read(mini.FOLDER / "scheduler" / "scheduler_config.json")
    assert (schedule["beta_schedule"], schedule["prediction_type"]) == ("scaled_linear", "epsilon")
    assert (schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"]) == (0.00085, 0.012, 1000)
    assert schedule["timestep_spacing"] == "trailing"  # one step of any scheduler starts at the last timestep


def test_one_copy_of_the_vocabulary_serves_all() -> None:
    for name in ("vocab.json", "merges.txt"):
        assert [path.parent for path in configs.HERE.parent.rglob(name)] == [configs.TOKENIZER]
    assert len(configs.read(configs.TOKENIZER / "vocab.json")) == 49408


def test_parameters_of_the_networks_stay_in_the_budget() -> None:
    folder = configs.folder("wadi-mini")
    made = [building.empty_network(part, folder / part / "config.json") for part in bases.PARTS]
    assert 2 * sum(p.numel() for network in made for p in network.parameters()) < BUDGET


def test_by_its_name_it_is_loaded_with_its_adapter(random_mini: Path) -> None:
    pipe = OneStepPipeline.from_pretrained(device="cpu", precision="exact")
    assert pipe.base.name == "mini" and pipe.base.architecture == "wadi-mini" and pipe.native_size == (128, 128)
    assert [adapter.file for adapter in pipe.adapters] == [mini.LORAD]
    assert pipe("a red apple").images[0].size == (128, 128)
    assert OneStepPipeline.from_pretrained("mini", lorad=[], device="cpu", precision="exact").adapters == ()


def test_as_a_single_file_it_is_recognised(random_mini: Path, tmp_path: Path) -> None:
    weights = mini.state_dicts()
    weights["text_encoder"] = {k.removeprefix("text_model."): t for k, t in weights["text_encoder"].items()}
    file = networks.write_single_file(tmp_path / "mini.safetensors", weights, random_mini)
    made = [
        OneStepPipeline.from_pretrained(base, lorad=mini.lorad_path(), device="cpu", precision="exact")("a cat", seed=3)
        .images[0]
        .tobytes()
        for base in ("mini", file)
    ]
    assert made[0] == made[1]


def test_plain_tensors_have_the_usual_names(random_mini: Path) -> None:
    weights = mini.state_dicts()
    assert set(weights) == {"unet", "vae", "text_encoder"}
    assert all(name.startswith("text_model.") for name in weights["text_encoder"])
    assert {t.dtype for state in weights.values() for t in state.values()} == {torch.float16}
    assert weights["unet"]["conv_in.weight"].shape[1:] == (4, 3, 3)


@pytest.mark.parametrize("name", [*mini.WEIGHTS.values(), mini.LORAD])
def test_what_is_missing_is_named_in_one_line(random_mini: Path, name: str) -> None:
    (random_mini / name).unlink()
    with pytest.raises(OSError, match="this file of wadi-mini is missing") as caught:
        OneStepPipeline.from_pretrained(device="cpu", precision="exact")
    assert name in str(caught.value) and "\n" not in str(caught.value)


@needs_weights
def test_the_trained_weights_fit_and_are_small() -> None:
    files = [path for path in mini.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= BUDGET
    assert {t.dtype for state in mini.state_dicts().values() for t in state.values()} == {torch.float16}
    match = LoRaD.load(mini.lorad_path()).matched(bases.unet_shapes("mini"))
    assert (len(match.paths), match.layers, match.architecture, match.problems) == (81, 81, "wadi-mini", ())
    assert (mini.FOLDER / "README.md").is_file()


@needs_weights
def test_the_trained_student_draws_different_pictures_for_different_words() -> None:
    pipe = OneStepPipeline.from_pretrained(device="cpu", precision="exact")
    made = pipe(["a red apple on a white background", "a rocket on a black background"], seeds=[1, 1], return_latents=True)
    light, dark = (image.convert("L").resize((1, 1)).getpixel((0, 0)) for image in made.images)
    assert light > dark + 40
    assert made.latents.isfinite().all()


@needs_weights
def test_diffusers_own_pipeline_draws_the_same_from_the_folder_as_it_is() -> None:
    from diffusers import StableDiffusionPipeline

    prompts = ["a red apple", "a cat and a bicycle"]
    stock = StableDiffusionPipeline.from_pretrained(mini.folder(), local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    assert stock.tokenizer("a red apple").input_ids == [49406, 320, 736, 3055, 49407]
    ours = OneStepPipeline.from_pretrained(device="cpu", precision="exact")(prompts, seed=3).images
    LoRaD.load(mini.lorad_path()).fuse_into(stock.unet)
    z = noise([3, 4], 128, 128)
    theirs = stock(prompts, num_inference_steps=1, guidance_scale=1.0, latents=z).images
    assert max(map(largest_difference, ours, theirs)) <= 2


@needs_weights
def test_diffusers_own_pipeline_draws_the_teachers_pictures_in_25_steps_too() -> None:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from trainer.models.generators import load_generator

    stock = StableDiffusionPipeline.from_pretrained(mini.folder(), local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    theirs = stock("two owls", num_inference_steps=25, guidance_scale=3.0, latents=noise([7], 128, 128)).images[0]
    ours = load_generator("mini", device="cpu", steps=25, guidance=3.0).pictures(["two owls"], [7])[0]
    assert largest_difference(ours, theirs) <= 2


@needs_weights
def test_a_copy_can_be_used_like_any_folder(tmp_path: Path) -> None:
    copy = shutil.copytree(mini.FOLDER, tmp_path / "copy", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    pipe = OneStepPipeline.from_pretrained(copy, lorad=mini.lorad_path(), device="cpu", precision="exact")
    reference = OneStepPipeline.from_pretrained(device="cpu", precision="exact")
    assert pipe("a cat").images[0].tobytes() == reference("a cat").images[0].tobytes()
