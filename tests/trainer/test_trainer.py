"""A distillation as a whole: roles of one network, VSD, files that the core reads, runs that survive a kill."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from networks import make_networks
from training import command, start, tiny

from trainer.distill.distillation import Distillation
from trainer.distill.roles import FAKE, STUDENT, TEACHER
from trainer.distill.session import train
from trainer.distill.vsd import Recipe, fake_loss, generate, student_loss
from trainer.models.diffusion import Noising
from wadi_core import LoRaD
from wadi_core.schedule import OneStep


def test_one_network_serves_three_roles(base: Path, prompts: Path, tmp_path: Path) -> None:
    run = Distillation(tiny(base, prompts, tmp_path))
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([999, 500]), run.model.encode(["a", "b"])
    with torch.no_grad():
        bare = run.roles.predict(TEACHER, x, t, text)
        assert torch.equal(run.roles.predict(STUDENT, x, t, text), bare)  # angles start at zero
    for _ in range(2):  # at first the fake score equals the teacher, and nothing moves the student
        run.train_step()
    with torch.no_grad():
        assert torch.equal(run.roles.predict(TEACHER, x, t, text), bare)
        student, fake = (run.roles.predict(role, x, t, text) for role in (STUDENT, FAKE))
    assert not torch.equal(student, bare)
    assert not torch.equal(fake, bare)
    assert not torch.equal(student, fake)
    frozen = [parameter for parameter in run.model.network.parameters() if not parameter.requires_grad]
    assert len({parameter.data_ptr() for parameter in frozen}) == len(frozen)
    elements = sum(p.numel() for p in make_networks(base)["unet"].parameters())
    assert sum(p.numel() for p in frozen) == elements  # one copy, not three


def test_losses_follow_the_formulas(base: Path, prompts: Path, tmp_path: Path) -> None:
    run = Distillation(tiny(base, prompts, tmp_path))
    roles = run.roles
    with torch.no_grad():
        for role in (STUDENT, FAKE):
            for parameter in roles.parameters(role):
                parameter.normal_(std=0.3)
    text = run.model.encode(["a cat", "a dog"])
    z, eps, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([300, 700])
    x0 = generate(roles, z, text, OneStep())
    loss, log = student_loss(roles, run.noising, x0, text, run.null, t, eps, Recipe(1.5, 2.0))
    squared = run.noising.alphas_cumprod[t].view(-1, 1, 1, 1).float()
    alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
    x_t = alpha * x0.detach() + sigma * eps
    null = run.null.where(torch.tensor([True]), run.null)
    both = type(null)(null.text.expand_as(text.text))
    with torch.no_grad():
        real, real_null = roles.predict(TEACHER, x_t, t, text), roles.predict(TEACHER, x_t, t, both)
        fake, fake_null = roles.predict(FAKE, x_t, t, text), roles.predict(FAKE, x_t, t, both)
    grad = sigma**2 * ((real_null + 1.5 * (real - real_null)) - (fake_null + 2.0 * (fake - fake_null)))
    torch.testing.assert_close(loss, 0.5 * grad.square().mean(), rtol=1e-4, atol=1e-8)
    assert log["vsd_grad"].item() == pytest.approx(grad.abs().mean().item(), rel=1e-4)
    assert log["nonfinite"].item() == 0
    # The gradient that reaches x0 is grad / n, as 0.5 mse gives it.
    (got,) = torch.autograd.grad(loss, x0, retain_graph=True)
    torch.testing.assert_close(got, grad / grad.numel(), rtol=1e-3, atol=1e-8)
    expected = (alpha * (roles.predict(FAKE, x_t, t, text) - eps)).square().mean()
    torch.testing.assert_close(fake_loss(roles, run.noising, x0, text, t, eps), expected, rtol=1e-4, atol=1e-8)


def test_noise_is_added_as_the_scheduler_does() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    ours = Noising(scheduler.alphas_cumprod).add_noise(x0, eps, t)
    torch.testing.assert_close(ours, scheduler.add_noise(x0, eps, t))


def test_a_prediction_of_v_is_read_as_noise() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    noising = Noising(scheduler.alphas_cumprod, "v_prediction")
    velocity = scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(noising.eps(velocity, noising.add_noise(x0, eps, t), t), eps)


def test_a_run_writes_a_lorad_that_the_core_reads(base: Path, prompts: Path, tmp_path: Path) -> None:
    written = train(tiny(base, prompts, tmp_path, sheet_every=3, license="CC0-1.0"))
    assert written == tmp_path / "one-step.safetensors"
    lorad = LoRaD.load(written)
    assert lorad.rank == 4
    assert lorad.one_step == OneStep(0.0047, 999)
    unet = make_networks(base)["unet"]
    match = lorad.matched(unet)
    assert str(match).startswith(f"{len(lorad.factors)} of {len(lorad.factors)} layers")
    assert not match.notes  # this is the base that it was trained on
    assert any(a.abs().max() > 0 for a, _ in lorad.factors.values())
    about = lorad.metadata
    assert (about.title, about.license, about.resolution, about.prediction_type) == ("one-step", "CC0-1.0", "64x64", "epsilon")
    assert about.thumbnail.startswith("data:image/jpeg;base64,") and about.extra["ss_steps"] == "6"
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"losses.csv", "angles.csv", "losses.png", "sheet-000003.png", "sheet-000006.png", "config.yaml"}


def test_stopping_and_going_on_changes_nothing(base: Path, prompts: Path, tmp_path: Path) -> None:
    straight, halved, resumed = (tiny(base, prompts, tmp_path / name, steps=steps) for name, steps in
                                 (("straight", 6), ("halved", 3), ("halved", 6)))  # fmt: skip
    for config in (straight, halved, resumed):
        train(config)
    one, other = (torch.load(tmp_path / name / "step-00000006.pt") for name in ("straight", "halved"))
    for part in (STUDENT, FAKE, "average"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    for role in (STUDENT, FAKE):
        moments = [checkpoint["updaters"][role]["optimizer"]["state"] for checkpoint in (one, other)]
        assert all(torch.equal(moments[0][i][name], moments[1][i][name]) for i in moments[0] for name in moments[0][i])


def test_a_killed_run_goes_on_bit_for_bit(base: Path, prompts: Path, tmp_path: Path) -> None:
    def begin(name: str) -> object:
        return start(command(base, prompts, tmp_path / name, steps=40, ema=0.0))

    assert begin("straight").wait(1200) == 0
    killed = begin("killed")
    deadline = time.monotonic() + 1200
    while len(list((tmp_path / "killed").glob("step-*.pt"))) < 2 and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "one-step.safetensors").exists()
    assert begin("killed").wait(1200) == 0
    one, other = (LoRaD.load(tmp_path / name / "one-step.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(x, y) for key in one.factors for x, y in zip(one.factors[key], other.factors[key], strict=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_leaves(base: Path, prompts: Path, tmp_path: Path, number: int) -> None:
    run = start(command(base, prompts, tmp_path, steps=100000, batch=1, save_every=3, sheet_every=100000))
    deadline = time.monotonic() + 1200
    while not list(tmp_path.glob("step-*.pt")) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(number)
    _, told = run.communicate(timeout=600)
    assert run.returncode == 0
    assert "finishing this step (about 1 s), then saving; press again to leave without saving\n" in told
    assert "of 100000 steps; the same command goes on from there\n" in told
    assert LoRaD.load(tmp_path / "one-step.safetensors").rank == 4
