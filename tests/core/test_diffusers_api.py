"""Our own pipeline in the words of diffusers: what stock pipelines draw from generators, and every way to say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_kit import Kit, equal, largest_difference, make_kit, weights_of
from stock_pipelines import mini_parts, stock

from wadi_core import OneStep, OneStepPipeline, mini, pictures
from wadi_core.pipeline import noise
from wadi_core.scheduler import OneStepScheduler, load_lorad

pytestmark = pytest.mark.usefixtures("no_network")
PROMPT = "a red apple"


@pytest.fixture(scope="module")
def ours() -> OneStepPipeline:
    return OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")


@pytest.fixture(scope="module")
def theirs() -> Any:
    pipe = stock(mini_parts())
    load_lorad(pipe, mini.lorad_path())
    return pipe


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "asked",
    [
        lambda: {"prompt": PROMPT, "generator": generator(7)},
        lambda: {"prompt": [PROMPT, "a cat"], "generator": generator(3)},
        lambda: {"prompt": [PROMPT, "a cat"], "generator": [generator(3), generator(9)]},
        lambda: {"prompt": [PROMPT, "a cat"], "generator": generator(3), "num_images_per_prompt": 3},
        lambda: {"prompt": PROMPT, "latents": noise([5, 6], 128, 128), "num_images_per_prompt": 2},
        lambda: {"prompt": PROMPT, "generator": generator(1), "width": 96, "height": 64},
    ],
    ids=["one", "batch", "generators", "several-of-each", "latents", "size"],
)
def test_pictures_are_those_of_the_stock_pipeline(asked: Any, ours: OneStepPipeline, theirs: Any) -> None:
    one, other = ours(**asked()).images, theirs(**asked()).images
    assert len(one) == len(other)
    assert all(largest_difference(a, b) <= 1 for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_forms_are_those_of_the_stock_pipeline(output_type: str, ours: OneStepPipeline, theirs: Any) -> None:
    asked = {"prompt": [PROMPT, "a cat"], "output_type": output_type}
    one = ours(**asked, generator=generator(2), batch=1).images
    other = theirs(**asked, generator=generator(2)).images
    assert type(one) is type(other) and one.shape == other.shape and one.dtype == other.dtype
    assert np.abs(np.asarray(one) - np.asarray(other)).max() < (1e-2 if output_type == "latent" else 1 / 255)


@pytest.mark.parametrize(
    "source, seeds",
    [
        (lambda: {"seed": 4}, [4, 5]),
        (lambda: {"generator": generator(4)}, [4, None]),  # the second picture's noise is the generator's next
        (lambda: {"generator": [generator(4), generator(11)]}, [4, 11]),
        (lambda: {"generator": [generator(4), used(11)]}, [4, None]),
        (lambda: {"latents": noise([4, 5], 128, 128)}, [None, None]),
    ],
    ids=["seed", "generator", "generators", "used", "latents"],
)
def test_a_picture_names_a_seed_only_where_it_makes_the_picture_again(
    source: Any, seeds: list[int | None], ours: OneStepPipeline, tmp_path: Path
) -> None:
    made = ours(prompt=[PROMPT, "a cat"], **source())
    for path, image, seed in zip(made.save(tmp_path / "p.png"), made.images, seeds, strict=True):
        said = pictures.read_settings(path)
        assert said.seed == seed
        with Image.open(path) as picture:
            assert ("Seed:" in picture.info[pictures.TEXT_KEY]) is (seed is not None)
        if seed is None:
            with pytest.raises(ValueError, match="no seed makes it again"):
                next(ours.run([said]))
        else:
            assert largest_difference(next(ours.run([said])).images[0], image) <= 1


def used(seed: int) -> torch.Generator:
    one = generator(seed)
    torch.randn(16, generator=one)
    return one


@pytest.mark.parametrize(
    "options, message",
    [
        ({"negative_prompt": ["", "blue"]}, "there are 1 pictures and 2 negative prompts"),
        ({"negative_prompt": 7}, "must be a text or a list of texts, not int"),
        ({"negative_prompt": [["blue", 7]]}, "must be a text, not 7"),
        ({"negative_prompt": "blue", "negative_scale": -1.0}, "negative scale must lie from 0 to 30"),
        ({"negative_prompt": "blue", "negative_scale": float("nan")}, "negative scale must lie from 0 to 30"),
        ({"negative_prompt": "blue", "negative_method": "cfg"}, "works by one of nag, nasa"),
        ({"num_inference_steps": 4}, "num_inference_steps must be 1"),
        ({"guidance_scale": 7.5}, "guidance_scale must be 1"),
        ({"output_type": "jpg"}, "output_type must be one of pil, np, pt, latent, not 'jpg'"),
        ({"prompts": "a cat"}, "two names for the same"),
        ({"prompt": None}, "prompts must be a text or a list of texts, not NoneType"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number"),
        ({"generator": 7}, "generator must be a torch.Generator"),
        ({"generator": [generator(1), generator(2)]}, "1 pictures and 2 generators"),
        ({"generator": generator(1), "seed": 3}, "three sources of noise"),
        ({"generator": generator(1), "seeds": [3]}, "three sources of noise"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, r"latents of \(1, 4, 16, 16\) are needed"),
        ({"latents": torch.zeros(1, 3, 16, 16)}, r"latents of \(1, 4, 16, 16\) are needed"),
        ({"latents": torch.zeros(4, 16, 16)}, "latents must be a tensor of"),
        ({"latents": torch.zeros(1, 4, 16, 16), "width": 64}, "128x128 pixels, not for 64x"),
        ({"seed": None}, "seed must be of type int"),
    ],
)
def test_what_is_refused_in_one_line(ours: OneStepPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ours(**{"prompt": PROMPT, **options})
    assert "\n" not in str(caught.value)


def test_what_one_step_has_anyway_may_be_said(ours: OneStepPipeline) -> None:
    said = ours(PROMPT, seed=3, negative_prompt="", num_inference_steps=1, guidance_scale=0.0).images[0]
    assert said.tobytes() == ours(PROMPT, seed=3).images[0].tobytes()


def test_numbers_are_no_pictures_to_save(ours: OneStepPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='output_type="pil"'):
        ours(PROMPT, output_type="pt").save(tmp_path / "p.png")


@pytest.mark.parametrize(
    "places, options, dtype",
    [
        (("cpu",), {}, torch.float32),
        ((torch.bfloat16,), {}, torch.bfloat16),
        (("cpu", torch.bfloat16), {}, torch.bfloat16),
        ((torch.bfloat16, torch.device("cpu")), {}, torch.bfloat16),
        ((), {"device": "cpu", "dtype": torch.bfloat16}, torch.bfloat16),
        (("cpu",), {"dtype": torch.bfloat16}, torch.bfloat16),
    ],
)
def test_moving_in_the_ways_of_diffusers(sd15: Kit, places: tuple, options: dict, dtype: torch.dtype) -> None:
    pipe = sd15.load(torch_dtype=torch.float32)
    assert pipe.to(*places, **options) is pipe and pipe.dtype == dtype
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert network.dtype == dtype and network.device == torch.device("cpu")
    assert pipe(PROMPT).settings[0].dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "places, options, message",
    [
        (("cpu", "cpu"), {}, "not several of a kind"),
        ((torch.float16,), {"dtype": torch.bfloat16}, "not several of a kind"),
        ((), {"dtype": "fp16"}, "dtype must be a torch.dtype"),
        ((torch.int8,), {}, "not in torch.int8"),
        (("toaster", torch.bfloat16), {}, "toaster cannot be used"),
    ],
)
def test_moving_to_nowhere_moves_nothing(sd15: Kit, places: tuple, options: dict, message: str) -> None:
    pipe = sd15.load()
    with pytest.raises(ValueError, match=message):
        pipe.to(*places, **options)
    assert pipe.dtype == pipe.unet.dtype == torch.float32


def test_the_bases_own_bits_come_back_in_another_format(sd15: Kit) -> None:
    pipe = sd15.load().to(torch.bfloat16)
    pipe.set_lorad(None)
    assert equal(weights_of(pipe.unet), weights_of(sd15.load(lorad=[], dtype="bf16").unet))
    pipe.set_lorad(sd15.lorad)
    assert equal(weights_of(pipe.unet), weights_of(sd15.load(dtype="bf16").unet))


def test_two_names_for_the_number_format(sd15: Kit) -> None:
    assert sd15.load(torch_dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="two names for the same"):
        sd15.load(dtype="fp32", torch_dtype=torch.bfloat16)


def test_parts_make_a_stock_pipeline(ours: OneStepPipeline) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        ours.vae, ours.text_encoder, ours.tokenizer, ours.unet, ours.scheduler, None, None, requires_safety_checker=False
    )
    made = pipe(PROMPT, guidance_scale=1.0, generator=generator(4)).images[0]
    assert largest_difference(made, ours(PROMPT, seed=4).images[0]) <= 1


@pytest.mark.parametrize("architecture", ["sd15", "sd21"])
def test_a_saved_folder_draws_the_same_here_and_in_diffusers(architecture: str, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    kit = make_kit(tmp_path, architecture)
    pipe = kit.load(strength=0.7)
    pipe.save_pretrained(tmp_path / "deep" / "saved")
    drawn = pipe(PROMPT, seed=4).images[0]
    again = OneStepPipeline.from_pretrained(tmp_path / "deep" / "saved", device="cpu", precision="exact")
    assert again.one_step == pipe.one_step == OneStep() and again.is_one_step and again.base.pad == pipe.base.pad
    assert equal(weights_of(again.unet), weights_of(pipe.unet))
    assert largest_difference(again(PROMPT, seed=4).images[0], drawn) <= 1
    with pytest.raises(ValueError, match="one-step network already"):
        again.set_lorad(kit.lorad)

    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "deep" / "saved")
    assert isinstance(theirs.scheduler, OneStepScheduler)
    made = theirs(PROMPT, guidance_scale=1.0, generator=generator(4)).images[0]
    assert largest_difference(made, drawn) <= 1
    many = DDIMScheduler.from_config(theirs.scheduler.config)
    assert float(many.alphas_cumprod[-1]) == pytest.approx(0.0046601, rel=1e-4)  # the base's own schedule


def test_saving_never_overwrites(sd15: Kit, tmp_path: Path) -> None:
    pipe = sd15.load()
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another one"):
        pipe.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    (tmp_path / "empty").mkdir()
    pipe.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_learned_words_are_not_saved_and_stay(tmp_path: Path) -> None:
    pipe = OneStepPipeline.from_pretrained("mini", device="cpu", embeddings="mini", precision="exact")
    learned = pipe.vocabulary.learned
    pipe.save_pretrained(tmp_path / "saved")
    assert pipe.vocabulary.learned == learned != ()
    assert OneStepPipeline.from_pretrained(tmp_path / "saved", device="cpu", precision="exact").vocabulary.learned == ()
