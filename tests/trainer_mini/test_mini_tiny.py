"""The tiny decoder's training: from the student's own pictures to a file that a pipeline decodes with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from trainer.mini import tiny as training
from wadi_core import tiny


def test_a_few_steps_leave_a_decoder_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = training.TinyConfig(
        output=str(tmp_path), channels=8, blocks=(1, 1, 1, 1), pictures=training.HELD + 2, steps=3, batch=2
    )
    training.run(config)
    assert "3 steps, " in capsys.readouterr().out
    path = tmp_path / "wadi-mini-tiny-decoder.safetensors"
    decoder = tiny.load(path, torch.device("cpu"), torch.float32)
    assert decoder.decode(torch.zeros(1, 4, 4, 4)).sample.shape == (1, 3, 32, 32)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > training.HELD * 100


def test_crops_of_latents_and_pictures_show_the_same_place() -> None:
    import random

    latents = torch.arange(16.0).reshape(1, 1, 4, 4).expand(training.HELD + 1, 4, 4, 4)
    targets = latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
    part, target = training.crops(latents, targets, training.TinyConfig(crop=2, batch=5), random.Random(0))
    assert part.shape == (5, 4, 2, 2) and torch.equal(target[:, 0, ::8, ::8], part[:, 0])
