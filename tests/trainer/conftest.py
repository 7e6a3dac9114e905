"""What many tests of the trainer begin with: a small base, and a file of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import small_base, write_prompts


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 1.5 with random weights."""
    return small_base(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few prompts, one a line."""
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")
