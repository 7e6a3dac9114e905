"""The benchmarks of negative prompts: their captions, what they draw, and what they make of the figures."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality import negative
from benchmarks.quality.sets import Generated
from benchmarks.speed import negative as speed
from wadi_core import OneStepPipeline
from wadi_core.negative import PRESETS
from wadi_core.pipeline import noise

STREAM, ROWS = negative.TEST, range(2)


@pytest.fixture(scope="module")
def pipe() -> OneStepPipeline:
    return OneStepPipeline.from_pretrained("mini", device="cpu", dtype="float32")


def test_captions_name_both_objects_and_the_control_only_the_first() -> None:
    for caption, alone, (first, second) in zip(
        STREAM.captions(ROWS), negative.alone(STREAM).captions(ROWS), STREAM.phrases(ROWS), strict=True
    ):
        assert caption == f"{first} and {second}" and alone == first != second
    assert STREAM.recipe() != negative.alone(STREAM).recipe()
    assert len({one.first for one in (negative.REAL, negative.TEST, negative.SWEEP, negative.SHEET)}) == 4


def test_pictures_are_the_pipelines_with_the_second_object_as_negative(pipe: OneStepPipeline) -> None:
    z = noise([STREAM.first + row for row in ROWS], 128, 128)
    unwanted = [second for _, second in STREAM.phrases(ROWS)]
    asked = {"prompts": STREAM.captions(ROWS), "latents": z, "return_latents": True}
    for name, how in PRESETS.items():
        expected = pipe(**asked, negative_prompt=unwanted, negative_method=name).latents
        found = negative.Away(pipe, name, how=how).latents(STREAM, ROWS)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_the_control_extrapolates_two_passes(pipe: OneStepPipeline) -> None:
    plain = Generated(pipe, "plain").latents(STREAM, ROWS)
    only = negative.Pairs("only", STREAM.first, pair=True)
    object.__setattr__(only, "captions", lambda rows: [second for _, second in only.phrases(rows)])
    unwanted = Generated(pipe, "unwanted").latents(only, ROWS)
    found = negative.TwoPasses(pipe, "two", scale=0.5).latents(STREAM, ROWS)
    torch.testing.assert_close(found, plain + 0.5 * (plain - unwanted), atol=1e-3, rtol=1e-3)


def test_ratios_are_those_to_the_set_without() -> None:
    sets = {negative.BARE: {"a": 0.4, "b": 0.5, "fd": 10.0}, "nag": {"a": 0.3, "b": 0.1, "fd": 12.0}}
    found = negative.with_ratios(sets)["nag"]
    assert (found["a_ratio"], found["b_ratio"], found["fd_ratio"]) == pytest.approx((0.75, 0.2, 1.2))


def test_costs_are_told_as_ratios_of_medians() -> None:
    seconds = {negative.BARE: 1.0, "nag": 1.1, "nasa": 1.05}
    rounds = {name: [{"seconds": one, "bytes": 2.0**30}] * 3 for name, one in seconds.items()}
    found = speed.repeats.summary(rounds, speed.TARGETS)
    assert [round(one["ratio"], 3) for one in found["ratios"]] == [1.1, 1.05, 1.0, 1.0]
    settings = {"size": 256, "batch": 1, "device": "cpu", "dtype": "float32", "rounds": 3}
    text = speed.as_markdown(
        {"command": "c", "machine": {"cores": 2}, "versions": {"torch": "2"}, "settings": settings, **found}
    )
    assert "| nag | 1.100 | 1.000 |" in text and "| time, nag | 1.10 | 1.15 |" in text
