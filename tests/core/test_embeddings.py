"""Learned words: the file that diffusers and the core read alike, prompts that say them, and what is refused."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import networks
import numpy as np
import pytest
import torch

from wadi_core import OneStepPipeline, images, mini, pictures
from wadi_core.embeddings import Embedding, load_embeddings, text_encoder_sha256
from wadi_core.lorad.checkpoint import write_safetensors

WIDTH = networks.SMALL["text_encoder"]["hidden_size"]


def word(token: str = "<left-of>", vectors: int = 2, width: int = WIDTH, **about: object) -> Embedding:
    return Embedding(token, torch.randn(vectors, width, generator=torch.Generator().manual_seed(3)), **about)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of both kinds, a one-step adapter for each, and a learned word."""
    place = tmp_path_factory.mktemp("place")
    for kind in ("sd15", "sd21"):
        _, made = networks.write_base(place / kind, kind)
        networks.random_lorad(made["unet"]).save(place / f"{kind}-one-step.safetensors")
    word().save(place / "left-of.safetensors")
    return place


def load(place: Path, kind: str = "sd15", **options: object) -> OneStepPipeline:
    return OneStepPipeline.from_pretrained(
        place / kind, lorad=place / f"{kind}-one-step.safetensors", device="cpu", **options, precision="exact"
    )


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    one = word(architecture="sd15", text_encoder="ab", extra={"ss_steps": "3"})
    one.save(tmp_path / "word.safetensors")
    back = Embedding.load(tmp_path / "word.safetensors")
    assert torch.equal(back.vectors, one.vectors) and back.name == "word"
    assert (back.token, back.architecture, back.text_encoder) == ("<left-of>", "sd15", "ab") and back.extra["ss_steps"] == "3"


@pytest.mark.parametrize("key", ["emb_params", "*"])
def test_a_tensor_without_a_word_is_called_as_its_file(tmp_path: Path, key: str) -> None:
    write_safetensors(tmp_path / "ringed-by.safetensors", {key: torch.ones(WIDTH, dtype=torch.float16)})
    one = Embedding.load(tmp_path / "ringed-by.safetensors")
    assert one.token == "ringed-by" and one.vectors.shape == (1, WIDTH) and one.vectors.dtype == torch.float32


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_diffusers_reads_the_file_and_says_the_same(place: Path, kind: str) -> None:
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    pipe = load(place, kind, embeddings=place / "left-of.safetensors")
    theirs = StableDiffusionPipeline(
        vae=pipe.base.vae, unet=pipe.base.unet, scheduler=DDPMScheduler(), safety_checker=None, feature_extractor=None,
        text_encoder=CLIPTextModel.from_pretrained(place / kind / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(pipe.base.tokenizer.name_or_path), requires_safety_checker=False,
    )  # fmt: skip
    theirs.load_textual_inversion(place / "left-of.safetensors")
    prompt = "a cat <left-of> a bicycle, on grass"
    their_text = theirs.maybe_convert_prompt(prompt, theirs.tokenizer)
    ids = theirs.tokenizer(their_text).input_ids
    ids += [pipe.base.pad] * (77 - len(ids))
    with torch.no_grad():
        expected = theirs.text_encoder(torch.tensor([ids]))[0]
    assert torch.equal(pipe.encode([prompt]), expected)
    assert torch.equal(pipe.encode(["a cat embedding:left-of a bicycle, on grass"]), expected)
    assert not torch.equal(pipe.encode(["a cat  a bicycle, on grass"]), expected)


def test_the_network_is_as_before_when_words_go(place: Path) -> None:
    pipe = load(place)
    table, before = pipe.base.text_encoder.get_input_embeddings(), pipe.encode(["a cat <left-of> a dog"])
    pipe.set_embeddings(place / "left-of.safetensors")
    assert pipe.base.text_encoder.get_input_embeddings().own is table  # not copied
    assert not torch.equal(pipe.encode(["a cat <left-of> a dog"]), before)
    assert torch.equal(pipe.encode(["a cat above a dog"]), load(place).encode(["a cat above a dog"]))
    pipe.set_embeddings(None)
    assert pipe.base.text_encoder.get_input_embeddings() is table
    assert torch.equal(pipe.encode(["a cat <left-of> a dog"]), before)


def test_words_are_found_where_they_stand_alone(place: Path) -> None:
    pipe = load(place, embeddings=[word("ring-by", 1, name="one"), word("ring-by-all", 3, name="two"), word("<r>", 1)])
    said = pipe.vocabulary
    own = said.tokens("cat")
    first = len(pipe.base.tokenizer)
    assert said.tokens("cat ring-by cat") == [*own, first, *own]
    assert said.tokens("cat RING-BY, cat") == [*own, first, *said.tokens(", cat")]
    assert said.tokens("ring-by-all") == [first + 1, first + 2, first + 3]
    assert said.tokens("cat<r>cat") == [*own, first + 4, *own]
    assert max(said.tokens("string-by ring-bys")) < first
    assert said.text(said.tokens("cat ring-by-all cat <r>")) == "cat ring-by-all cat <r>"


def test_long_prompts_are_cut_and_the_word_is_named(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = load(place, embeddings=place / "left-of.safetensors")
    with caplog.at_level(logging.WARNING, "wadi"):
        ids = pipe.vocabulary.ids(["cat " * 74 + "<left-of> dog"])
    assert ids.shape == (1, 77) and ids[0, 75] == len(pipe.base.tokenizer) and "left out is: <left-of> dog" in caplog.text


def test_words_may_be_given_other_names(place: Path) -> None:
    mapped = load(place, embeddings={"<new>": place / "left-of.safetensors"})
    plain = load(place, embeddings=place / "left-of.safetensors")
    assert torch.equal(mapped.encode(["a cat <new> a dog"]), plain.encode(["a cat <left-of> a dog"]))


def broken(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.safetensors"
    tensors = {
        "several": {"<a>": torch.ones(WIDTH), "<b>": torch.ones(WIDTH)},
        "xl": {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)},
        "lorad": {"lora_unet_x.lorad_a": torch.ones(2, 2), "lora_unet_x.lorad_b": torch.ones(2, 2)},
        "nan": {"<a>": torch.full((WIDTH,), float("nan"))},
        "whole numbers": {"<a>": torch.ones(WIDTH, dtype=torch.int64)},
        "many": {"<a>": torch.ones(76, WIDTH)},
        "cube": {"<a>": torch.ones(2, 2, WIDTH)},
        "empty": {},
        "nameless": {" ": torch.ones(WIDTH)},
        "two lines": {"a\nb": torch.ones(WIDTH)},
        "control characters": {"\x1b[2J": torch.ones(WIDTH)},
        "turned around": {"<\u202egnp>": torch.ones(WIDTH)},
        "endless": {"a" * 5000: torch.ones(WIDTH)},
        "width": {"<a>": torch.ones(1, 1024)},
        "known": {"dog": torch.ones(1, WIDTH)},
    }
    if kind in tensors:
        write_safetensors(path, tensors[kind], {"format": "pt"})
    elif kind == "cut":
        word().save(path)
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "text":
        path.write_text("not a file of tensors")
    elif kind == "pickle":
        path = folder / "word.pt"
        path.write_bytes(b"pickle")
    elif kind == "sd21":
        word(architecture="sd21").save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("several", "no embedding: one tensor"),
        ("xl", "two text encoders of SDXL"),
        ("lorad", "an adapter, not an embedding"),
        ("nan", "NaN or Inf"),
        ("whole numbers", "vectors of the type I64"),
        ("many", "76 vectors make no word"),
        ("cube", "no embedding"),
        ("empty", "no embedding"),
        ("nameless", "no word"),
        ("two lines", "no prompt can say the word"),
        ("control characters", "no prompt can say the word"),
        ("turned around", "no prompt can say the word"),
        ("endless", "no prompt can say the word"),
        ("width", r"width 1024 \(Stable Diffusion 2\), and this text encoder has 32"),
        ("known", "'dog' is in the vocabulary already"),
        ("cut", "cut short"),
        ("text", "no .safetensors file"),
        ("pickle", "as .safetensors only"),
        ("sd21", "an embedding for sd21, and this base is unet-custom"),
        ("missing", "no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(place: Path, tmp_path: Path, kind: str, message: str) -> None:
    pipe = load(place, embeddings=place / "left-of.safetensors")
    before = pipe.encode(["a cat <left-of> a dog"])
    with pytest.raises((ValueError, OSError), match=message) as caught:
        pipe.set_embeddings([broken(tmp_path, kind)])
    assert "\n" not in str(caught.value)
    assert torch.equal(pipe.encode(["a cat <left-of> a dog"]), before)  # as it was


def test_two_embeddings_for_one_word_are_refused(place: Path) -> None:
    with pytest.raises(ValueError, match="another embedding for '<LEFT-OF>'"):
        load(place, embeddings=[word(), word("<LEFT-OF>")])


def test_another_text_encoder_of_the_same_width_is_named(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = load(place)
    own = text_encoder_sha256(pipe.base.text_encoder)
    with caplog.at_level(logging.WARNING, "wadi"):
        pipe.set_embeddings(word(text_encoder=own))
        assert not caplog.messages
        pipe.set_embeddings(word(text_encoder="0" * 64))
    assert "another text encoder" in caplog.text


def test_pictures_remember_the_words(place: Path, tmp_path: Path) -> None:
    pipe = load(place, embeddings=place / "left-of.safetensors")
    made = pipe("a cat <left-of> a dog", seed=4)
    made.save(tmp_path / "one.png")
    (kept,) = pictures.read_settings(tmp_path / "one.png").embeddings
    assert (kept.file, kept.token, len(kept.sha256)) == ("left-of", "<left-of>", 64)
    assert 'Embeddings: "left-of: <left-of>"' in made.settings[0].to_infotext("wadi")
    plain = load(place)("a cat <left-of> a dog", seed=4)
    assert np.abs(np.asarray(made.images[0], int) - np.asarray(plain.images[0], int)).max() > 0


def test_generate_takes_embeddings(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wadi_core import cli

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(cli, "_silence", lambda: None)  # which would keep warnings off the other tests too
    common = ["generate", "a cat <left-of> a dog", "--base", str(place / "sd15"), "--device", "cpu"]
    common += ["--lorad", str(place / "sd15-one-step.safetensors"), "--precision", "exact"]
    output = tmp_path / "one.png"
    assert cli.main([*common, "-o", str(output), "--embedding", str(place / "left-of.safetensors")]) == 0
    pipe = load(place, embeddings=place / "left-of.safetensors")
    assert np.array_equal(np.asarray(images.read(output)), np.asarray(pipe("a cat <left-of> a dog").images[0]))
    capsys.readouterr()
    assert (
        cli.main([word for word in [*common, "-o", str(output), "--embedding", "none.safetensors"] if word != "--debug"]) == 1
    )
    assert capsys.readouterr().err == "wadi: error: none.safetensors: there is no such file\n"


def test_the_words_of_wadi_mini_are_small_and_fit_it() -> None:
    pipe = OneStepPipeline.from_pretrained(device="cpu", embeddings="mini", precision="exact")
    assert {one.token for one in pipe.vocabulary.learned} >= {"<left-of>"}
    assert all(path.stat().st_size < 20_000 for path in mini.embedding_paths())


def test_words_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mini, "FOLDER", tmp_path)
    with pytest.raises(OSError, match="embeddings/left-of.safetensors: this file of wadi-mini is missing"):
        load_embeddings("mini")


def test_settings_with_words_are_read_back() -> None:
    from wadi_core.settings import Learned, PictureSettings, Settings

    asked = Settings(embeddings=(Learned("left-of", "<left-of>", "ab"),))
    one = asked.resolved(64, 64, 0.0047, 999, "epsilon", "float32")
    assert PictureSettings.from_json(one.to_json()) == one
    older = json.loads(one.to_json())
    del older["embeddings"]
    assert PictureSettings.from_json(json.dumps(older)).embeddings == ()
    with pytest.raises(ValueError, match="embeddings must hold learned words"):
        Settings(embeddings=("left-of",))
