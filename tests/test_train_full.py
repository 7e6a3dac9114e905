"""Networks of full size with random weights, three steps on the CPU at a small resolution: train, save, go on, export.

Each takes some minutes and up to 20 GB: ``python -m pytest -m full tests/test_train_full.py -k sd15``.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from networks import small_settings, write_settings
from pixart import write_pixart
from training import command, small_base, start, write_prompts

from trainer import config as settings
from trainer.distillation import Distillation
from trainer.estimate import estimate
from trainer.roles import FAKE, STUDENT
from trainer.schema import TrainConfig
from trainer.session import train
from wadi_core import LoRaD, configs
from wadi_core.base import STEMS
from wadi_core.lorad.checkpoint import write_safetensors

CONFIGS = Path(settings.__file__).parent / "configs"
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
    unet = UNet2DConditionModel.from_config(configs.read(folder / "unet" / "config.json"))
    weights = {name: tensor.half() for name, tensor in unet.state_dict().items()}
    write_safetensors(folder / "unet" / f"{STEMS['unet']}.safetensors", weights, {"format": "pt"})
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name", list(COUNTS))
def test_full_size_in_three_steps(name: str, tmp_path: Path) -> None:
    base, prompts = full_base(tmp_path / "base", name), write_prompts(tmp_path / "prompts.txt")
    words = [f"base={base}", f"prompts={prompts}", f"output={tmp_path / 'run'}", "device=cpu", "batch=1", "micro_batch=0"]
    words += ["resolution=64", "save_every=1", "keep=1", "sheet_every=1000", "tensorboard=false", "precision=bf16"]
    words += ["base_weights=bf16", "keep_every=0"]
    words += ["embedding_cache="] if name == "pixart" else []
    preset = CONFIGS / f"{name}.yaml"
    config = settings.load(TrainConfig, preset, [*words, "steps=3"])
    figures = estimate(config)
    student, layers, fake = COUNTS[name]
    assert (figures.student, figures.student_layers, figures.fake) == (student, layers, fake)
    train(settings.load(TrainConfig, preset, [*words, "steps=2"]))
    run = Distillation(config)
    counts = {role: sum(parameter.numel() for parameter in run.roles.parameters(role)) for role in (STUDENT, FAKE)}
    assert counts == {STUDENT: student, FAKE: fake}
    del run
    written = train(config)
    lorad = LoRaD.load(written)
    assert (lorad.parameters_count, len(lorad.factors)) == (student, layers)
    assert lorad.metadata.architecture == {"pixart": "pixart-alpha"}.get(name, name)
    assert lorad.one_step is not None and lorad.metadata.resolution == "64x64"
    assert any(a.abs().max() > 0 for a, _ in lorad.factors.values())
    assert [path.name for path in (tmp_path / "run").glob("step-*.pt")] == ["step-00000003.pt"]


@pytest.mark.full
def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    base, prompts = small_base(tmp_path / "base"), write_prompts(tmp_path / "prompts.txt")
    dice = random.Random(5)

    def begin(name: str) -> object:
        return start(command(base, prompts, tmp_path / name, steps=60, save_every=1, ema=0.9, sheet_every=7))

    assert begin("straight").wait(3000) == 0
    kills, place = 0, tmp_path / "killed"
    while kills < 20:
        run = begin("killed")
        before = len(list(place.glob("step-*.pt"))) and max(place.glob("step-*.pt"))
        # Some moments before the first new checkpoint, most after: anywhere in loading, training, writing, drawing.
        deadline = time.monotonic() + 1200
        while dice.random() < 0.97 and run.poll() is None and time.monotonic() < deadline:
            files = sorted(place.glob("step-*.pt"))
            if files and files[-1] != before:
                time.sleep(dice.random() * 0.3)
                break
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
    assert begin("killed").wait(3000) == 0
    one, other = (LoRaD.load(tmp_path / name / "one-step.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(x, y) for key in one.factors for x, y in zip(one.factors[key], other.factors[key], strict=True))
