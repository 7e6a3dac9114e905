"""The first trainer: roles of one network, VSD, configuration, checkpoints that survive a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from networks import make_networks, small_settings, states, write_folder, write_settings

from trainer import config as settings
from trainer.prompts import Prompts
from trainer.roles import FAKE, STUDENT, TEACHER
from trainer.state import Checkpoints
from trainer.train import Distillation, TrainConfig, main
from trainer.vsd import Noising, fake_loss, generate, student_loss
from wadi_core import LoRaD
from wadi_core.schedule import OneStep

SCRIPT = Path(__file__).parents[1] / "trainer" / "train.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_settings(tmp_path_factory.mktemp("base") / "small", "sd15", small_settings("sd15"))
    return write_folder(folder, states(make_networks(folder)))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\n\na red apple\na boat on the sea\n")
    return path


def tiny(base: Path, prompts: Path, output: Path, **changes: object) -> TrainConfig:
    values = {
        "base": str(base), "prompts": str(prompts), "output": str(output), "steps": 6, "batch": 2, "student_rank": 4,
        "fake_rank": 2, "save_every": 2, "sheet_every": 100, "bf16": False, "ema": 0.9,
    }  # fmt: skip
    return settings.build(TrainConfig, {**values, **changes})


def test_one_network_serves_three_roles(base: Path, prompts: Path, tmp_path: Path) -> None:
    run = Distillation(tiny(base, prompts, tmp_path))
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([999, 500]), run.pipeline.encode(["a", "b"])
    bare = run.roles.eps(TEACHER, x, t, text)
    assert torch.equal(run.roles.eps(STUDENT, x, t, text), bare)  # angles start at zero
    for _ in range(2):  # at first the fake score equals the teacher, and nothing moves the student
        run.train_step()
    assert torch.equal(run.roles.eps(TEACHER, x, t, text), bare)
    student, fake = run.roles.eps(STUDENT, x, t, text), run.roles.eps(FAKE, x, t, text)
    assert not torch.equal(student, bare)
    assert not torch.equal(fake, bare)
    assert not torch.equal(student, fake)
    storages = {parameter.data_ptr() for parameter in run.base.unet.parameters() if not parameter.requires_grad}
    elements = sum(p.numel() for p in run.base.unet.parameters() if not p.requires_grad)
    assert len(storages) == sum(not p.requires_grad for p in run.base.unet.parameters())
    assert elements == sum(p.numel() for p in make_networks(base)["unet"].parameters())  # one copy, not three


def test_losses_follow_the_formulas(base: Path, prompts: Path, tmp_path: Path) -> None:
    run = Distillation(tiny(base, prompts, tmp_path))
    with torch.no_grad():
        for parameter in (*run.student_parameters, *run.fake_parameters):
            parameter.normal_(std=0.3)
    text = run.pipeline.encode(["a cat", "a dog"])
    z, eps, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([300, 700])
    x0 = generate(run.roles, z, text, OneStep())
    loss, log = student_loss(run.roles, run.noising, x0, text, run.null, t, eps, 1.5, 2.0)
    squared = run.noising.alphas_cumprod[t].view(-1, 1, 1, 1)
    alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
    x_t = alpha * x0.detach() + sigma * eps
    null = run.null.expand_as(text)
    with torch.no_grad():
        real, real_null = run.roles.eps(TEACHER, x_t, t, text), run.roles.eps(TEACHER, x_t, t, null)
        fake, fake_null = run.roles.eps(FAKE, x_t, t, text), run.roles.eps(FAKE, x_t, t, null)
    grad = sigma**2 * ((real_null + 1.5 * (real - real_null)) - (fake_null + 2.0 * (fake - fake_null)))
    torch.testing.assert_close(loss, 0.5 * grad.square().mean(), rtol=1e-4, atol=1e-8)
    assert log["vsd_grad"] == pytest.approx(grad.abs().mean().item(), rel=1e-4)
    # The gradient that reaches x0 is grad / n, as 0.5 mse gives it.
    (got,) = torch.autograd.grad(loss, x0, retain_graph=True)
    torch.testing.assert_close(got, grad / grad.numel(), rtol=1e-3, atol=1e-8)
    expected = (alpha * (run.roles.eps(FAKE, x_t, t, text) - eps)).square().mean()
    torch.testing.assert_close(fake_loss(run.roles, run.noising, x0, text, t, eps), expected, rtol=1e-4, atol=1e-8)


def test_noise_is_added_as_the_scheduler_does() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    ours = Noising(scheduler.alphas_cumprod).add_noise(x0, eps, t)
    torch.testing.assert_close(ours, scheduler.add_noise(x0, eps, t))


def test_a_run_writes_a_lorad_that_the_core_reads(base: Path, prompts: Path, tmp_path: Path) -> None:
    run = Distillation(tiny(base, prompts, tmp_path, sheet_every=3))
    run.run()
    lorad = LoRaD.load(tmp_path / "one-step.safetensors")
    assert lorad.rank == 4
    assert lorad.one_step == OneStep(0.0047, 999)
    assert str(lorad.matched(run.base.unet)).startswith(f"{len(lorad.factors)} of {len(lorad.factors)} layers")
    assert any(a.abs().max() > 0 for a, _ in lorad.factors.values())
    assert {path.name for path in tmp_path.iterdir()} >= {"losses.csv", "losses.png", "sheet-000003.png", "sheet-000006.png"}


def test_stopping_and_going_on_changes_nothing(base: Path, prompts: Path, tmp_path: Path) -> None:
    straight = Distillation(tiny(base, prompts, tmp_path / "straight"))
    straight.run()
    Distillation(tiny(base, prompts, tmp_path / "halved", steps=3)).run()
    resumed = Distillation(tiny(base, prompts, tmp_path / "halved"))
    resumed.run()
    for role in (STUDENT, FAKE):
        one, other = straight.roles.state(role), resumed.roles.state(role)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(straight.average[name], resumed.average[name]) for name in straight.average)


def test_a_killed_run_goes_on_bit_for_bit(base: Path, prompts: Path, tmp_path: Path) -> None:
    words = [f"base={base}", f"prompts={prompts}", "steps=40", "batch=2", "student_rank=4", "fake_rank=2", "save_every=2"]
    words += ["sheet_every=1000", "bf16=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(output: Path) -> subprocess.Popen:
        command = [sys.executable, str(SCRIPT), f"output={output}", *words]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    assert start(tmp_path / "straight").wait(300) == 0
    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "killed").glob("step-*.pt"))) < 2 and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "one-step.safetensors").exists()
    assert start(tmp_path / "killed").wait(300) == 0
    one, other = (LoRaD.load(tmp_path / name / "one-step.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(x, y) for key in one.factors for x, y in zip(one.factors[key], other.factors[key], strict=True))


def test_ctrl_c_saves_and_leaves(base: Path, prompts: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        f"base={base}",
        f"prompts={prompts}",
        f"output={tmp_path}",
        "steps=100000",
        "batch=1",
    ]
    command += ["student_rank=2", "fake_rank=2", "save_every=3", "sheet_every=100000"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("step-*.pt")) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert run.wait(120) == 0
    assert LoRaD.load(tmp_path / "one-step.safetensors").rank == 2


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step, "x": torch.ones(100)})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002.pt", "step-00000003.pt"]
    newest = tmp_path / "step-00000003.pt"
    newest.write_bytes(newest.read_bytes()[:300])
    assert checkpoints.latest()["step"] == 2
    (tmp_path / "step-00000002.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints can be read"):
        checkpoints.latest()
    assert Checkpoints(tmp_path / "empty").latest() is None


def test_another_run_in_the_same_folder_is_refused(base: Path, prompts: Path, tmp_path: Path) -> None:
    Distillation(tiny(base, prompts, tmp_path, steps=2)).run()
    with pytest.raises(ValueError, match="holds a run with student_rank=4, not 8"):
        Distillation(tiny(base, prompts, tmp_path, student_rank=8)).run()


@dataclass
class Example:
    size: int = 1
    rate: float = 0.5
    name: str = "x"
    sizes: tuple[int, ...] = (1, 2)
    place: str | None = None


def test_settings_are_typed(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("size: 3\nrate: 1e-4\nsizes: [4, 5]\n")
    loaded = settings.load(Example, path, ["name=y", "place=null"])
    assert loaded == Example(3, 1e-4, "y", (4, 5), None)
    assert settings.load(Example, None, []) == Example()
    text = tmp_path / "b.yaml"
    text.write_text(settings.as_yaml(loaded))
    assert settings.load(Example, text) == loaded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sizee=1"], "unknown setting 'sizee'; did you mean 'size'?"),
        (["size=big"], "size: int is expected, not 'big'"),
        (["size=1.5"], "size: int is expected"),
        (["sizes=3"], "sizes: a list is expected"),
        (["size"], "an override is written key=value"),
    ],
)
def test_wrong_settings_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings.load(Example, None, words)


def test_prompts_go_on_where_they_were(prompts: Path, tmp_path: Path) -> None:
    one = Prompts(str(prompts), 3)
    assert sorted(one.take(4)) == ["a boat on the sea", "a cat", "a dog", "a red apple"]
    one.take(3)
    state = one.state()
    other = Prompts(str(prompts), 0)
    other.load_state(state)
    assert one.take(9) == other.take(9)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(ValueError, match="no prompt in this file"):
        Prompts(str(empty), 0)


def test_bad_input_to_the_script_is_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", f"base={base}", f"prompts={tmp_path / 'none.txt'}", f"output={tmp_path}"])
    assert main() == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "none.txt" in message
    assert message.count("\n") == 1
