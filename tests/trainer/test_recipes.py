"""Each loss, adversary and start trains every base, goes on bit for bit, and is the same in two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetuning_runs import write_pictures
from pixart import write_pixart
from training import small_base, tiny, write_prompts

from trainer.distill.distillation import Distillation
from trainer.distill.export import export
from trainer.distill.roles import FAKE, STUDENT
from trainer.distill.session import train
from trainer.engine.checkpoints import read_checkpoint
from wadi_core import LoRaD, OneStepPipeline
from wadi_core.pipeline import noise

# Everything at once that can be had together, so that few runs say it for all.
RECIPES = {
    "sid": {"loss": "sid", "normalize": True, "sid_alpha": 1.2, "start": "625"},
    "dmd": {"loss": "dmd", "normalize": True, "fake_updates": 3, "fake_lr_rule": "sqrt", "start": "399"},
    "features": {"adversary": "features", "adversary_steps": 2, "f_weight": "jensen_shannon", "anchor_steps": 2},
}
COSINE = {"lr_schedule": "cosine", "fake_lr_schedule": "cosine", "decay_steps": 3, "lr_end": 0.0}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_pixart(folder / kind) if kind == "pixart" else small_base(folder / kind, kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(("name", "kind"), [("sid", "sd15"), ("dmd", "sd21"), ("features", "pixart"), ("real", "sd15")])
def test_stopped_and_gone_on(name: str, kind: str, bases: Callable[[str], Path], prompts: Path, tmp_path: Path) -> None:
    changes = {**COSINE, **(RECIPES.get(name) or {"adversary": "real", "adversary_steps": 3}), "resolution": 64}
    if name == "real":
        changes["adversary_pictures"] = str(write_pictures(tmp_path / "pictures"))
        for picture in (tmp_path / "pictures").glob("*.png"):
            picture.with_suffix(".txt").write_text(f"a cat called {picture.stem}")
    whole = {**changes, "steps": 4, "save_every": 2}
    train(tiny(bases(kind), prompts, tmp_path / "straight", **whole))
    stopped = Distillation(tiny(bases(kind), prompts, tmp_path / "other", **whole))
    for _ in range(2):
        stopped.train_step()
    begun = read_checkpoint(tmp_path / "straight" / "step-00000002.pt")
    elsewhere = {"random": 0, "settings": 0}
    assert same({**stopped.state(), **elsewhere}, {**begun, **elsewhere})
    again = Distillation(tiny(bases(kind), prompts, tmp_path / "other", **whole))
    again.load_state(begun)
    for _ in range(2):
        again.train_step()
    ended = read_checkpoint(tmp_path / "straight" / "step-00000004.pt")
    for part in (STUDENT, FAKE, "average", "updaters", "adversary"):
        assert same(again.state().get(part), ended.get(part)), part
    assert any(value.abs().max() > 0 for path, value in ended[STUDENT].items() if path.endswith(".a"))
    if "adversary" in changes:
        assert ended["adversary"]["layers.3.weight"].any()


@pytest.mark.parametrize(
    ("start", "wanted"), [("wadi", (999, "one")), ("625", (625, "sigma")), ("399", (399, "one")), ("249", (249, "one"))]
)
def test_what_was_trained_is_what_is_drawn(
    start: str, wanted: tuple[int, str], bases: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    run = Distillation(tiny(bases("sd15"), prompts, tmp_path, start=start, ema=0.0))
    squared = float(run.model.alphas_cumprod[wanted[0]]) if start != "wadi" else 0.0047
    assert (run.one_step.timestep, run.one_step.input_scale) == wanted
    assert run.one_step.alpha_T_squared == pytest.approx(squared, rel=1e-5)
    with torch.no_grad():
        for parameter in run.roles.parameters(STUDENT):
            parameter.normal_(std=0.2)
    lorad = LoRaD.load(export(run, tmp_path))
    assert lorad.one_step == run.one_step
    assert lorad.metadata.to_strings(4, "a")["wadi.format"] == ("2" if start == "625" else "1")
    z, (alpha, sigma) = noise([7], 64, 64), (squared**0.5, (1 - squared) ** 0.5)
    x = sigma * z if wanted[1] == "sigma" else z
    with torch.no_grad():
        eps = run.roles.predict(STUDENT, x, torch.tensor([wanted[0]]), run.encode(["a cat"]))
    expected = (x - sigma * eps) / alpha
    pipe = OneStepPipeline.from_pretrained(bases("sd15"), lorad, device="cpu", dtype="fp32")
    (plan,) = pipe.plan("a cat", seed=7, width=64, height=64)
    (made,) = pipe.run([plan])
    torch.testing.assert_close(made.latents, expected, rtol=1e-3, atol=1e-3)
    stock = pipe.scheduler
    found = stock.step(eps, stock.timesteps[0], z).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (plan.timestep, plan.input_scale) == wanted


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"start": "399", "timestep": 500}, "timestep: start=399 sets it to 399, and 500 is given"),
        ({"adversary": "real"}, "adversary: real needs pictures"),
        ({"adversary_pictures": "x"}, "adversary_pictures: they are looked at with adversary=real only"),
        ({"f_weight": "hellinger"}, "f_weight: hellinger needs an adversary"),
        ({"adversary": "features", "compile": True}, "adversary: it looks inside the network"),
        ({"alpha_T_squared": 1e-7}, "alpha_T_squared: 0, or at least 1e-06"),
        ({"fake_updates": 11}, "fake_updates: 1 to 10"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        tiny(tmp_path, tmp_path, tmp_path, **changes)
