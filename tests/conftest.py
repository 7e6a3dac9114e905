"""What every test runs under: no model hub, the same random numbers each time, no more threads than cores."""

from __future__ import annotations

import os

# Before anything imports transformers or diffusers: they read these once. Subprocesses of the tests inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import importlib.util
import logging
import random
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import hypothesis
import installing
import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from pipeline_kit import Kit

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CHOSEN = "WADI_TESTS_CHOSE_THREADS"  # what this file has chosen is no wish of the user's: workers inherit it
if "OMP_NUM_THREADS" not in os.environ or CHOSEN in os.environ:
    # In a container torch counts the host's cores. More than a handful of threads only slows small networks down, and
    # the processes of pytest-xdist share the cores.
    THREADS = max(1, min(CORES, 8) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    torch.set_num_threads(THREADS)
    os.environ["OMP_NUM_THREADS"] = os.environ[CHOSEN] = str(THREADS)

# The same examples on every machine, and no time limit on one: what fails here fails everywhere.
hypothesis.settings.register_profile("wadi", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("wadi")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Seeds every generator that code could fall back on."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_logger() -> Iterator[None]:
    """Puts back what a program run inside a test did to the project's logger: the next test reads its messages."""
    logger = logging.getLogger("wadi")
    kept = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate, logger.level = kept


@pytest.fixture(autouse=True)
def same_search_path() -> Iterator[None]:
    """What one test leaves in PYTHONPATH would decide which files the programs of the next ones import."""
    before = os.environ.get("PYTHONPATH")
    yield
    assert os.environ.get("PYTHONPATH") == before, "a test changed PYTHONPATH and did not put it back"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """A small Stable Diffusion of either kind."""
    from pipeline_kit import make_kit

    return make_kit(tmp_path_factory.mktemp("kit"), request.param)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """A small Stable Diffusion 1.5."""
    from pipeline_kit import make_kit

    return make_kit(tmp_path_factory.mktemp("sd15"), "sd15")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 1.5 with random weights, for the trainer."""
    from training import small_base

    return small_base(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few prompts, one a line."""
    from training import write_prompts

    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


@pytest.fixture
def install() -> ModuleType:
    """A fresh copy of install.py as a module."""
    spec = importlib.util.spec_from_file_location("install_under_test", installing.SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bare(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """install.py in a repository of its own, run by a Python outside every environment."""
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(installing.ROOT / name, tmp_path / name)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(install, "check_room", lambda: None)
    return install
