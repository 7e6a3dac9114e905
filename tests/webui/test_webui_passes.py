"""Step counts and scales of a generation's passes, when one or both are drawn in one step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from a1111_extension.passes import NAME, Passes


def generation(sampler: str = NAME, **values: Any) -> SimpleNamespace:
    """An object for a generation as A1111 makes it; with ``hr_cfg`` as Forge does."""
    common = {"sampler_name": sampler, "steps": 20, "cfg_scale": 7.0}
    return SimpleNamespace(**common, **values)


def hires(sampler: str, second: str | None, steps: int = 0, **values: Any) -> SimpleNamespace:
    return generation(sampler, enable_hr=True, hr_sampler_name=second, hr_second_pass_steps=steps, **values)


def settled(p: SimpleNamespace) -> dict[str, Any]:
    Passes.of(p).settle(p)
    names = ("steps", "cfg_scale", "hr_second_pass_steps", "hr_cfg")
    return {name: getattr(p, name) for name in names if hasattr(p, name)}


def test_one_pass() -> None:
    assert Passes.of(generation()) == Passes(True, False, False)
    assert settled(generation()) == {"steps": 1, "cfg_scale": 1.0}
    assert settled(generation("Euler")) == {"steps": 20, "cfg_scale": 7.0}


@pytest.mark.parametrize("same", [None, "", "Use same sampler", NAME])
def test_both_passes_in_one_step(same: str | None) -> None:
    assert settled(hires(NAME, same, 12)) == {"steps": 1, "cfg_scale": 1.0, "hr_second_pass_steps": 0}
    assert settled(hires(NAME, same, 12, hr_cfg=5.0))["hr_cfg"] == 1.0


def test_the_second_pass_keeps_what_was_asked_for() -> None:
    assert settled(hires(NAME, "Euler")) == {"steps": 1, "cfg_scale": 7.0, "hr_second_pass_steps": 20}
    assert settled(hires(NAME, "Euler", 9))["hr_second_pass_steps"] == 9
    of_forge = settled(hires(NAME, "Euler", 9, hr_cfg=5.0))
    assert of_forge == {"steps": 1, "cfg_scale": 1.0, "hr_second_pass_steps": 9, "hr_cfg": 5.0}


def test_the_first_pass_keeps_what_was_asked_for() -> None:
    assert settled(hires("Euler", NAME, 9)) == {"steps": 20, "cfg_scale": 7.0, "hr_second_pass_steps": 1}
    assert settled(hires("Euler", NAME, 9, hr_cfg=5.0))["hr_cfg"] == 1.0


def test_other_samplers_are_left_alone() -> None:
    assert settled(hires("Euler", None, 9, hr_cfg=5.0)) == {
        "steps": 20,
        "cfg_scale": 7.0,
        "hr_second_pass_steps": 9,
        "hr_cfg": 5.0,
    }


def test_a_given_picture_is_drawn_over_in_whole() -> None:
    p = generation(init_images=["picture"], denoising_strength=0.4)
    assert settled(p) == {"steps": 1, "cfg_scale": 1.0} and p.denoising_strength == 1.0
    other = generation("Euler", init_images=["picture"], denoising_strength=0.4)
    assert settled(other)["steps"] == 20 and other.denoising_strength == 0.4


def test_what_is_told() -> None:
    def told(p: SimpleNamespace) -> str:
        return " | ".join(Passes.of(p).notes(p))

    assert told(generation()) == told(generation("Euler", init_images=["picture"])) == told(hires(NAME, "Euler")) == ""
    assert "denoising strength has no effect" in told(generation(init_images=["picture"], image_mask=None))
    assert "without seeing" in told(generation(init_images=["picture"], image_mask="mask"))
    assert "draws a new picture" in told(hires("Euler", NAME))
