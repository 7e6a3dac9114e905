"""The benchmarks of learned words and styles: what they draw, how they judge, and whole runs on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from finetuning_runs import invert_config
from PIL import Image, ImageOps

from benchmarks import report
from benchmarks.quality import distances, inversion, localisation, openings, personal
from trainer.data.examples import Examples
from trainer.evaluation.retrieval import Prototypes
from trainer.mini import scenes
from wadi_core import OneStepPipeline
from wadi_core.embeddings import Embedding
from wadi_core.lorad import Metadata
from wadi_core.lorad.convert import LoRA
from wadi_core.lorad.layers import student_layers
from wadi_core.pictures import to_tensor

THINGS = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random teacher, a student's LoRaD, a word, and a style as LoRaD and as LoRA."""
    place = tmp_path_factory.mktemp("tiny")
    _, made = networks.write_base(place / "model", "sd15", networks.TINY)
    unet = made["unet"]
    networks.random_lorad(unet).save(place / "student.safetensors")
    networks.random_lorad(unet, rank=2, seed=2, one_step=False).save(place / "style.safetensors")
    factors = {}
    for path in student_layers(unet):
        weight = unet.get_submodule(path).weight
        factors[path] = (torch.full((weight.shape[0], 2), 0.01), torch.full((2, weight.shape[1]), 0.01))
    LoRA(factors, {}, Metadata()).save(place / "lora.safetensors")
    Embedding("<left-of>", torch.randn(1, 32)).save(place / "left-of.safetensors")
    return place


class Colours(torch.nn.Module):
    """A stand-in for the network that looks at pictures: it sees their colours in coarse squares."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images, 6).flatten(1) * self.scale


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    few = scenes.things()[:THINGS]
    monkeypatch.setattr(openings, "load_lite", Colours)
    monkeypatch.setattr(scenes, "things", lambda: few)
    monkeypatch.setattr(distances, "COMPONENTS", 2)
    monkeypatch.setattr(inversion, "SHEET_ROWS", 1)
    monkeypatch.setattr(personal, "SHEET_ROWS", 1)
    monkeypatch.setattr(personal, "FEWEST", THINGS)
    inversion.example_pairs.cache_clear()


def other_set(folder: Path) -> Path:
    """The same drawings in other colours, called as different programs call them."""
    folder.mkdir()
    for number, thing in enumerate(scenes.things()):
        drawn = scenes.glyph(thing.character)
        negative = ImageOps.invert(drawn.convert("RGB"))
        negative.putalpha(drawn.getchannel("A"))
        points = scenes.code_points(thing.character)
        name = (points, f"emoji_u{points.replace('-', '_')}", thing.name.replace(" ", "_").title())[number % 3]
        negative.save(folder / f"{name}.png")
    return folder


def common(place: Path, tmp_path: Path) -> list[str]:
    words = ["--model", str(place / "model"), "--lorad", str(place / "student.safetensors"), "--output", str(tmp_path)]
    return [*words, "--work", str(tmp_path / "work"), "--count", "2", "--study", "100", "--steps", "2", "--float32"]


def test_scenes_have_the_relation_and_examples_are_of_other_things(ready: None) -> None:
    learned = {thing for pair in inversion.example_pairs() for thing in pair}
    assert len(learned) == 10
    for axis, reverse, sign in ((0, False, 1), (0, True, -1), (1, False, 1), (1, True, -1)):
        stream = inversion.Related("s", 5, relation="<r>", axis=axis, reverse=reverse)
        for index in range(4):
            one, other = stream.scene(index).placed
            apart = (other.x - one.x, other.y - one.y)[axis]
            assert sign * apart > inversion.APART and not {one.thing, other.thing} & learned
            assert stream.captions(range(index, index + 1)) == [f"{one.thing.phrase} <r> {other.thing.phrase}"]
    stream = inversion.Related("s", 5, relation="<r>", examples=True)
    assert {item.thing for index in range(10) for item in stream.scene(index).placed} == learned


def test_examples_are_what_the_trainer_reads(ready: None, place: Path, tmp_path: Path) -> None:
    over = tmp_path / "over"
    assert inversion.main(["--examples", str(over), "--relation", "over", "--word", "<atop>"]) == 0
    assert all("<atop>" in path.read_text() for path in over.glob("*.txt"))
    assert inversion.main(["--examples", str(tmp_path / "left-of")]) == 0
    config = invert_config(place, tmp_path, tokens=["<left-of>"])
    found = Examples.read(str(tmp_path / "left-of"), (), lambda caption: None)
    assert len(found) == 10 and all(config.tokens[0] in caption for caption in found.all_captions)
    with Image.open(found.paths[0]) as picture:
        assert picture.size == (128, 128)


def test_places_are_those_of_the_windows() -> None:
    """A stand-in for the network that sees the mean colour: red is object 0, blue is object 1."""
    picture = Image.new("RGB", (128, 128), (90, 90, 90))
    picture.paste((250, 0, 0), (4, 30, 60, 90))
    picture.paste((0, 0, 250), (70, 30, 126, 90))

    def eye(images: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        assert len(seeds) == len(images)
        return images.mean(dim=(2, 3))

    single = Prototypes(np.zeros(3), np.eye(3), np.array([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]))
    images = to_tensor([picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    side = len(localisation.STARTS)
    assert localisation.windows(images).shape == (2, side**2, 3, 128, 128)
    found, place = localisation.located(eye, single, images, [1, 2], [(0, 1), (0, 1)])
    assert found.tolist() == [True, True] and (place[:, :, 1] == side // 2).all()
    assert place[:, :, 0].tolist() == [[0, side - 1], [side - 1, 0]]
    # A third object that no window looks like is not found.
    three = Prototypes(np.zeros(3), np.eye(3), np.vstack([single.prototypes, [-1.0, 1.0, -1.0]]))
    assert localisation.located(eye, three, images, [1, 2], [(0, 1), (0, 2)])[0].tolist() == [True, False]


def test_figures_of_a_relation() -> None:
    rows = np.array([[1, 0, 3, 4, 1], [1, 4, 0, 0, 1], [1, 1, 0, 2, 4], [0, 0, 0, 4, 4]])
    expected = {"found": 0.75, "true": 0.25, "reversed": 0.25, "placed": 0.5, "placed_reversed": 0.25}
    assert inversion.figures(rows) == expected and inversion.figures(rows, axis=1) == expected


def test_a_whole_run_on_a_learned_word(ready: None, place: Path, tmp_path: Path) -> None:
    words = [*common(place, tmp_path), "--strengths", "1", "0.5", "--embedding", str(place / "left-of.safetensors")]
    assert inversion.main(words) == 0
    found = json.loads((tmp_path / "mini-inversion.json").read_text())
    assert set(found["sets"]) == {"real", "real, reversed"} | {
        f"{who}, {what}" for who in ("teacher", "student", "student at 0.5") for what in ("bare", "token")
    }
    assert found["settings"]["relation"] == "left-of" and found["settings"]["word"]["token"] == "<left-of>"
    assert found["settings"]["adapters"] == []
    assert str(tmp_path) not in json.dumps(found)
    with Image.open(tmp_path / "mini-inversion.png") as sheet:
        assert sheet.width == 194 + 6 * 132
        before = np.array(sheet)
    # An adapter that was learned beside the word is on where the word is said, and nowhere else.
    assert inversion.main([*words, "--adapters", str(place / "style.safetensors")]) == 0
    with Image.open(tmp_path / "mini-inversion.png") as sheet:
        changed = [bool((np.array(sheet)[:, left : left + 132] != before[:, left : left + 132]).any())
                   for left in range(194, 194 + 6 * 132, 132)]  # fmt: skip
    assert changed == [False, True] * 3


def test_another_emoji_set_is_found_by_its_names(ready: None, tmp_path: Path) -> None:
    emoji = personal.EmojiSet(other_set(tmp_path / "set"))
    assert emoji.things == scenes.things() and len(set(emoji.subjects())) == personal.SUBJECTS
    assert all(thing.phrase in (f"a {thing.name}", f"an {thing.name}") for thing in emoji.subjects())
    assert emoji.stamp(emoji.things[0].character).size == scenes.glyph(emoji.things[0].character).size
    last = emoji.things[-1]
    assert emoji.subjects([last.name]) == (last,)
    with pytest.raises(ValueError, match="'a thing' is none of the objects that wadi-mini knows and this folder has"):
        emoji.subjects([last.name, "a thing"])
    (tmp_path / "none").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "none" / "photo.png")
    with pytest.raises(ValueError, match="0 of wadi-mini's objects are in this folder"):
        personal.EmojiSet(tmp_path / "none")


def test_captions_of_a_subject_say_its_word(ready: None) -> None:
    thing = scenes.things()[3]
    stream = personal.Called("s", 5, thing=thing)
    captions = stream.captions(range(200))
    assert all(f"sks {thing.name}" in caption for caption in captions) and len(set(captions)) > 6
    assert 60 < sum(" background" in caption for caption in captions) < 140
    assert stream.shown(range(2)) == [(thing.index,)] * 2
    assert stream.recipe() != personal.Called("s", 5, thing=scenes.things()[4]).recipe()


def test_a_lora_is_put_on_after_the_rotation_and_taken_off(place: Path) -> None:
    pipe = OneStepPipeline.from_pretrained(place / "model", device="cpu", precision="exact")
    before = {name: tensor.clone() for name, tensor in pipe.base.unet.state_dict().items()}
    layers = student_layers(pipe.base.unet)
    weight = pipe.base.unet.get_submodule(layers[0]).weight
    with personal.adapted(pipe, place / "lora.safetensors", (place / "student.safetensors", 1.0)) as parameters:
        assert parameters == sum(2 * sum(pipe.base.unet.get_submodule(path).weight.shape) for path in layers)
        both = weight.clone()
    pipe.set_lorad(place / "student.safetensors")
    torch.testing.assert_close(both, weight + 2 * 0.01 * 0.01, rtol=1e-4, atol=1e-6)
    pipe.set_lorad(None)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.base.unet.state_dict().items())


def test_a_whole_run_on_subjects(
    ready: None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(personal, "SUBJECTS", 2)
    words = [*common(place, tmp_path), "--strengths", "1", "0.5", "--learn", str(tmp_path / "learn")]
    words += ["--set", str(other_set(tmp_path / "set"))]
    words += ["steps=2", "batch=2", "tensorboard=false", "sheet_steps=2"]
    assert personal.main(words) == 0
    found = json.loads((tmp_path / "mini-personal.json").read_text())
    whos = ("teacher", "student", "student at 0.5")
    assert {f"{who}, {name}" for who in whos for name in ("bare", "LoRaD", "LoRA")} < set(found["sets"])
    assert set(found["subjects"]) == {thing.name for thing in personal.EmojiSet(tmp_path / "set").subjects()}
    lorad, lora = (found["settings"]["parameters"][name] for name in ("LoRaD", "LoRA"))
    assert abs(lora / lorad - 1) < 0.1 and str(tmp_path) not in json.dumps(found)
    for kind in ("lorad", "lora"):
        learned = sorted((tmp_path / "learn" / kind).glob("*/*.safetensors"))
        assert [path.stem for path in learned] == sorted(f"sks-{name.replace(' ', '-')}" for name in found["subjects"])
    examples = sorted((tmp_path / "learn" / "examples").glob("*"))
    assert len(examples) == 2 and all(len(list(folder.glob("*.png"))) == 10 for folder in examples)
    with Image.open(tmp_path / "mini-personal.png") as sheet:
        assert sheet.width == 194 + 10 * 132
    # What has been learned is not learned again, and what was stopped is not taken for learned.
    monkeypatch.setattr(personal, "personalize", lambda config: pytest.fail("learned twice"))
    assert personal.main(words) == 0
    again = json.loads((tmp_path / "mini-personal.json").read_text())
    assert again["sets"] == found["sets"]
    monkeypatch.setattr(personal, "personalize", lambda config: None)
    assert personal.main([*words, "steps=3"]) == 1
    assert "this run was stopped; the same command goes on with it" in capsys.readouterr().err


def test_gains_are_over_the_same_network_and_shares_of_the_teachers() -> None:
    shares = {"real": (1, 1), "teacher, bare": (0.1, 0.4), "teacher, LoRaD": (0.9, 0.3), "student, bare": (0, 0.4)}
    shares |= {"student, LoRaD": (0.4, 0.5), "student at 0.7, bare": (0.1, 0.4), "student at 0.7, LoRaD": (0.7, 0.4)}
    sets = {name: {"true": true, "placed": placed} for name, (true, placed) in shares.items()}
    found = report.gains(sets, ["true", "placed"])
    expected = {
        "teacher, LoRaD": {"true_gain": 0.8, "placed_gain": -0.1},
        "student, LoRaD": {"true_gain": 0.4, "placed_gain": 0.1, "true_over_teacher": 0.5},
        "student at 0.7, LoRaD": {"true_gain": 0.6, "placed_gain": 0.0, "true_over_teacher": 0.75},
    }
    assert found == {name: {key: pytest.approx(value) for key, value in row.items()} for name, row in expected.items()}


def test_means_are_over_the_subjects() -> None:
    subjects = [{"teacher, bare": {"both": share}} for share in (0.2, 0.4)]
    assert personal.means(subjects)["teacher, bare"]["both"] == pytest.approx(0.3)
