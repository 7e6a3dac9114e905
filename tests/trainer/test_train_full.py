"""Networks of full size with random weights, three steps on the CPU at a small resolution: train, save, go on, export.

Each takes some minutes and up to 20 GB: ``python -m pytest -m full tests/trainer/test_train_full.py -k sd15``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import warm_trainer
from networks import make_networks, small_settings, states, write_folder, write_settings
from pixart import write_pixart
from training import small_base, write_prompts

from trainer.distill.estimate import estimate
from trainer.distill.roles import FAKE, STUDENT
from trainer.distill.session import train
from trainer.engine.checkpoints import read_checkpoint
from trainer.settings import fields as settings
from trainer.settings.distillation import TrainConfig
from wadi_core import LoRaD, configs
from wadi_core.base import STEMS
from wadi_core.lorad.checkpoint import write_safetensors

CONFIGS = Path(settings.__file__).parents[1] / "configs"
# Trained parameters of student and fake score, and their layers (METHOD of the paper: 83.8M, 94.4M, 81.2M).
COUNTS = {
    "sd15": (83_795_968, 182, 9_378_816),
    "sd21": (94_429_184, 214, 9_509_888),
    "pixart": (81_219_584, 283, 20_127_744),
}


def full_base(folder: Path, name: str) -> Path:
    """A base whose U-Net or transformer has its full size and random weights in float16, with small helpers."""
    if name == "pixart":
        return write_pixart(folder, full_size=True)
    from diffusers import UNet2DConditionModel

    changes = {part: values for part, values in small_settings(name).items() if part == "vae"}
    write_settings(folder, name, changes)
    torch.manual_seed(0)
    small = small_base(folder.parent / f"{name}-small", name)
    for part in ("vae", "text_encoder"):
        (folder / part / f"{STEMS[part]}.safetensors").write_bytes((small / part / f"{STEMS[part]}.safetensors").read_bytes())
    width = configs.read(folder / "text_encoder" / "config.json")["hidden_size"]
    text = {**configs.read(small / "text_encoder" / "config.json"), "hidden_size": width, "num_attention_heads": 8}
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**text, "num_hidden_layers": 1}))
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(CLIPTextConfig.from_dict(configs.read(folder / "text_encoder" / "config.json")))
    write_safetensors(folder / "text_encoder" / "model.safetensors", dict(encoder.state_dict()), {"format": "pt"})
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs.read(folder / "unet" / "config.json"))
    weights = {name: cheap_weights(name, tensor.shape) for name, tensor in unet.state_dict().items()}
    write_safetensors(folder / "unet" / f"{STEMS['unet']}.safetensors", weights, {"format": "pt"})
    return folder


def cheap_weights(name: str, shape: torch.Size) -> torch.Tensor:
    """Numbers of a sensible size, the same few again and again: to draw a billion of them takes long."""
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
    few = (torch.randn(65537) / shape[1:].numel() ** 0.5).half()
    return few.repeat(shape.numel() // len(few) + 1)[: shape.numel()].view(shape).clone()


@pytest.mark.full
@pytest.mark.parametrize("name", list(COUNTS))
def test_full_size_in_three_steps(name: str, tmp_path: Path) -> None:
    base, prompts = full_base(tmp_path / "base", name), write_prompts(tmp_path / "prompts.txt")
    words = [f"base={base}", f"prompts={prompts}", f"output={tmp_path / 'run'}", "device=cpu", "batch=1", "micro_batch=0"]
    words += ["resolution=64", "save_every=2", "keep_last=1", "sheet_every=1000", "tensorboard=false", "precision=bf16"]
    words += ["base_weights=bf16", "keep_every=0"]
    words += ["embedding_cache="] if name == "pixart" else []
    preset = CONFIGS / f"{name}.yaml"
    config = settings.load(TrainConfig, preset, [*words, "steps=3"])
    figures = estimate(config)
    student, layers, fake = COUNTS[name]
    assert (figures.student, figures.student_layers, figures.fake) == (student, layers, fake)
    train(settings.load(TrainConfig, preset, [*words, "steps=2"]))
    state = read_checkpoint(tmp_path / "run" / "step-00000002.pt")
    counts = {role: sum(value.numel() for value in state[role].values()) for role in (STUDENT, FAKE)}
    assert counts == {STUDENT: student, FAKE: fake}
    del state
    written = train(config)
    lorad = LoRaD.load(written)
    assert (lorad.parameters_count, len(lorad.factors)) == (student, layers)
    assert lorad.metadata.architecture == {"pixart": "pixart-alpha"}.get(name, name)
    assert lorad.one_step is not None and lorad.metadata.resolution == "64x64"
    assert any(a.abs().max() > 0 for a, _ in lorad.factors.values())
    assert [path.name for path in (tmp_path / "run").glob("step-*.pt")] == ["step-00000003.pt"]


@pytest.mark.full
def test_killed_at_twenty_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of wadi-mini with its own settings, but for weights at random and a small batch."""
    base = write_settings(tmp_path / "base", "wadi-mini")
    write_folder(base, states(make_networks(base)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the forkserver of some Pythons does not know our path
    dice, kills, processes = random.Random(5), 20, warm_trainer.context()

    def begin(name: str) -> BaseProcess:
        words = [f"base={base}", f"output={tmp_path / name}", "device=cpu", "ema=0.9", "name=one-step", "steps=32", "batch=1"]
        words += ["save_every=1", "sheet_every=7", "tensorboard=false"]
        process = processes.Process(target=warm_trainer.run, args=(str(CONFIGS / "mini.yaml"), words))
        process.start()
        return process

    def ended(process: BaseProcess) -> int | None:
        process.join()
        return process.exitcode

    def newest(name: str) -> str:
        return max((path.name for path in (tmp_path / name).glob("step-*.pt")), default="")

    def wait_for_another(run: BaseProcess, name: str, before: str) -> None:
        while newest(name) == before and run.is_alive():
            time.sleep(0.02)

    began = time.monotonic()
    run = begin("straight")
    wait_for_another(run, "straight", "")
    until_first = time.monotonic() - began
    assert ended(run) == 0
    step = (time.monotonic() - began - until_first) / 32
    seen, rounds = set(), ["killed-1"]
    while kills:
        name = rounds[-1]
        run = begin(name)
        # Some moments anywhere in loading, most in training, writing a checkpoint, or drawing.
        if dice.random() < 0.25:
            time.sleep(dice.random() * until_first)
        else:
            wait_for_another(run, name, newest(name))
            time.sleep(dice.random() * step)
        run.kill()
        if ended(run) == 0:  # at its end before we were
            rounds.append(f"killed-{len(rounds) + 1}")
            continue
        kills -= 1
        seen.add((name, newest(name)))
    assert len(seen) > 6 and ended(begin(rounds[-1])) == 0
    straight = read_checkpoint(tmp_path / "straight" / "step-00000032.pt")
    for name in rounds:
        one, other = (LoRaD.load(tmp_path / each / "one-step.safetensors") for each in ("straight", name))
        assert all(torch.equal(x, y) for key in one.factors for x, y in zip(one.factors[key], other.factors[key], strict=True))
        end = read_checkpoint(tmp_path / name / "step-00000032.pt")
        for part in (STUDENT, FAKE, "average"):
            assert all(torch.equal(value, end[part][key]) for key, value in straight[part].items())
        for role in (STUDENT, FAKE):
            for one, other in zip(*(optimizers(each, role) for each in (straight, end)), strict=True):
                moments = one["state"], other["state"]
                assert moments[0] and moments[0].keys() == moments[1].keys()
                assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])


def optimizers(checkpoint: dict, role: str) -> list[dict]:
    """The states of the optimizers of a role; the preset's Muon has AdamW beside it for what is no matrix."""
    return list(checkpoint["updaters"][role]["optimizer"].values())
