"""Learning a word: the losses, what is trained and what is not, runs that go on, the file, and what is refused."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from finetuning_runs import CAPTIONS, difference, invert_config, make_place, write_pictures
from networks import make_networks, random_lorad
from PIL import Image

from trainer.data.random_draws import importance_timesteps
from trainer.finetune.finetuning import STUDENT, TEACHER
from trainer.finetune.steering import PREPOSITIONS, content_words, drawn, steering_loss
from trainer.invert import Inversion, invert
from trainer.models.base_models import call_unet
from trainer.settings import cli
from trainer.settings import fields as settings
from trainer.settings.finetuning import InvertConfig
from wadi_core import OneStepPipeline, configs
from wadi_core.embeddings import Embedding

CONFIGS = Path(settings.__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def test_the_steering_loss_is_the_papers() -> None:
    word, positive, negative = torch.randn(1, 8), torch.randn(4, 8), torch.randn(3, 8)
    near, far = (torch.exp(F.cosine_similarity(word, others) / 0.07).sum() for others in (positive, negative))
    torch.testing.assert_close(steering_loss(word, positive, negative, 0.07), -torch.log(near / (near + far)))
    assert steering_loss(word, positive, negative[:0], 0.07) == 0
    both = torch.cat([word, word])
    torch.testing.assert_close(steering_loss(both, positive, negative, 0.07), steering_loss(word, positive, negative, 0.07))


def test_words_to_steer_by() -> None:
    from wadi_core.base import _load_tokenizer

    tokenizer, _ = _load_tokenizer(configs.TOKENIZER)
    assert len(set(PREPOSITIONS)) == len(PREPOSITIONS) > 40
    assert all(len(tokenizer(word).input_ids) == 3 for word in PREPOSITIONS)  # with start and end: one place each
    assert content_words("A photo of the dog's <R> on a red wall, a red dog", ["<R>"]) == ["dog's", "red", "wall", "dog"]
    several = {tuple(drawn(PREPOSITIONS, 4, 0, number)) for number in range(20)}
    assert len(several) == 20 and all(len(set(words)) == 4 for words in several)
    assert drawn(PREPOSITIONS, 4, 0, 7) == drawn(PREPOSITIONS, 4, 0, 7) and sorted(drawn("ab", 4, 0, 1)) == ["a", "b"]


@pytest.mark.parametrize(("share", "noisy"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.7)])
def test_large_timesteps_are_preferred_as_the_formula_says(share: float, noisy: float) -> None:
    even = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = importance_timesteps(even, share, noisy)
    assert t.min() == 0 and t.max() == 999
    counts = torch.bincount(t, minlength=1000) / 100
    places = torch.arange(1000)
    expected = (1 - noisy) * (1 - share * torch.cos(math.pi * (places + 0.5) / 1000)) + noisy * 10 * (places >= 900)
    assert (counts - expected).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_weight_makes_an_error_of_eps_count_as_one_of_v(place: Path, tmp_path: Path, kind: str) -> None:
    plain, weighted, capped = (
        Inversion(invert_config(place, tmp_path / name, weight_cap=cap, steering=0.0))
        for name, cap in (("plain", 1.0), ("weighted", 1000.0), ("capped", 5.0))
    )
    for run in (plain, weighted, capped):
        run.config.prediction_type = kind
    x0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    condition = plain.condition(["a cat <R> a wall"] * 3)
    with torch.no_grad():
        losses = [run.denoising_loss(x0, eps, t, condition) for run in (plain, weighted, capped)]
    if kind == "v_prediction":  # which is weighted so by itself
        assert torch.equal(losses[1], losses[0]) and torch.equal(losses[2], losses[0])
    else:
        weight = 1 / plain.noising.alphas_cumprod[t]
        assert weight[2] > 200
        torch.testing.assert_close(losses[1] / losses[0], weight.float())
        torch.testing.assert_close(losses[2] / losses[0], weight.clamp(max=5).float())


def test_only_the_new_rows_change(place: Path, tmp_path: Path) -> None:
    run = Inversion(invert_config(place, tmp_path, vectors=2, micro_batch=1))
    networks = (run.network, run.model.vae, run.model.base.text_encoder)
    before = [{name: tensor.clone() for name, tensor in network.state_dict().items()} for network in networks]
    start = run.rows.detach().clone()
    for _ in range(2):
        log = run.train_step()
    assert set(log) == {"loss", "denoising", "steering", "norm"} and log["steering"] > 0
    changed = [
        name
        for network, kept in zip(networks, before, strict=True)
        for name, tensor in network.state_dict().items()
        if not torch.equal(tensor, kept[name])
    ]
    assert len(changed) == 1 and changed[0].endswith("token_embedding.rows")
    assert (run.rows != start).all()
    assert sum(parameter.requires_grad for network in networks for parameter in network.parameters()) == 1


def test_half_precision_learns_the_same(place: Path, tmp_path: Path) -> None:
    """As the presets for Stable Diffusion have it: all in bfloat16 but the new rows."""
    exact = Inversion(invert_config(place, tmp_path / "fp32"))
    half = Inversion(invert_config(place, tmp_path / "bf16", precision="bf16", base_weights="bf16"))
    begun = exact.rows.detach().clone()
    losses = [run.train_step()["loss"] for run in (exact, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.03) and losses[1] != losses[0]
    assert half.rows.dtype == torch.float32
    ways = [(run.rows.detach() - begun).flatten() for run in (exact, half)]
    assert torch.cosine_similarity(*ways, dim=0) > 0.8


def test_the_loss_is_the_teachers(place: Path, tmp_path: Path) -> None:
    """What the formula gives with the parts of a checked pipeline."""
    run = Inversion(invert_config(place, tmp_path, steering=0.0, importance=0.5))
    loss, log = run.loss(range(4, 6))
    chosen, captions = run.examples.draw(0, range(4, 6))
    drawn_numbers = run.draw(3, range(4, 6))
    x0 = run.means[chosen] + run.deviations[chosen] * drawn_numbers.z
    squared = run.model.alphas_cumprod[drawn_numbers.t].view(-1, 1, 1, 1).float()
    x_t = squared.sqrt() * x0 + (1 - squared).sqrt() * drawn_numbers.eps
    pipe = OneStepPipeline.from_pretrained(place / "base", device="cpu", embeddings=run.embeddings(), precision="exact")
    with torch.no_grad():
        predicted = pipe.base.unet(x_t, drawn_numbers.t, encoder_hidden_states=pipe.encode(captions)).sample
    torch.testing.assert_close(loss.detach(), F.mse_loss(predicted, drawn_numbers.eps), rtol=1e-4, atol=1e-6)
    assert torch.equal(loss.detach(), log["denoising"])


def test_stopping_and_going_on_changes_nothing(place: Path, tmp_path: Path) -> None:
    for name, steps in (("straight", 4), ("halved", 2), ("halved", 4)):
        written = invert(invert_config(place, tmp_path / name, steps=steps, micro_batch=1 if name == "other" else 0))
        assert written == tmp_path / name / "finetuned.safetensors"
    one, other = (Embedding.load(tmp_path / name / "finetuned.safetensors") for name in ("straight", "halved"))
    assert torch.equal(one.vectors, other.vectors)
    first, second = (torch.load(tmp_path / name / "step-00000004.pt") for name in ("straight", "halved"))
    moments = [checkpoint["updater"]["optimizer"]["state"][0] for checkpoint in (first, second)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert one.architecture == "unet-custom" and one.extra["ss_steps"] == "4" and one.token == "<R>"
    with Image.open(tmp_path / "straight" / "sheet-000004.png") as sheet:
        assert sheet.width == 194 + 2 * (64 + 4)  # teacher and student
    assert {path.name for path in (tmp_path / "straight").iterdir()} >= {"losses.csv", "losses.png", "config.yaml"}


def test_what_it_shows_is_what_the_pipeline_makes(place: Path, tmp_path: Path) -> None:
    run = Inversion(invert_config(place, tmp_path))
    run.train_step()
    (shown,) = run.pictures(["a cat <R> a wall"], 3, STUDENT)
    pipe = OneStepPipeline.from_pretrained(
        place / "base", lorad=place / "one-step.safetensors", device="cpu", embeddings=run.embeddings(), precision="exact"
    )
    (made,) = pipe("a cat <R> a wall", seed=3).images
    assert difference(shown, made) <= 1
    (teacher,) = run.pictures(["a cat <R> a wall"], 3, TEACHER)
    assert difference(teacher, made) > 1
    # The network is left as it is trained: bare.
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), run.model.encode(["a cat"])
    with torch.no_grad():
        bare = call_unet(make_networks(place / "base")["unet"], x, t, text)
        torch.testing.assert_close(run.predict(x, t, text), bare, rtol=1e-4, atol=1e-5)


def test_several_words_from_the_same_pictures(place: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    (pictures / "1.txt").unlink()
    changes = {"pictures": str(pictures), "templates": ["a cat <R> a wall in <style>"], "tokens": ["<R>", "<style>"]}
    changes |= {"initial": ["on", "red"], "vectors": 2, "lorad": "", "sheet_prompts": ["a cat <R> a wall in <style>"]}
    invert(invert_config(place, tmp_path / "run", steps=2, **changes))
    one, other = (Embedding.load(tmp_path / "run" / f"finetuned-{word}.safetensors") for word in ("R", "style"))
    assert (one.token, other.token) == ("<R>", "<style>") and one.vectors.shape == (2, 32)
    with Image.open(tmp_path / "run" / "sheet-000002.png") as sheet:
        assert sheet.width == 194 + 64 + 4  # the teacher alone
    OneStepPipeline.from_pretrained(
        place / "base", device="cpu", lorad=place / "one-step.safetensors", embeddings=[one, other], precision="exact"
    )("a cat <R> a wall in <style>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": ""}, "pictures: name the folder"),
        ({"pictures": "{tmp}/none"}, "no such folder of pictures"),
        ({"pictures": "{tmp}/empty"}, "no picture in this folder"),
        ({"templates": []}, "0.png: this picture has no caption"),
        ({"templates": ["a cat on a wall"]}, "'a cat on a wall' does not say <R>"),
        ({"tokens": ["dog"]}, "does not say dog"),
        ({"tokens": ["dog"], "templates": ["a dog"], "pictures": "{tmp}/bare"}, "'dog' is in the vocabulary already"),
        ({"tokens": ["<R>", "<style>"]}, "no caption says <style>"),
        ({"tokens": ["<R>", "<r>"]}, "<R> and <r> would be written to one file"),
        ({"initial": ["  "]}, "initial: a word is expected"),
        ({"lorad": "{tmp}/style.safetensors"}, "an ordinary adapter; a one-step LoRaD is needed"),
        ({"base": "{tmp}/nothing"}, "no such file or folder"),
        ({"batch": 3, "micro_batch": 2}, "cannot be shared out"),
        ({"pictures": "{tmp}/damaged"}, "no picture that can be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(place: Path, tmp_path: Path, changes: dict, message: str) -> None:
    (tmp_path / "empty").mkdir()
    write_pictures(tmp_path / "bare", 1)
    damaged = write_pictures(tmp_path / "damaged", 1)
    (damaged / "0.png").write_bytes(b"no picture")
    random_lorad(make_networks(place / "base")["unet"], one_step=False).save(tmp_path / "style.safetensors")
    words = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in changes.items()}
    (tmp_path / "bare" / "1.txt").unlink(missing_ok=True)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        invert(invert_config(place, tmp_path / "run", **words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokens=[]"], "tokens: name the word"),
        (["tokens=[a b]"], "tokens: words without spaces"),
        (["initial=[a, b]"], "initial: one word, or 1"),
        (["name=<R>"], "name: a file name without"),
        (["resolution=100"], "resolution: a multiple of 8"),
        (["steering=-1"], "steering: at least 0"),
        (["token=x"], "did you mean 'tokens'?"),
    ],
)
def test_settings_are_checked(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        settings.load(InvertConfig, None, words)
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_run_is_refused(place: Path, tmp_path: Path) -> None:
    invert(invert_config(place, tmp_path, steps=1, save_every=1))
    for changes, message in (
        ({"tokens": ["<R>"], "vectors": 2}, "vectors=1, not 2"),
        ({"templates": [CAPTIONS[0]]}, "on other pictures or captions"),
        ({"seed": 3}, "seed=0, not 3"),
    ):
        with pytest.raises(ValueError, match=message):
            invert(invert_config(place, tmp_path, steps=2, **changes))


def test_a_run_of_an_earlier_version_is_refused(place: Path, tmp_path: Path) -> None:
    """It showed its pictures in another order, and would not go on bit for bit."""
    run = Inversion(invert_config(place, tmp_path))
    state = {name: value for name, value in run.state().items() if name != "order"}
    with pytest.raises(ValueError, match="of another version of this trainer, which shuffled otherwise"):
        run.load_state(state)


def test_captions_say_the_word_as_prompts_do(place: Path, tmp_path: Path) -> None:
    """In any letter case, and not as a part of a longer word, for which nothing would be learned."""
    said = ["a zq\u0131 cat", "a ZQ\u0130 dog"]
    for number, caption in enumerate(said):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption, encoding="utf-8")
    run = Inversion(invert_config(place, tmp_path / "run", tokens=["zqi"], pictures=str(tmp_path)))
    assert not any(run.wrong_caption(caption) for caption in (*said, "a ZQI cat"))
    assert run.wrong_caption("a zqix cat") == "does not say zqi, the word to learn"
    ids = run.vocabulary.ids(said)
    assert (ids == run.table.shape[0]).sum(1).tolist() == [1, 1]  # the row that is learned, once in each caption


@pytest.mark.parametrize("preset", ["mini", "sd15", "sd21"])
def test_presets_and_the_script(preset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["invert.py", "--config", str(CONFIGS / f"invert-{preset}.yaml"), "--print-config"])
    assert cli.main("About.", InvertConfig, invert) == 0
    text = capsys.readouterr().out
    assert "steering: 0.01" in text and "importance: 0.5" in text
    monkeypatch.setattr(sys, "argv", ["invert.py", "--config", str(CONFIGS / f"invert-{preset}.yaml"), "pictures=/nothing"])
    assert cli.main("About.", InvertConfig, invert) == 1
    assert capsys.readouterr().err == "error: /nothing: there is no such folder of pictures\n"
