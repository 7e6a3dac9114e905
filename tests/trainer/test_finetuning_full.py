"""A word and a style on networks of full size with random weights: three steps on the CPU, stopped and gone on with.

Each takes some minutes and some 8 GB: ``python -m pytest -m full tests/trainer/test_finetuning_full.py -k sd15``.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from finetuning_runs import write_pictures
from networks import random_lorad
from test_train_full import CONFIGS, COUNTS, full_base

from trainer.finetune.session import FinetuningSession
from trainer.invert import Inversion, invert
from trainer.personalize import personalize
from trainer.settings import fields as settings
from trainer.settings.finetuning import InvertConfig, PersonalizeConfig
from wadi_core import LoRaD, OneStepPipeline, configs
from wadi_core.embeddings import Embedding


@pytest.mark.full
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_three_steps_at_full_size(name: str, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    base, pictures = full_base(tmp_path / "base", name), write_pictures(tmp_path / "pictures")
    words = [f"base={base}", f"pictures={pictures}", "templates=[a cat <R> a wall]", "device=cpu", "batch=1"]
    words += ["micro_batch=0", "resolution=64", "save_every=1", "keep_last=1", "sheet_every=1000", "sheet_steps=1"]
    words += ["tensorboard=false", "precision=bf16", "base_weights=bf16", "sheet_prompts=[a cat <R> a wall]"]

    def load(schema: type, kind: str, steps: int) -> object:
        preset = CONFIGS / f"{kind}-{name}.yaml"
        return settings.load(schema, preset, [*words, f"output={tmp_path / kind}", f"steps={steps}"])

    invert(load(InvertConfig, "invert", 2))
    one = Embedding.load(tmp_path / "invert" / "relation.safetensors").vectors
    run = Inversion(load(InvertConfig, "invert", 3))
    frozen = [parameter for parameter in run.network.parameters() if not parameter.requires_grad]
    assert len({parameter.data_ptr() for parameter in frozen}) == len(frozen)
    assert sum(parameter.numel() * parameter.element_size() for parameter in frozen) < 1.8e9  # one base, half precision
    word = Embedding.load(FinetuningSession(run).go())
    assert word.architecture == name and word.extra["ss_steps"] == "3"
    assert word.vectors.shape == (1, {"sd15": 768, "sd21": 1024}[name]) and not torch.equal(word.vectors, one)
    del run, frozen

    # As its presets say it is done: the one-step student on the same base is held to the teacher.
    student = tmp_path / "one-step.safetensors"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs.read(base / "unet" / "config.json"))
    random_lorad(unet, spread=0.01).save(student)
    words += [f"lorad={student}", "anchor_weight=1", "anchor_every=1", "anchor_steps=2"]
    personalize(load(PersonalizeConfig, "personalize", 2))
    path = personalize(load(PersonalizeConfig, "personalize", 3))
    *_, last = csv.DictReader((tmp_path / "personalize" / "losses.csv").read_text().splitlines())
    assert float(last["anchor"]) > 0
    lorad = LoRaD.load(path)
    assert (len(lorad.factors), lorad.rank, lorad.one_step) == (COUNTS[name][1], 16, None)
    assert lorad.metadata.architecture == name and any(a.abs().max() > 0 for a, _ in lorad.factors.values())

    pipe = OneStepPipeline.from_pretrained(base, lorad=path, device="cpu", dtype="bf16", embeddings=word)
    assert pipe("a cat <R> a wall", width=64, height=64).images[0].size == (64, 64)
