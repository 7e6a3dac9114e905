"""Options of memory and speed change nothing that is learned, or as little as they say; and the adapters to compare."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training import tiny, write_prompts

from trainer.data import random_draws
from trainer.distill.distillation import Distillation
from trainer.distill.roles import FAKE, STUDENT, TEACHER
from trainer.models.base_models import StableDiffusion
from trainer.models.condition import Condition
from trainer.models.quantise import LEVELS, QuantisedLinear
from wadi_core.lorad import Metadata
from wadi_core.lorad.linear import RotatedLinear, rotated_layers
from wadi_core.lorad.rotation import rotate

STEPS = 3


@pytest.fixture(scope="module")
def make(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Distillation]:
    folder = tmp_path_factory.mktemp("runs")
    prompts = write_prompts(folder / "prompts.txt")

    def build(**changes: object) -> Distillation:
        run = Distillation(tiny(base, prompts, folder, **{"batch": 4, "ema": 0.0, **changes}))
        stir(run)
        return run

    return build


@torch.no_grad()
def stir(run: Distillation) -> None:
    """Start away from zero, where the roles differ and every gradient is one."""
    for role in (STUDENT, FAKE):
        generator = torch.Generator().manual_seed(1)
        for name, parameter in run.roles.adapters[role].parameters.items():
            if name.endswith((".a", ".lora_B")):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def learned(run: Distillation) -> dict[str, torch.Tensor]:
    for _ in range(STEPS):
        run.train_step()
    return {f"{role} {name}": value for role in (STUDENT, FAKE) for name, value in run.roles.state(role).items()}


@pytest.fixture(scope="module")
def reference(make: Callable[..., Distillation]) -> dict[str, torch.Tensor]:
    return learned(make(precision="fp64", base_weights="fp64"))


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 2},
        {"micro_batch": 1, "share_rotation": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "micro_batch": 2, "share_rotation": False},
        {"recompute_rotation": True},
        {"share_rotation": False},
        {"attention": "plain"},
        {"attention": "sliced"},
        {"channels_last": True},
    ],
    ids=str,
)
def test_ways_to_compute_the_same(make: Callable[..., Distillation], reference: dict, changes: dict) -> None:
    found = learned(make(precision="fp64", base_weights="fp64", **changes))
    assert all(torch.allclose(found[name], reference[name], rtol=1e-6, atol=1e-9) for name in reference)


def test_a_compiled_network_learns_the_same(
    make: Callable[..., Distillation], reference: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_module = torch.nn.Module.compile
    # What inductor makes of it is torch's business; what is traced, and how gradients are found, is ours.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    torch._dynamo.reset()
    run = make(precision="fp64", base_weights="fp64", compile=True)
    found = learned(run)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert all(torch.allclose(found[name], reference[name], rtol=1e-6, atol=1e-9) for name in reference)
    torch._dynamo.reset()


def test_checkpointing_is_really_active(make: Callable[..., Distillation]) -> None:
    calls = {}
    for active in (False, True):
        run = make(gradient_checkpointing=active)
        counts = [0]
        layer = next(layer for path, layer in rotated_layers(run.model.network) if path.endswith("attn1.to_q"))
        layer.register_forward_hook(lambda *_, counts=counts: counts.__setitem__(0, counts[0] + 1))
        run.update_student(range(4))
        calls[active] = counts[0]
    assert calls[True] == calls[False] + 1  # of the student's call alone, in backward


def test_checkpointing_keeps_less_for_backward(make: Callable[..., Distillation]) -> None:
    kept = {}
    for active in (False, True):
        run = make(gradient_checkpointing=active, batch=4)
        sizes = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        z = torch.randn(4, 4, 8, 8)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run.roles.predict(STUDENT, z, torch.full((4,), 999), run.encode(["a"] * 4))
        kept[active] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_calls_of_one_role_share_its_rotated_weights(
    make: Callable[..., Distillation], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wadi_core.lorad import linear

    counts = {}
    for share in (False, True):
        run = make(share_rotation=share, micro_batch=1)
        turned = [0]
        original = linear.turned

        def counted(*args: object, turned: list[int] = turned, original: Callable = original) -> torch.Tensor:
            turned[0] += 1
            return original(*args)

        monkeypatch.setattr(linear, "turned", counted)
        run.train_step()
        monkeypatch.undo()
        counts[share] = turned[0]
        assert all(not layer._kept for _, layer in rotated_layers(run.model.network))  # and gives them back
    layers = {role: len(run.roles.adapters[role].layers) for role in (STUDENT, FAKE)}
    # Four calls: the student in each; the fake score in each for its judgement, and in each for its own update.
    assert counts[False] == 4 * layers[STUDENT] + 8 * layers[FAKE]
    assert counts[True] == layers[STUDENT] + layers[FAKE]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near(make: Callable[..., Distillation], precision: str) -> None:
    whole, half = make(), make(precision=precision)
    for run in (whole, half):
        run.train_step()
    for role in (STUDENT, FAKE):
        assert all(parameter.dtype == torch.float32 for parameter in half.roles.parameters(role))
        one, other = (torch.cat([v.flatten() for v in run.roles.state(role).values()]) for run in (whole, half))
        assert (one - other).norm() < 0.02 * one.norm()


def test_rounding_once_is_what_autocast_does_each_time(
    make: Callable[..., Distillation], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.models import placement

    once = make(precision="bf16")
    assert once.model.network.conv_in.weight.dtype == torch.bfloat16
    monkeypatch.setattr(placement, "round_once", lambda *_: None)
    always = make(precision="bf16")
    assert always.model.network.conv_in.weight.dtype == torch.float32
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([999, 20]), once.encode(["a", "b"])
    for role in (TEACHER, STUDENT, FAKE):
        with torch.no_grad():
            assert torch.equal(once.roles.predict(role, x, t, text), always.roles.predict(role, x, t, text))


@pytest.mark.parametrize(("kind", "share"), [("fp8", 0.04), ("nf4", 0.12)])
def test_weights_in_few_bits(kind: str, share: float) -> None:
    linear = torch.nn.Linear(200, 48)
    stored = QuantisedLinear(linear, kind)
    dense = stored.dense()
    assert dense.shape == (48, 200) and (dense - linear.weight).norm() < share * linear.weight.norm()
    room = sum(buffer.numel() * buffer.element_size() for buffer in stored.buffers())
    assert room <= linear.weight.numel() * (1.05 if kind == "fp8" else 0.75)  # 200 columns are four blocks of 64
    x = torch.randn(5, 200, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = stored(x)
    assert not kept  # the codes stay where they are
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, linear.bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(5, 200))
    again = QuantisedLinear(torch.nn.Linear(200, 48), kind).to(torch.bfloat16)
    assert again.codes.dtype == stored.codes.dtype and again.scales.dtype == torch.float32


def test_levels_are_those_of_normal_float() -> None:
    # Of Dettmers et al., "QLoRA", 2023, appendix E, to four places.
    published = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    published += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    torch.testing.assert_close(LEVELS, torch.tensor(published), rtol=0, atol=6e-5)


def test_angles_turn_what_few_bits_stand_for() -> None:
    linear = torch.nn.Linear(64, 16)
    stored = QuantisedLinear(linear, "nf4")
    a, b = torch.randn(16, 2), torch.randn(2, 32)
    layer = RotatedLinear(stored)
    layer.add("student", a, b, trainable=True)
    x = torch.randn(3, 64)
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, rotate(stored.dense(), a @ b), linear.bias))
    y.square().sum().backward()
    a, b = a.requires_grad_(), b.requires_grad_()
    torch.nn.functional.linear(x, rotate(stored.dense(), a @ b), linear.bias).square().sum().backward()
    torch.testing.assert_close(layer.lorad_a["student"].grad, a.grad, rtol=1e-4, atol=1e-4)
    layer.active = ()
    assert torch.equal(layer(x), stored(x))


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_a_base_in_few_bits_is_distilled(make: Callable[..., Distillation], kind: str) -> None:
    run = make(base_weights=kind)
    plain = make()
    inside = [path for path, layer in run.model.network.named_modules() if isinstance(layer, QuantisedLinear)]
    assert not inside  # every one of them is turned, and what turns it stands in its place
    assert all(isinstance(layer.original, QuantisedLinear) for _, layer in rotated_layers(run.model.network))
    logs = [one.train_step() for one in (run, plain)]
    assert logs[0]["fake_loss"] == pytest.approx(logs[1]["fake_loss"], rel=0.05)
    assert run.model.base_sha256 == plain.model.base_sha256  # the file is for the base, not for its few bits


@pytest.mark.parametrize("adapter", ["lora", "dora", "oft", "full"])
def test_other_adapters_play_the_same_roles(make: Callable[..., Distillation], adapter: str) -> None:
    if adapter != "full":
        pytest.importorskip("peft")
    run = make(adapter=adapter, student_lr=1e-2)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([999, 500]), run.encode(["a", "b"])
    lorad = make()
    with torch.no_grad():
        bare = lorad.roles.predict(TEACHER, x, t, text)
        assert torch.equal(run.roles.predict(TEACHER, x, t, text), bare)
        assert torch.equal(run.roles.predict(FAKE, x, t, text), lorad.roles.predict(FAKE, x, t, text))
    before = run.roles.state(STUDENT)
    learned(run)
    after = run.roles.state(STUDENT)
    assert all(not torch.equal(after[name], before[name]) for name in after if "magnitude" not in name)
    with torch.no_grad():
        assert torch.equal(run.roles.predict(TEACHER, x, t, text), bare)
        student = run.roles.predict(STUDENT, x, t, text)
    assert not torch.equal(student, bare)
    # The weights that are written make a plain network that says the same.
    from diffusers import UNet2DConditionModel

    written = UNet2DConditionModel.from_config(run.model.network.config)
    written.load_state_dict(run.student().weights())
    with torch.no_grad():
        torch.testing.assert_close(written(x, t, text.text).sample, student, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lorad", "lora"), ("full", "full")], ids=str)
def test_the_fake_score_may_be_of_any_kind_too(make: Callable[..., Distillation], kinds: tuple[str, str]) -> None:
    if "lora" in kinds:
        pytest.importorskip("peft")
    run = make(adapter=kinds[0], fake_adapter=kinds[1])
    before = {role: run.roles.state(role) for role in (STUDENT, FAKE)}
    learned(run)
    for role in (STUDENT, FAKE):
        assert any(not torch.equal(now, before[role][name]) for name, now in run.roles.state(role).items())


def test_the_weights_of_a_lorad_are_those_it_computes_with(make: Callable[..., Distillation]) -> None:
    from diffusers import UNet2DConditionModel

    run = make()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([999, 500]), run.encode(["a", "b"])
    written = UNet2DConditionModel.from_config(run.model.network.config)
    written.load_state_dict(run.student().weights())
    with torch.no_grad():
        torch.testing.assert_close(
            written(x, t, text.text).sample, run.roles.predict(STUDENT, x, t, text), rtol=1e-4, atol=1e-4
        )


def test_a_student_begins_with_the_lorad_of_a_file(base: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt")
    first = Distillation(tiny(base, prompts, tmp_path / "first"))
    stir(first)
    metadata = Metadata(architecture=first.model.architecture)
    first.student().lorad(metadata).save(tmp_path / "begun.safetensors", torch.float32)
    again = Distillation(tiny(base, prompts, tmp_path / "again", start_from=str(tmp_path / "begun.safetensors")))
    before, after = (run.roles.state(STUDENT) for run in (first, again))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    x, t = torch.randn(2, *again.latent_shape), torch.tensor([999, 999])
    condition = again.encode(["a cat", "a dog"])
    assert torch.equal(first.roles.predict(STUDENT, x, t, condition), again.roles.predict(STUDENT, x, t, condition))
    with pytest.raises(ValueError, match=r"start_from: .*begun.safetensors turns \d+ layers at rank \d+; the student"):
        other = again.config.student_rank + 1
        Distillation(tiny(base, prompts, tmp_path / "rank", start_from=str(tmp_path / "begun.safetensors"), student_rank=other))
    first.student().lorad(Metadata(architecture="pixart-alpha")).save(tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"start_from: .*other.safetensors: the LoRaD does not fit this network: it is made for"
    ):
        Distillation(tiny(base, prompts, tmp_path / "other", start_from=str(tmp_path / "other.safetensors")))
    with pytest.raises(ValueError, match="start_from: a LoRaD can only begin a student that is one, not adapter: full"):
        tiny(base, prompts, tmp_path / "full", start_from="begun.safetensors", adapter="full")


def test_an_exact_student_among_rough_roles(base: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt")
    runs = {
        name: Distillation(tiny(base, prompts, tmp_path / name, fake_adapter="lorad", **options))
        for name, options in {
            "fine": {"precision": "fp32"},
            "rough": {"precision": "bf16"},
            "mixed": {"precision": "bf16", "student_precision": "fp32"},
        }.items()
    }
    for run in runs.values():
        stir(run)
    x, t = torch.randn(2, *runs["fine"].latent_shape), torch.tensor([999, 999])

    def told(name: str, role: str) -> torch.Tensor:
        with torch.no_grad():
            return runs[name].roles.predict(role, x, t, runs[name].encode(["a cat", "a dog"]))

    assert torch.equal(told("mixed", STUDENT), told("fine", STUDENT))
    assert not torch.equal(told("rough", STUDENT), told("fine", STUDENT))
    for role in (TEACHER, FAKE):
        assert torch.equal(told("mixed", role), told("rough", role))
    runs["mixed"].train_step()
    with pytest.raises(ValueError, match="student_precision: fp32 needs base_weights=fp32, not bf16"):
        tiny(base, prompts, tmp_path / "stored", precision="bf16", base_weights="bf16", student_precision="fp32")


def test_muon_goes_on_bit_for_bit(make: Callable[..., Distillation]) -> None:
    options = {"optimizer": "muon", "student_rank": 12, "fake_adapter": "full"}
    one, other = make(**options), make(**options)
    one.train_step()
    other.load_state(copy.deepcopy(one.state()))
    before = one.roles.state(STUDENT) | one.roles.state(FAKE)
    assert set(one.updaters[STUDENT].state()["optimizer"]) == {"Muon"}
    assert set(one.updaters[FAKE].state()["optimizer"]) == {"Muon", "AdamW"}  # biases, norms and what has four channels
    for run in (one, other):
        run.train_step()
    for role in (STUDENT, FAKE):
        found, again = one.roles.state(role), other.roles.state(role)
        assert all(torch.equal(found[name], again[name]) for name in found)
        assert not any(torch.equal(found[name], before[name]) for name in found if found[name].ndim == 2)


def test_peft_is_asked_for(make: Callable[..., Distillation], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="adapter: lora needs peft"):
        make(adapter="lora")


def test_embeddings_are_kept_and_the_encoder_rests(
    make: Callable[..., Distillation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = learned(make())
    first = learned(make(embedding_cache=str(tmp_path)))

    def refuse(*_: object) -> None:
        raise AssertionError("the text encoder was called")

    monkeypatch.setattr(StableDiffusion, "embed", refuse)
    second = learned(make(embedding_cache=str(tmp_path)))
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], plain[name]) for name in plain)


def test_noise_belongs_to_its_sample() -> None:
    whole = random_draws.draw(7, random_draws.STUDENT, range(6), (4, 8, 8), 20, 980)
    part = random_draws.draw(7, random_draws.STUDENT, range(3, 5), (4, 8, 8), 20, 980)
    for name in ("z", "eps", "t", "lot"):
        assert torch.equal(getattr(whole, name)[3:5], getattr(part, name))
    other = random_draws.draw(7, random_draws.FAKE, range(6), (4, 8, 8), 20, 980)
    assert not torch.equal(whole.z, other.z) and not torch.equal(whole.z, whole.eps)
    many = random_draws.draw(0, random_draws.FAKE, range(2000), (1, 4, 4), 0, 999)
    assert abs(many.z.mean()) < 0.02 and abs(many.z.std() - 1) < 0.02
    assert many.t.min() >= 0 and many.t.max() <= 999 and abs(many.t.float().mean() - 499.5) < 25
    assert abs(many.lot.mean() - 0.5) < 0.03


def test_conditions_are_joined_and_dropped_with_their_masks() -> None:
    told = Condition(torch.randn(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0]] * 3))
    null = Condition(torch.zeros(1, 5, 4), torch.tensor([[1, 0, 0, 0, 0]]))
    both = told.joined(null)
    assert len(both) == 6 and torch.equal(both.text[3:], torch.zeros(3, 5, 4)) and both.mask[3:].sum() == 3
    dropped = told.where(torch.tensor([True, False, True]), null)
    assert torch.equal(dropped.text[1], told.text[1]) and not dropped.text[0].any()
    assert dropped.mask.sum(1).tolist() == [1, 2, 1]
    assert told[1:].mask.shape == (2, 5) and told.to(torch.float64).mask.dtype == torch.int64
