"""Host programs for the tests in this folder. Without one, its tests are skipped with one line.

    COMFYUI_PATH=/path/to/ComfyUI [COMFYUI_PYTHON=/path/to/its/python] python -m pytest tests/hosts

ComfyUI runs on the CPU in folders of its own; nothing of an installation is read or changed.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent / "helpers")) if path not in sys.path]

CHROMIUM = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
# --disable-sync and the like: the browser talks to nobody but the server.
CHROMIUM_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where there is no ComfyUI its tests are left out, all but one that is skipped and says why."""
    if os.environ.get("COMFYUI_PATH"):
        return
    left_out = [item for item in items if item.path.parent == HERE and item.path.name.startswith("test_comfyui")]
    for item in left_out[:1]:
        reason = "no ComfyUI: set COMFYUI_PATH (and COMFYUI_PYTHON) to run the tests of its nodes"
        item.add_marker(pytest.mark.skip(reason=reason))
    items[:] = [item for item in items if item not in left_out[1:]]
    config.hook.pytest_deselected(items=left_out[1:])


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """ComfyUI's folder."""
    path = Path(os.environ["COMFYUI_PATH"])
    assert (path / "main.py").is_file(), f"COMFYUI_PATH={path}: there is no main.py"
    return path


@pytest.fixture(scope="session")
def comfy_base(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's own folders with the pack in them."""
    import comfy_server

    base = tmp_path_factory.mktemp("comfyui")
    comfy_server.lay_out(base)
    return base


@pytest.fixture(scope="session")
def comfy(comfyui_path: Path, comfy_base: Path) -> Iterator[object]:
    """A running server."""
    import comfy_server

    server = comfy_server.ComfyServer(comfyui_path, comfy_server.host_python(), comfy_base)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the browser tests' screenshots go: a temporary folder, or ``WADI_SCREENSHOTS``."""
    place = os.environ.get("WADI_SCREENSHOTS")
    folder = Path(place) if place else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium, of ``CHROMIUM_PATH`` or the one on the path, driven by playwright (of any version)."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: set CHROMIUM_PATH or install one")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(comfy_base: Path) -> None:
    """Files of the names that the workflows ask for."""
    import comfy_page

    comfy_page.lay_files(comfy_base)


@pytest.fixture(scope="module")
def open_page(comfy: Any, files: None, chromium: Any) -> Callable[..., Any]:
    """A function that opens ComfyUI's front end: ``open_page(language="ja", modern=True)``."""
    import comfy_page

    return functools.partial(comfy_page.open_front_end, chromium, comfy)


@pytest.fixture(scope="module")
def page(open_page: Callable[..., Any]) -> Iterator[Any]:
    """The front end as it is first met: in English, with classic nodes."""
    opened = open_page()
    yield opened
    opened.close()
