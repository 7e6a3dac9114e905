"""Settings under the names that they had before: read in this version, with a line that tells the new one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trainer.mini.teacher import TeacherConfig
from trainer.settings import fields as settings
from trainer.settings.distillation import TrainConfig
from trainer.settings.finetuning import InvertConfig, PersonalizeConfig

RENAMED = [
    (TrainConfig, "student_rate", "student_lr"),
    (TrainConfig, "fake_rate", "fake_lr"),
    (TrainConfig, "clip", "max_grad_norm"),
    (TrainConfig, "keep", "keep_last"),
    (TrainConfig, "null_share", "uncond_prob"),
    (InvertConfig, "rate", "lr"),
    (InvertConfig, "noisy_share", "high_noise_fraction"),
    (PersonalizeConfig, "rate", "lr"),
    (PersonalizeConfig, "keep", "keep_last"),
    (TeacherConfig, "learning_rate", "lr"),
    (TeacherConfig, "null_share", "uncond_prob"),
]


@dataclass
class Own:
    """A schema in which two of the old names mean something of their own."""

    rate: float = 1.0
    lr: float = 2.0
    keep: int = 3


def from_words(schema: type, words: dict[str, Any], tmp_path: Path) -> Any:
    return settings.load(schema, None, [f"{name}={value}" for name, value in words.items()])


def from_file(schema: type, words: dict[str, Any], tmp_path: Path) -> Any:
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in words.items()))
    return settings.load(schema, path)


BOTH = pytest.mark.parametrize("read", [from_words, from_file], ids=["words", "file"])


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "wadi"]


@BOTH
@pytest.mark.parametrize(("schema", "old", "new"), RENAMED)
def test_an_old_name_is_read_and_the_new_one_told(
    read: Any, schema: type, old: str, new: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="wadi"):
        found = read(schema, {old: 1}, tmp_path)
    assert found == read(schema, {new: 1}, tmp_path)
    assert getattr(found, new) == 1
    assert told(caplog) == [f"the setting {old} is called {new} now; the old name is read in this version only"]


@BOTH
@pytest.mark.parametrize(("schema", "old", "new"), RENAMED)
@pytest.mark.parametrize("turned", [False, True])
def test_both_names_at_once_are_refused(read: Any, schema: type, old: str, new: str, turned: bool, tmp_path: Path) -> None:
    names = [new, old] if turned else [old, new]
    with pytest.raises(ValueError, match=rf"{old} is the old name of {new}, and both are given: leave out {old}$"):
        read(schema, dict.fromkeys(names, 1), tmp_path)


@pytest.mark.parametrize(("in_file", "word"), [("keep: 3", "keep_last=4"), ("keep_last: 3", "keep=4"), ("keep: 3", "keep=4")])
def test_the_command_line_wins_over_the_file_under_either_name(in_file: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"{in_file}\n")
    assert settings.load(TrainConfig, tmp_path / "config.yaml", [word]).keep_last == 4


@BOTH
def test_a_schema_with_the_old_name_itself_keeps_it(read: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="wadi"):
        assert read(Own, {"rate": 5, "keep": 6}, tmp_path) == Own(rate=5.0, lr=2.0, keep=6)
        assert read(Own, {"rate": 5, "lr": 7}, tmp_path) == Own(rate=5.0, lr=7.0)
    assert not told(caplog)


@BOTH
def test_an_old_name_of_another_schema_is_unknown(read: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown setting 'noisy_share'"):
        read(TrainConfig, {"noisy_share": 0.5}, tmp_path)


@BOTH
def test_ranges_and_types_hold_under_the_old_name(read: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uncond_prob: 0 to 1 is expected, not 2.0"):
        read(TrainConfig, {"null_share": 2}, tmp_path)
    with pytest.raises(ValueError, match="keep_last: a whole number is expected"):
        read(TrainConfig, {"keep": "many"}, tmp_path)


def test_a_whole_file_of_an_old_run_is_read(tmp_path: Path) -> None:
    wanted = TrainConfig(student_lr=0.5, fake_lr=0.25, max_grad_norm=3.0, keep_last=7, uncond_prob=0.75)
    text = settings.as_yaml(wanted)
    for _, old, new in RENAMED[:5]:
        assert f"\n{new}: " in text
        text = text.replace(f"\n{new}: ", f"\n{old}: ")
    (tmp_path / "config.yaml").write_text(text)
    assert settings.load(TrainConfig, tmp_path / "config.yaml") == wanted


def test_what_an_earlier_run_had_is_known_by_todays_names() -> None:
    before = settings.settings_before(TrainConfig(), {"keep": 9, "student_rate": 0.5, "batch": 2})
    assert (before["keep_last"], before["student_lr"], before["batch"]) == (9, 0.5, 2)
    assert before["ema"] == 0.0 and not {"keep", "student_rate"} & set(before)
