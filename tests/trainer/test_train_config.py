"""The trainer's settings: typed, within ranges, explained; and every wrong input told in one line."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import answering
import pytest
import yaml
from networks import make_networks, small_settings, states, write_base, write_settings, write_single_file
from training import tiny, values

from trainer.settings import fields as settings
from trainer.settings.distillation import TrainConfig
from trainer.train import main

CONFIGS = Path(settings.__file__).parents[1] / "configs"
PRESETS = ("mini", "sd15", "sd21", "pixart", "sd15-12gb", "sd15-24gb")


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
    assert settings.load(Example, None, ["name="]).name == ""
    text = tmp_path / "b.yaml"
    text.write_text(settings.as_yaml(loaded))
    assert settings.load(Example, text) == loaded
    text.write_text(settings.as_yaml(loaded, explain=True))
    assert settings.load(Example, text) == loaded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sizee=1"], "unknown setting 'sizee'; did you mean 'size'?"),
        (["size=big"], "size: a whole number is expected: 'big' is no"),
        (["size=1.5"], "size: a whole number is expected: '1.5' is no whole number"),
        (["sizes=3"], "sizes: a list is expected"),
        (["size"], "an override is written key=value"),
    ],
)
def test_wrong_settings_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings.load(Example, None, words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student_rnk=4"], r"unknown setting 'student_rnk'; did you mean 'student_rank'\?"),
        (["batch=0"], "batch: at least 1 is expected, not 0"),
        (["student_rank=1e6"], "student_rank: 1 to 2560 is expected, not 1000000"),
        (["uncond_prob=1.5"], "uncond_prob: 0 to 1 is expected, not 1.5"),
        (["student_lr=.nan"], "student_lr: a number is expected: '.nan' is no decimal number"),
        (["max_grad_norm=.inf"], "max_grad_norm: a number is expected: '.inf' is no decimal number"),
        (["adapter=lorado"], r"adapter: one of lorad, lora, dora, oft, full is expected, not 'lorado'; did you mean 'lorad'\?"),
        (["precision=int8"], "precision: one of fp32, bf16, fp16, fp64 is expected, not 'int8'"),
        (["version=2"], "version: 1 to 1 is expected, not 2"),
        (["timestep_low=990"], r"timestep_low: at most timestep_high \(980\) is expected, not 990"),
        (["timestep_high_end=10", "decay_steps=5"], r"timestep_high_end: 0, or 20 to 980 \(.*\) is expected, not 10"),
        (["timestep_high_end=300"], "timestep_high_end: it is reached over decay_steps, which has to be above 0"),
        (["anchor_end=0"], "anchor_end: it is reached over decay_steps, which has to be above 0"),
        (["resolution=100"], "resolution: a multiple of 8 is expected, not 100"),
        (["precision=fp64"], "fp64 needs base_weights=fp64"),
        (["precision=fp32", "base_weights=bf16"], "base_weights: bf16 needs precision=bf16 or fp16"),
        (["name=a/b"], "name: a file name without folders is expected"),
        (["compile=true", "base_weights=nf4"], "compile: cannot be combined with base_weights=nf4"),
        (["adapter=dora", "base_weights=fp8"], "base_weights: fp8 cannot be combined with dora"),
        (["adapter=full", "base_weights=fp8"], "base_weights: fp8 cannot be combined with"),
    ],
)
def test_values_out_of_range_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        settings.load(TrainConfig, None, words)
    assert "\n" not in str(caught.value)


def test_every_setting_says_what_it_means_and_keeps_its_own_rules() -> None:
    known = settings.meanings(TrainConfig)
    assert set(known) == set(vars(TrainConfig()))
    assert all(meaning.text for meaning in known.values())
    for name, value in vars(TrainConfig()).items():
        known[name].check(name, value)


def test_what_is_printed_can_be_read_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(CONFIGS / "sd15.yaml"), "batch=64", "--print-config"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "# rank of the student's adapter [1 to 2560]" in printed and "[samples, at least 1]" in printed
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert settings.load(TrainConfig, path) == settings.load(TrainConfig, CONFIGS / "sd15.yaml", ["batch=64"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_say_nothing_twice(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    loaded = settings.load(TrainConfig, path)
    written = yaml.safe_load(path.read_text())
    assert written["base"] == ("mini" if name == "mini" else "")
    assert settings.load(TrainConfig, None, [f"{key}={value}" for key, value in written.items()]) == loaded


@pytest.mark.parametrize(("name", "rank"), [("sd15", 256), ("sd21", 256), ("pixart", 128)])
def test_presets_hold_the_values_of_the_paper(name: str, rank: int) -> None:
    config = settings.load(TrainConfig, CONFIGS / f"{name}.yaml")
    assert (config.student_rank, config.fake_rank, config.student_lr, config.fake_lr) == (rank, 32, 1e-4, 1e-2)
    assert (config.batch, config.steps, config.teacher_guidance, config.fake_guidance) == (128, 22000, 1.5, 1.5)
    assert (config.timestep_low, config.timestep_high, config.uncond_prob, config.max_grad_norm) == (20, 980, 0.1, 1.0)
    assert (config.alpha_T_squared, config.timestep, config.weight_decay, config.warmup) == (0.0047, 999, 0.0, 0)


# Everything else that can be wrong when the trainer is started: one line.


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, **words: object) -> str:
    texts = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in words.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", *texts])
    assert main() == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, base: Path, prompts: Path, tmp_path: Path):
    def start(**changes: object) -> str:
        return refused(monkeypatch, capsys, **values(base, prompts, tmp_path / "out", **changes))

    return start


def test_no_base_is_named(wrong) -> None:
    assert "name the model to distil" in wrong(base="")


def test_a_base_that_is_not_there(wrong, tmp_path: Path) -> None:
    assert "no such file or folder" in wrong(base=tmp_path / "none")


def test_an_empty_folder_is_no_base(wrong, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "unet/config.json is missing" in wrong(base=tmp_path / "empty")


def changed_index(base: Path, folder: Path, kind: str) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


@pytest.mark.parametrize(
    "kind", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline"]
)
def test_folders_of_other_models_are_named(wrong, base: Path, tmp_path: Path, kind: str) -> None:
    assert kind in wrong(base=changed_index(base, tmp_path / "other", kind))


def test_a_single_file_of_sdxl_is_named(wrong, tmp_path: Path) -> None:
    import torch

    from wadi_core.lorad.checkpoint import write_safetensors

    names = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (8, 8),
    }
    path = tmp_path / "xl.safetensors"
    write_safetensors(path, {name: torch.zeros(shape) for name, shape in names.items()})
    assert "Stable Diffusion XL" in wrong(base=path)


def test_an_inpainting_network_is_refused(wrong, tmp_path: Path) -> None:
    changes = small_settings("sd15")
    changes["unet"] = {**changes["unet"], "in_channels": 9}
    folder, _ = write_base(tmp_path / "inpainting", "sd15", changes)
    assert "inpainting" in wrong(base=folder)


def test_a_base_that_predicts_v_asks_for_the_setting(wrong, base: Path, prompts: Path, tmp_path: Path) -> None:
    folder, _ = write_base(tmp_path / "768", "sd21")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    assert "set prediction_type=v_prediction" in wrong(base=folder)
    from trainer.distill.distillation import Distillation

    run = Distillation(tiny(folder, prompts, tmp_path / "run", prediction_type="v_prediction"))
    assert run.one_step.prediction_type == run.noising.prediction_type == "v_prediction"
    assert "set prediction_type=epsilon" in wrong(prediction_type="v_prediction")


def test_a_single_file_is_asked_what_it_predicts(wrong, tmp_path: Path) -> None:
    changes = small_settings("sd15")
    folder = write_settings(tmp_path / "small", "sd15", {**changes, "unet": {**changes["unet"], **answering.SETTINGS}})
    made = make_networks(folder)
    for kind, other in (("v_prediction", "epsilon"), ("epsilon", "v_prediction")):
        answering.answer_as(made["unet"], kind)
        file = write_single_file(tmp_path / f"{kind}.safetensors", states(made), folder)
        told = wrong(base=file, base_config=folder, prediction_type=other)
        assert f"predicts {kind} by its answer to noise: set prediction_type={kind}" in told


def test_a_base_that_predicts_something_else_is_refused(wrong, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "other")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "sample"}))
    assert "predicts sample by its own settings; one that predicts epsilon or v_prediction is needed" in wrong(base=folder)


def test_a_pickled_checkpoint_and_an_adapter_are_no_base(wrong, base: Path, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert "safetensors only" in wrong(base=tmp_path / "model.ckpt")
    from networks import random_lorad

    random_lorad(make_networks(base)["unet"]).save(tmp_path / "adapter.safetensors")
    assert "this is an adapter" in wrong(base=tmp_path / "adapter.safetensors")


def test_a_single_file_works_with_its_settings(base: Path, prompts: Path, tmp_path: Path) -> None:
    from trainer.distill.distillation import Distillation

    file = write_single_file(tmp_path / "model.safetensors", states(make_networks(base)), base)
    run = Distillation(tiny(file, prompts, tmp_path / "run", base_config=str(base)))
    assert run.model.base_sha256 == Distillation(tiny(base, prompts, tmp_path / "other")).model.base_sha256


def test_prompts_that_are_missing_or_empty(wrong, tmp_path: Path) -> None:
    assert "none.txt" in wrong(prompts=tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n   \n")
    assert "empty.txt" in wrong(prompts=tmp_path / "empty.txt")


def test_an_output_folder_that_cannot_be_written(wrong, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "nothing can be written here" in wrong(output=tmp_path / "file" / "run")


def test_a_batch_that_cannot_be_shared_out(wrong) -> None:
    assert "a multiple of 4 can" in wrong(batch=6, micro_batch=4)


def test_a_device_that_is_not_there(wrong) -> None:
    assert "cannot be used" in wrong(device="cuda:9")


def test_eight_bit_optimizers_need_their_library(wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    assert "needs bitsandbytes" in wrong(optimizer="adamw8bit")


def test_a_settings_file_that_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for name, content in (
        ("missing.yaml", None),
        ("list.yaml", b"- 1\n"),
        ("bad.yaml", b"a: [1\n"),
        ("bytes.yaml", b"\xff\xfe\x00"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path)])
        assert main() == 1
        message = capsys.readouterr().err
        assert name in message and message.count("\n") == 1
