"""docs/diffusers.md: its code runs word for word, and leaves the pictures that it speaks of."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipeline_kit import largest_difference

from wadi_core import OneStepPipeline, scheduler

PAGE = Path(__file__).resolve().parents[2] / "docs" / "diffusers.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which the blocks have run, and the variables that they left."""
    place = tmp_path_factory.mktemp("page")
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (place / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return place, runpy.run_path("page.py")


def test_its_pictures_are_ours(run: tuple[Path, dict[str, Any]]) -> None:
    place, left = run
    ours = OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")
    assert largest_difference(Image.open(place / "apple.png"), ours("a red apple", seed=7).images[0]) <= 1
    assert {path.name for path in place.glob("*.png")} == {"apple.png", "hibiscus.png", "cat.png", "stock.png"}
    theirs = ours("a red apple", num_images_per_prompt=2, generator=torch.Generator().manual_seed(7), output_type="np")
    assert left["made"].images.shape == (2, 128, 128, 3) and abs(left["made"].images - theirs.images).max() < 1e-3
    stock = left["stock"]("a red apple", guidance_scale=1.0, generator=torch.Generator().manual_seed(7)).images[0]
    assert largest_difference(stock, ours("a red apple", seed=7).images[0]) <= 1


def test_its_table_names_functions_and_their_arguments() -> None:
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \|", TEXT, re.MULTILINE)
    assert len(rows) >= 7
    for name, arguments in rows:
        known = list(inspect.signature(getattr(scheduler, name)).parameters.values())
        given = [one.partition("=") for one in re.split(r", (?![^{]*\})", arguments)]
        assert len(given) == len(known)
        for (_, equals, default), parameter in zip(given, known, strict=True):
            assert not equals or default == repr(parameter.default).replace("'", '"')
