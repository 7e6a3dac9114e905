"""Evaluation of models: runs on tiny models, and what is refused in one line."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import networks
import numpy as np
import pytest
import torch
from evaluation_kit import CPU, DUMMY, paint, read, run
from PIL import Image

from trainer import evaluate
from trainer.data import picture_files
from trainer.evaluation import coco, extractors
from trainer.evaluation.figures import read_statistics, write_statistics
from trainer.evaluation.metrics import moments
from trainer.models.condition import Condition
from trainer.models.generators import ModelGenerator, make_sampler
from wadi_core import pictures
from wadi_core.schedule import OneStep


@pytest.fixture(scope="module")
def lorad(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "one-step.safetensors"
    networks.random_lorad(networks.make_networks(base)["unet"]).save(path)
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("real") / "photos", 12)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"picture number {i}\n" for i in range(7)))
    return path


# ---------------------------------------------------------------- whole runs


def test_a_model_is_judged(base: Path, lorad: Path, real: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    words = ("--base", base, "--lorad", lorad, "--prompts", prompts, "--real", real, "--extractor", DUMMY, "-o", tmp_path)
    assert run(*words, "--batch", 3) == 0
    found = read(tmp_path)
    assert set(found["figures"]) == {"fid", "kid", "precision", "recall"}
    assert found["settings"]["generated"] == 7 and found["settings"]["real"] == 12
    assert str(tmp_path) not in json.dumps(found)
    shown = capsys.readouterr().out
    assert "| Fréchet distance | KID | precision | recall |" in shown
    assert "7 pictures against 12" in shown
    made = sorted(tmp_path.glob("pictures-*/*.png"))
    assert len(made) == 7

    # Stopped and started again: what is there stays, what is missing becomes what it was.
    kept, lost = made[0].stat().st_mtime_ns, made[4].read_bytes()
    made[4].unlink()
    assert run(*words, "--batch", 2) == 0
    assert made[0].stat().st_mtime_ns == kept
    assert np.abs(np.asarray(Image.open(made[4]), int) - np.asarray(picture(lost), int)).max() <= 1
    assert read(tmp_path)["figures"] == pytest.approx(found["figures"], rel=1e-3)

    # Another seed is another folder beside it.
    assert run(*words, "--seed", 5, "--count", 4) == 0
    assert len(list(tmp_path.glob("pictures-*"))) == 2


def picture(data: bytes) -> Image.Image:
    import io

    return Image.open(io.BytesIO(data))


def test_pictures_are_those_of_the_pipeline(base: Path, lorad: Path, real: Path, prompts: Path, tmp_path: Path) -> None:
    from wadi_core import OneStepPipeline

    words = ("--base", base, "--lorad", lorad, "--prompts", prompts, "--real", real, "--extractor", DUMMY, "-o", tmp_path)
    assert run(*words, "--seed", 40, "--batch", 1) == 0
    made = sorted(tmp_path.glob("pictures-*/*.png"))
    pipe = OneStepPipeline.from_pretrained(base, lorad=lorad, device="cpu", precision="exact")
    expected = pipe([f"picture number {i}" for i in range(7)], seed=40, batch=1).images
    for path, image in zip(made, expected, strict=True):
        assert np.abs(np.asarray(Image.open(path), int) - np.asarray(image, int)).max() <= 1


def test_shards_make_the_whole(base: Path, lorad: Path, real: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    words = ("--base", base, "--lorad", lorad, "--prompts", prompts, "--real", real, "--extractor", DUMMY, "-o", tmp_path)
    assert run(*words, "--shard", "2/2") == 0
    assert [path.name for path in sorted(tmp_path.glob("pictures-*/*.png"))] == ["000001.png", "000003.png", "000005.png"]
    assert not (tmp_path / "evaluation.json").exists()
    assert "run without --shard" in capsys.readouterr().out
    assert run(*words, "--shard", "1/2") == 0
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("pictures-*/*.png")}
    assert run(*words) == 0
    assert len(times) == 7 and all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert read(tmp_path)["settings"]["generated"] == 7


def test_many_steps_need_no_adapter(base: Path, real: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    words = ("--base", base, "--prompts", prompts, "--count", 4, "--real", real, "--extractor", DUMMY, "-o", tmp_path)
    assert run(*words) == 1
    assert "one step of a multi-step base gives a blur" in capsys.readouterr().err
    assert run(*words, "--steps", 2, "--guidance", 2) == 0
    assert read(tmp_path)["settings"]["made_with"]["guidance"] == 2


def test_the_sampler_finds_what_a_perfect_network_knows() -> None:
    levels = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().mul(-1).add(1).cumprod(0)
    goal = torch.full((2, 4, 8, 8), 0.7)

    def perfect(network, x, t, condition):
        alpha, sigma = (level.sqrt().view(-1, 1, 1, 1) for level in (levels[t], 1 - levels[t]))
        told = condition.text[:, 0, 0].view(-1, 1, 1, 1)  # 1 with a prompt, 0 without
        return ((x - alpha * told * 0.35) / sigma).float()

    encode = lambda texts: Condition(torch.tensor([[[float(bool(text))]] for text in texts]))  # noqa: E731
    model = SimpleNamespace(network=None, call=perfect, alphas_cumprod=levels, encode=encode, device=CPU, decode=lambda x: x)
    generator = ModelGenerator(model, OneStep(), (64, 64), steps=8, guidance=2.0)
    assert torch.allclose(generator.pictures(["a", "b"], [1, 2]), goal, atol=1e-3)
    assert make_sampler(levels, "epsilon").config.prediction_type == "epsilon"
    scheduler = make_sampler(levels, "v_prediction")
    assert torch.allclose(scheduler.alphas_cumprod.double(), levels, rtol=1e-4)


def test_pictures_that_are_there_already(real: Path, tmp_path: Path) -> None:
    made = paint(tmp_path / "made", 8, (80, 72), seed=3)
    words = ("--pictures", made, "--real", real, "--extractor", DUMMY, "--side", 32)
    assert run(*words, "-o", tmp_path / "one") == 0
    assert read(tmp_path / "one")["settings"]["generated"] == 8
    assert run("--pictures", real, "--real", real, "--extractor", DUMMY, "-o", tmp_path / "two") == 0
    same = read(tmp_path / "two")["figures"]
    assert same["fid"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1


def test_statistics_stand_for_the_pictures(real: Path, tmp_path: Path, capsys) -> None:
    made = paint(tmp_path / "made", 30, seed=3)
    words = ("--pictures", made, "--extractor", DUMMY)
    kept = tmp_path / "kept" / "real.safetensors"
    assert run(*words, "--real", real, "--save-statistics", kept, "-o", tmp_path / "one") == 0
    assert run(*words, "--real", kept, "-o", tmp_path / "two") == 0
    expected = read(tmp_path / "one")["figures"]
    assert read(tmp_path / "two")["figures"] == expected

    features = evaluate.features_of(
        evaluate.Files(picture_files.pictures_in(real)), "real", extractors.find(DUMMY, CPU), tmp_path, None
    ).numpy()
    mu, sigma = moments(features)
    np.savez(tmp_path / "real.npz", mu=mu, sigma=sigma)
    assert run(*words, "--real", tmp_path / "real.npz", "-o", tmp_path / "three") == 0
    assert read(tmp_path / "three")["figures"] == {"fid": pytest.approx(expected["fid"], rel=1e-9)}

    capsys.readouterr()
    assert run(*words, "--real", kept, "--side", 32, "-o", tmp_path / "four") == 1
    assert "were taken with --side None, not 32" in capsys.readouterr().err


def test_statistics_of_another_kind_are_refused(tmp_path: Path) -> None:
    one, other = (extractors.Extractor(name, name, lambda pictures, numbers: pictures) for name in ("one", "other"))
    path = tmp_path / "real.safetensors"
    write_statistics(path, np.zeros((4, 3), np.float32), one, 64)
    assert read_statistics(path, one, 64).count == 4
    bad = {
        "not taken with other": (path, other, 64),
        "no such file": (tmp_path / "none.npz", one, None),
        "an .npz file": (paint(tmp_path / "p", 1) / "000.png", one, None),
    }
    np.savez(tmp_path / "a.npz", mu=np.zeros(3))
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "c.npz", mu=np.array([None], dtype=object), sigma=np.zeros((1, 1)))
    np.savez(tmp_path / "d.npz", mu=np.full(1, np.nan), sigma=np.zeros((1, 1)))
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04 and then nothing")
    bad |= {"sigma is not a file": (tmp_path / "a.npz", one, None), "do not fit": (tmp_path / "b.npz", one, None)}
    bad |= {"Object arrays": (tmp_path / "c.npz", one, None), "NaN or Inf": (tmp_path / "d.npz", one, None)}
    bad |= {"no .npz file": (tmp_path / "e.npz", one, None)}
    for message, call in bad.items():
        with pytest.raises((OSError, ValueError), match=message) as refused:
            read_statistics(*call)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--real", "{none}"), "there is no such file"),
        (("--real", "{empty}"), "there is no picture in this folder"),
        (("--pictures", "{none}"), "there is no such folder of pictures"),
        (("--extractor", "resnet"), "no extractor 'resnet': take inception, mini, or MODULE:FUNCTION"),
        (("--extractor", "no.such:thing"), "cannot be found"),
        (("--extractor", "evaluation_kit:nothing"), "cannot be found"),
        (("--extractor", "evaluation_kit:wrong"), "must return features of shape"),
        (("--clip", "{empty}", "--prompts", "{prompts}"), "config.json is missing"),
        (("--prompts", "{prompts}"), "there are 12 pictures for 7 prompts"),
        (("--prompts", "{prompts}", "--count", "9"), "--count asks for 9 pictures, and there are 7 prompts"),
        (("--prompts", "{none}"), "there is no such file"),
        (("--preset", "coco2014-30k", "--data", "{empty}"), "annotations_trainval2014.zip"),
        (("--preset", "coco2017-5k", "--data", "{empty}"), "val2017/ with 5,000 images"),
        (("--device", "abacus"), "the device abacus cannot be used"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, message, real: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    places = {"none": tmp_path / "none", "empty": tmp_path / "empty", "prompts": prompts}
    options = {"--pictures": str(real), "--real": str(real), "--extractor": DUMMY, "-o": str(tmp_path / "out")}
    options |= dict(zip(words[::2], (word.format(**places) for word in words[1::2]), strict=True))
    assert run(*(word for pair in options.items() for word in pair)) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "online"),
    [
        (("--base", "mini", "--lorad", "org/adapters:one-step.safetensors"), True),
        (("--base", "mini", "--lorad", "org/adapters:one-step.safetensors:0.5"), True),
        (("--base", "org/base"), True),
        (("--base", "mini", "--lorad", "one-step.safetensors:0.5"), False),
    ],
)
def test_the_hub_is_asked_for_every_name_of_it(words, online: bool, real: Path, prompts: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith("HF_HUB")})
    rest = ("--real", str(real), "--prompts", str(prompts), "-o", str(tmp_path / "out"), "--device", "abacus")
    assert run(*words, *rest) == 1
    assert ("HF_HUB_OFFLINE" not in os.environ) == online


def test_a_strength_that_is_none_is_said_in_one_line(real: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    words = ("--base", "mini", "--lorad", "mini:0,8", "--real", str(real), "--prompts", str(prompts))
    assert run(*words, "-o", str(tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: mini:0,8: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "either --base or --pictures is needed"),
        (("--base", "x", "--pictures", "y"), "either --base or --pictures is needed"),
        (("--pictures", "y"), "--real or --preset is needed"),
        (("--base", "x", "--real", "y"), "--prompts or --preset is needed"),
        (("--base", "x", "--preset", "coco2014-30k"), "needs --data, a folder with annotations/captions_val2014.json"),
        (("--pictures", "x", "--real", "y", "--clip", "z"), "--clip needs the --prompts"),
        (("--pictures", "x", "--real", "y", "--shard", "1/2"), "--pictures are there already"),
        (("--pictures", "x", "--real", "y", "--shard", "3/2"), "not like 1/4"),
        (("--pictures", "x", "--real", "y", "--count", "1"), "at least 2"),
        (("--pictures", "x", "--real", "y", "--save-statistics", "z.npz"), "ends in .safetensors"),
    ],
)
def test_bad_usage(words, message, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        run(*words)
    assert left.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------- COCO


def write_coco(folder: Path, images: int, captions: int) -> coco.Coco:
    """A small validation set in COCO's form, and the preset that fits it."""
    preset = coco.Coco("tiny", "annotations/captions_val.json", "val", images, images * captions, 3, ("a.zip", "b.zip"), 32)
    paint(folder / "val", images, (90, 70), ending="jpg")
    names = [{"id": 500 - i, "file_name": f"{i:03d}.jpg"} for i in range(images)]
    texts = [
        {"id": 10 * i + 5 - j, "image_id": 500 - i, "caption": f" caption {5 - j} of\n{i} "}
        for j in range(captions)
        for i in range(images)
    ]
    (folder / "annotations").mkdir()
    (folder / preset.annotations).write_text(json.dumps({"images": names, "annotations": texts, "info": {}}))
    return preset


def test_coco_presets(base: Path, lorad: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    preset = write_coco(tmp_path / "coco", 6, 2)
    found = coco.read(preset, tmp_path / "coco")
    assert len(found.prompts) == 3 and len(found.images) == 6
    assert set(found.prompts) < {f"caption 4 of {i}" for i in range(6)}  # of each image the one with the lowest number
    assert found == coco.read(preset, tmp_path / "coco")
    words = ("--base", base, "--lorad", lorad, "--preset", "coco2017-5k", "--data", tmp_path / "coco", "--extractor", DUMMY)
    monkeypatch.setitem(coco.PRESETS, "coco2017-5k", preset)
    assert run(*words, "-o", tmp_path / "out") == 1
    assert "more than 3 pictures" in capsys.readouterr().err
    monkeypatch.setitem(coco.PRESETS, "coco2017-5k", replace(preset, prompts=5))
    assert run(*words, "-o", tmp_path / "out") == 0
    found = read(tmp_path / "out")["settings"]
    assert (found["generated"], found["real"], found["side"], found["preset"]) == (5, 6, 32, "coco2017-5k")
    # Another choice of prompts is another folder of pictures, though the preset has the same name.
    assert len(list((tmp_path / "out").glob("pictures-*"))) == 2


def test_coco_files_are_checked(tmp_path: Path) -> None:
    preset = write_coco(tmp_path, 6, 2)
    path = tmp_path / preset.annotations
    whole = path.read_text()
    (tmp_path / "val" / "003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="003.jpg: missing; tiny expects in"):
        coco.read(preset, tmp_path)
    short = json.loads(whole)
    short["annotations"].pop()
    path.write_text(json.dumps(short))
    with pytest.raises(ValueError, match=r"6 images and 11 captions in this file; tiny expects .* 12 captions \(a.zip\)"):
        coco.read(preset, tmp_path)
    for text in ("[]", "{}", '{"images": [1], "annotations": []}', "{", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="these are not COCO's captions") as refused:
            coco.read(preset, tmp_path)
        assert "\n" not in str(refused.value)


def test_the_presets_say_what_they_expect() -> None:
    thirty, five = (coco.PRESETS[name] for name in ("coco2014-30k", "coco2017-5k"))
    assert (thirty.prompts, thirty.images, thirty.captions) == (30_000, 40_504, 202_654)
    assert (five.prompts, five.images, five.captions) == (5_000, 5_000, 25_014)
    assert "val2014/ with 40,504 images (val2014.zip)" in thirty.expects


def test_pictures_say_nothing_of_the_machine(base: Path, lorad: Path, real: Path, prompts: Path, tmp_path: Path) -> None:
    assert (
        run("--base", base, "--lorad", lorad, "--prompts", prompts, "--real", real, "--extractor", DUMMY, "-o", tmp_path) == 0
    )
    (recipe,) = tmp_path.glob("pictures-*/recipe.json")
    assert "/" not in recipe.read_text()
    with pytest.raises(ValueError, match="does not say"):
        pictures.read_settings(recipe.with_name("000000.png"))
