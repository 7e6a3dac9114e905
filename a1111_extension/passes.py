"""What a generation's settings mean when one or both of its passes are drawn in one step.

The program's sliders stay what the user made them; the object of one generation gets the values that are true of it,
so that the infotext tells no tales. A pass with another sampler keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from wadi_core.settings import SAMPLER as NAME

SAME = "Use same sampler"


def target_size(width: int, height: int, scale: float, wide: int, high: int) -> tuple[int, int]:
    """Width and height of a hires pass, as the programs reckon them: by a scale, or to one or two given sides."""
    if not wide and not high:
        return int(width * scale), int(height * scale)
    return wide or high * width // height, high or wide * height // width


@dataclass(frozen=True)
class Passes:
    """Which passes are drawn in one step.

    Attributes:
        first: the only pass, or the first of two.
        hires: whether there is a second one.
        second: whether that is drawn in one step too.
    """

    first: bool
    hires: bool
    second: bool

    @classmethod
    def of(cls, p: Any) -> Passes:
        """Of the program's object for a generation."""
        hires = bool(getattr(p, "enable_hr", False))
        other = getattr(p, "hr_sampler_name", None)
        second = p.sampler_name if other in (None, "", SAME) else other
        return cls(p.sampler_name == NAME, hires, hires and second == NAME)

    def settle(self, p: Any) -> None:
        """Give a generation the step counts and scales that are true of its passes.

        A1111 has one CFG scale for both passes: it stays where one of them uses it. Forge has a second one, ``hr_cfg``.
        What was asked for is kept in ``wadi_asked``.
        """
        two_scales = hasattr(p, "hr_cfg")
        p.wadi_asked = p.steps, p.cfg_scale
        if self.second:
            p.hr_second_pass_steps = 0 if self.first else 1
            if two_scales:
                p.hr_cfg = 1.0
        if not self.first:
            return
        if self.hires and not self.second and not p.hr_second_pass_steps:
            p.hr_second_pass_steps = p.steps
        p.steps = 1
        if getattr(p, "init_images", None):
            p.denoising_strength = 1.0  # from pure noise, whatever the slider says
        if two_scales or not self.hires or self.second:
            p.cfg_scale = 1.0

    def notes(self, p: Any) -> Iterator[str]:
        """What is worth telling of a generation, whatever the weights are."""
        if self.first and getattr(p, "init_images", None):
            yield "denoising strength has no effect in one step: it starts from pure noise, not from the given picture"
            if getattr(p, "image_mask", None) is not None:
                yield "the masked part is drawn without seeing what is around it"
        if self.second:
            yield (
                "the hires pass draws a new picture at the larger size: for more detail in the first one choose another "
                "sampler for that pass"
            )
