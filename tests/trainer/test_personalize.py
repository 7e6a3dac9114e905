"""Learning a subject or a style: files that every program reads, runs that go on, and rotations that add up."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from finetuning_runs import difference, make_place, personalize_config, write_pictures
from networks import make_networks, random_lorad

from trainer.finetune.finetuning import STUDENT, TEACHER
from trainer.personalize import Personalization, personalize
from trainer.settings import fields as settings
from trainer.settings.finetuning import InvertConfig, PersonalizeConfig
from wadi_core import LoRaD, OneStepPipeline
from wadi_core.embeddings import Embedding
from wadi_core.lorad.adapter import fuse
from wadi_core.lorad.checkpoint import read_header, read_tensors
from wadi_core.lorad.layers import student_layers
from wadi_core.lorad.linear import attach, set_active
from wadi_core.lorad.rotation import angles, rotate_

CONFIGS = Path(settings.__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def test_a_lorad_is_an_ordinary_adapter(place: Path, tmp_path: Path) -> None:
    for name, steps in (("straight", 4), ("halved", 2), ("halved", 4)):
        path = personalize(personalize_config(place, tmp_path / name, steps=steps, name="style", license="CC0-1.0"))
    one, other = (LoRaD.load(tmp_path / name / "style.safetensors") for name in ("straight", "halved"))
    assert all(torch.equal(x, y) for key in one.factors for x, y in zip(one.factors[key], other.factors[key], strict=True))
    assert one.one_step is None and one.rank == 2 and any(a.abs().max() > 0 for a, _ in one.factors.values())
    about = one.metadata
    assert (about.title, about.license, about.resolution, about.extra["ss_steps"]) == ("style", "CC0-1.0", "64x64", "4")
    assert about.thumbnail.startswith("data:image/jpeg;base64,")
    unet = make_networks(place / "base")["unet"]
    match = one.matched(unet)
    assert len(match.paths) == len(one.factors) and not match.notes  # the base that it was trained on
    # Beside the one-step LoRaD it changes the picture and leaves the schedule.
    pipe = OneStepPipeline.from_pretrained(
        place / "base", lorad=place / "one-step.safetensors", device="cpu", precision="exact"
    )
    plain, before = pipe("a cat", seed=2).images[0], pipe.one_step
    pipe.set_lorad([place / "one-step.safetensors", (path, 4.0)])
    assert pipe.one_step == before and difference(pipe("a cat", seed=2).images[0], plain) > 0


@pytest.mark.parametrize("adapter", ["lorad", "lora"])
def test_only_some_layers_are_adapted(place: Path, tmp_path: Path, adapter: str) -> None:
    run = Personalization(personalize_config(place, tmp_path, adapter=adapter, layers=["down_blocks*attn", "mid_block"]))
    (picture,) = run.pictures(["a cat"], 3, STUDENT)
    run.train_step()
    (path,) = run.write(tmp_path, picture)
    keys = {key.split(".")[0] for key in read_tensors(read_header(path))}
    every = student_layers(make_networks(place / "base")["unet"])
    wanted = [path for path in every if path.startswith("mid_block") or path.startswith("down_blocks") and "attn" in path]
    assert keys == {f"lora_unet_{path.replace('.', '_')}" for path in wanted}
    with pytest.raises(ValueError, match="'up_block_' is in no layer's name; they begin with down_blocks, "):
        Personalization(personalize_config(place, tmp_path / "none", adapter=adapter, layers=["mid_block", "up_block_"]))


@pytest.mark.parametrize("adapter", ["lorad", "lora"])
def test_half_precision_learns_the_same(place: Path, tmp_path: Path, adapter: str) -> None:
    """As the presets for Stable Diffusion have it: all in bfloat16 but the factors."""
    runs = [
        Personalization(personalize_config(place, tmp_path / name, adapter=adapter, precision=name, base_weights=name))
        for name in ("fp32", "bf16")
    ]
    losses = [[run.train_step()["loss"] for _ in range(2)] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.03) and losses[1] != losses[0]
    trained = [p for p in runs[1].network.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)


def test_the_student_on_the_sheet_is_both_rotations_at_once(place: Path, tmp_path: Path) -> None:
    run = Personalization(personalize_config(place, tmp_path))
    for _ in range(2):
        run.train_step()
    (shown,) = run.pictures(["a cat"], 3, STUDENT)
    (path,) = run.write(tmp_path, shown)
    stack = [place / "one-step.safetensors", path]
    pipe = OneStepPipeline.from_pretrained(place / "base", lorad=stack, device="cpu", precision="exact")
    assert difference(shown, pipe("a cat", seed=3).images[0]) <= 1
    frozen = {name: tensor for name, tensor in make_networks(place / "base")["unet"].state_dict().items()}
    assert all(torch.equal(run.network.state_dict()[name], tensor) for name, tensor in frozen.items())
    (teacher,) = run.pictures(["a cat"], 3, TEACHER)
    assert difference(teacher, shown) > 1


def test_a_lora_is_read_by_diffusers(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = Personalization(personalize_config(place, tmp_path, adapter="lora", lorad=""))
    for _ in range(2):
        run.train_step()
    (picture,) = run.pictures(["a cat"], 3, TEACHER)
    (path,) = run.write(tmp_path, picture)
    tensors, unet = load_file(path), make_networks(place / "base")["unet"]
    for layer in run.layers:
        key = f"lora_unet_{layer.replace('.', '_')}"
        up, down, alpha = (tensors.pop(f"{key}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        assert alpha == down.shape[0]
        unet.get_submodule(layer).weight.data += up.float() @ down.float()
    assert not tensors
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), run.model.encode(["a cat"])
    run.reset()
    with torch.no_grad():
        expected = unet(x, t, text.text).sample
        torch.testing.assert_close(run.predict(x, t, text), expected, rtol=1e-3, atol=1e-3)


def test_prior_preservation_keeps_what_the_teacher_draws(place: Path, tmp_path: Path) -> None:
    config = personalize_config(place, tmp_path, prior_count=2, class_prompts=["a cat"], mirror=True, prior_weight=0.5)
    run = Personalization(config)
    (kept,) = tmp_path.glob("prior-*")
    assert run.prior.shape == (2, 4, 8, 8) and len(run.means) == 6
    loss, log = run.loss(range(0, 2))
    torch.testing.assert_close(loss.detach(), log["denoising"] + 0.5 * log["prior"])
    (file,) = kept.glob("*.safetensors")
    before = file.stat().st_mtime_ns
    again = Personalization(config)
    assert torch.equal(again.prior, run.prior) and file.stat().st_mtime_ns == before  # not drawn twice


def test_each_class_is_drawn_in_turn(place: Path, tmp_path: Path) -> None:
    alone = Personalization(personalize_config(place, tmp_path / "one", prior_count=3, class_prompts=["a dog"]))
    both = Personalization(personalize_config(place, tmp_path / "two", prior_count=3, class_prompts=["a cat", "a dog"]))
    assert [torch.equal(*rows) for rows in zip(alone.prior, both.prior, strict=True)] == [False, True, False]
    with pytest.raises(ValueError, match="at least 2 are needed, one for each of class_prompts"):
        personalize_config(place, tmp_path, prior_count=1, class_prompts=["a cat", "a dog"])


def test_captions_may_say_a_learned_word(place: Path, tmp_path: Path) -> None:
    word = tmp_path / "word.safetensors"
    Embedding("<R>", torch.randn(1, 32)).save(word)
    known = Personalization(personalize_config(place, tmp_path / "known", embeddings=[str(word)]))
    plain = Personalization(personalize_config(place, tmp_path / "plain"))
    told = [run.condition(["a cat <R> a red wall", "a cat"]).text for run in (known, plain)]
    assert not torch.allclose(told[0][0], told[1][0]) and torch.equal(told[0][1], told[1][1])
    known.train_step()
    # A run goes on with the same word wherever its file lies, and with no other one.
    moved = word.rename(tmp_path / "moved.safetensors")
    same = Personalization(personalize_config(place, tmp_path / "known", embeddings=[str(moved)]))
    same.load_state(known.state())
    Embedding("<R>", torch.ones(1, 32)).save(word)
    other = Personalization(personalize_config(place, tmp_path / "known", embeddings=[str(word)]))
    with pytest.raises(ValueError, match="holds a run with other learned words"):
        other.load_state(known.state())
    with pytest.raises(OSError, match="none.safetensors: there is no such file"):
        Personalization(personalize_config(place, tmp_path / "none", embeddings=["none.safetensors"]))


def test_mirrored_pictures_take_turns(place: Path, tmp_path: Path) -> None:
    run = Personalization(personalize_config(place, tmp_path, mirror=True, lorad=""))
    assert torch.equal(run.means[3:].shape and run.means[:3], run.means[:3]) and not torch.equal(run.means[3:], run.means[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": ""}, "pictures: name the folder"),
        ({"templates": []}, "this picture has no caption"),
        ({"lorad": "/nothing.safetensors"}, "no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(place: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        personalize(personalize_config(place, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


def test_settings_are_checked() -> None:
    for preset in ("mini", "sd15", "sd21"):
        assert settings.load(PersonalizeConfig, CONFIGS / f"personalize-{preset}.yaml").adapter == "lorad"
    relation = settings.load(PersonalizeConfig, CONFIGS / "relation-mini.yaml")
    word = settings.load(InvertConfig, CONFIGS / "invert-mini.yaml")
    assert relation.embeddings == (f"{word.output}/{word.name}.safetensors",) and relation.pictures == word.pictures
    with pytest.raises(ValueError, match="class_prompts and prior_count go together"):
        settings.build(PersonalizeConfig, {"prior_count": 3})


def test_a_run_from_before_a_setting_goes_on_with_its_default(place: Path, tmp_path: Path) -> None:
    run = Personalization(personalize_config(place, tmp_path, lorad=""))
    state = run.state()
    del state["words"], state["settings"]["class_prompts"]
    run.load_state(state)
    state["settings"]["prior_count"] = 3
    with pytest.raises(ValueError, match="prior_count=3, not 0"):
        run.load_state(state)


def test_a_folder_of_another_run_is_refused(place: Path, tmp_path: Path) -> None:
    personalize(personalize_config(place, tmp_path / "run", steps=1, lorad=""))
    for changes, message in (
        ({"rank": 3}, "rank=2, not 3"),
        ({"layers": ["attn"]}, "another kind of run"),
        ({"adapter": "lora"}, "another kind of run"),
        ({"pictures": str(write_pictures(tmp_path / "others", 2))}, "on other pictures or captions"),
    ):
        with pytest.raises(ValueError, match=message):
            personalize(personalize_config(place, tmp_path / "run", steps=2, lorad="", **changes))


# Rotations stacked


@pytest.mark.parametrize("strengths", [(1.0, 1.0, 0.0), (1.0, 0.5, 0.0), (0.25, -1.5, 0.0), (1.0, 0.7, 0.3)])
def test_stacked_rotations_are_the_sum_of_their_angles_to_the_bit(place: Path, strengths: tuple[float, ...]) -> None:
    """Fused, in any order, and live: the same float32 weights as one rotation by the summed angles."""
    base = make_networks(place / "base")["unet"]
    lorads = [random_lorad(base, seed=1), *(random_lorad(base, rank=2, seed=seed, one_step=False) for seed in (2, 3))]
    stack = [(lorad, strength) for lorad, strength in zip(lorads, strengths, strict=True) if strength]
    paths = lorads[0].matched(base).paths
    expected = {}
    for key, path in paths.items():
        theta = sum(angles(*lorad.factors[key], strength).double() for lorad, strength in stack).float()
        weight = base.get_submodule(path).weight.detach().clone()
        expected[path] = rotate_(weight, [(theta, torch.eye(theta.shape[1]), 1.0)])
    found = []
    for order in itertools.permutations(stack):
        unet = make_networks(place / "base")["unet"]
        fuse(unet, order, keep_backup=False)
        found.append({path: unet.get_submodule(path).weight for path in expected})
    live = make_networks(place / "base")["unet"]
    for name, (lorad, strength) in enumerate(stack):
        attach(live, {path: lorad.factors[key] for key, path in paths.items()}, str(name), strength)
    found.append({path: live.get_submodule(path).rotated_weight() for path in expected})
    for weights in found:
        assert all(torch.equal(weights[path], theirs) for path, theirs in expected.items())


def test_the_strength_of_each_is_its_own(place: Path) -> None:
    unet = make_networks(place / "base")["unet"]
    one_step, personal = random_lorad(unet, seed=1), random_lorad(unet, rank=2, seed=2, one_step=False)
    path = next(iter(one_step.matched(unet).paths.values()))
    bare = unet.get_submodule(path).weight.detach().clone()
    one_step.apply_to(unet, 0.5, "one-step")
    personal.apply_to(unet, 2.0, "personal")
    layer = unet.get_submodule(path)
    both = layer.rotated_weight()
    set_active(unet, ["one-step"])
    alone = layer.rotated_weight()
    personal.apply_to(unet, 0.0, "personal")
    assert torch.equal(layer.rotated_weight(), alone)  # at strength 0 as if it were not there
    assert not torch.equal(both, alone)
    set_active(unet, [])
    assert torch.equal(layer.rotated_weight(), bare)
