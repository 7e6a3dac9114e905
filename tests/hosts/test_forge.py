"""The extension in a real Forge, on the CPU, with a checkpoint of random weights and Stable Diffusion's own width."""

from __future__ import annotations

import os

import pytest

if not os.environ.get("FORGE_PATH"):
    pytest.skip("no Forge: set FORGE_PATH (and FORGE_PYTHON) to run the tests of its extension", allow_module_level=True)

pytest.register_assert_rewrite("webui_cases", "webui_forge", "webui_negative")

from webui_forge import *  # noqa: E402, F403 - its fixtures, and the tests of all programs


@pytest.fixture(scope="module")
def kind() -> str:
    return "forge"
