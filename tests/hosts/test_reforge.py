"""The extension in a real reForge, on the CPU, with a checkpoint of random weights and Stable Diffusion's own width."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if not os.environ.get("REFORGE_PATH"):
    pytest.skip("no reForge: set REFORGE_PATH (and REFORGE_PYTHON) to run the tests of its extension", allow_module_level=True)

pytest.register_assert_rewrite("webui_cases")

from webui_cases import *  # noqa: E402, F403 - the tests that all programs have
from webui_models import Base, wide, wide_velocity  # noqa: E402
from webui_server import WebUI, lay_out  # noqa: E402

from wadi_core.mini.export import export  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reforge")


@pytest.fixture(scope="module")
def bases(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    models, work = lay_out("reforge", data), tmp_path_factory.mktemp("bases")
    base = wide(models, work)
    velocity = wide_velocity(models, base, work)
    export(models / "Stable-diffusion", base=velocity.folder, name="wide-v")  # it wants all settings, as A1111 does
    return {"wide": base, "wide-v": velocity}


@pytest.fixture(scope="module")
def webui(data: Path, bases: dict[str, Base]) -> Iterator[WebUI]:
    server = WebUI("reforge", data).start()
    server.choose("wide")
    yield server
    server.stop()


@pytest.fixture
def base(bases: dict[str, Base]) -> Base:
    return bases["wide"]


@pytest.fixture
def velocity(bases: dict[str, Base]) -> Base:
    return bases["wide-v"]
