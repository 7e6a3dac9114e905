"""The fixtures for Forge and its successor, and what these two must do beside all that the programs have in common.

A module of tests gives the fixture ``kind``. The checkpoint has random weights and Stable Diffusion's own width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from webui_cases import *  # noqa: F403 - the tests that all programs have
from webui_cases import beyond_rounding, close, tag, weights_after
from webui_models import Base, installed_mini, turned, wide, wide_velocity
from webui_negative import *  # noqa: F403
from webui_server import WebUI, lay_out

from wadi_core import mini


@pytest.fixture(scope="module")
def data(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(kind)


@pytest.fixture(scope="module")
def bases(kind: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    models, work = lay_out(kind, data, mini.FOLDER), tmp_path_factory.mktemp("bases")
    base = wide(models, work)
    made = [base, wide_velocity(models, base, work), installed_mini(models, mini.FOLDER)]
    return {base.name: base for base in made}


@pytest.fixture(scope="module")
def webui(kind: str, data: Path, bases: dict[str, Base]) -> Iterator[WebUI]:
    server = WebUI(kind, data).start()
    server.choose("wide")
    yield server
    server.stop()


@pytest.fixture
def base(bases: dict[str, Base]) -> Base:
    return bases["wide"]


@pytest.fixture
def velocity(bases: dict[str, Base]) -> Base:
    return bases["wide-v"]


def test_its_own_controlnet_is_there_and_makes_no_error(webui: WebUI) -> None:
    scripts = webui.get("/sdapi/v1/scripts")["txt2img"]
    assert "controlnet" in scripts and "wadi" in scripts
    assert "Traceback" not in webui.said().split("Startup time")[0]


def test_wadi_mini_as_the_installer_writes_it(webui: WebUI, bases: dict[str, Base]) -> None:
    """The program knows networks by their widths, and this one from the extension."""
    small = bases["wadi-mini"]
    webui.choose("wadi-mini")
    try:
        for stack in ([("one-step", 1.0)], [("one-step", 0.5), ("style", 2.0)]):
            prompt = "a red apple" + "".join(tag(small, name, strength) for name, strength in stack)
            made = webui.draw(prompt, width=128, height=128)
            files = [(small.adapters[name], strength) for name, strength in stack]
            assert close(made, small.pictures("a red apple", [3], files), 1)
        assert webui.comments() == []
    finally:
        webui.choose("wide")


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_eight_bit_storage(webui: WebUI, base: Base, tmp_path: Path, on_the_fly: bool) -> None:
    """Turned and stored in eight bits again, or turned in sixteen or more at every call."""
    half_steps = 2 if webui.kind == "neo" else 1

    def store(kind: str) -> None:
        """The setting takes effect when another checkpoint is chosen."""
        webui.post("/sdapi/v1/options", {"forge_unet_storage_dtype": kind})
        webui.choose("wide-v")
        webui.choose("wide")

    store("float8-e4m3fn (fp16 LoRA)" if on_the_fly else "float8-e4m3fn")
    try:
        prompts = {"bare": "a cat", "live": "a cat" + tag(base, "one-step"), "back": "a cat"}
        made = {name: weights_after(webui, prompt, tmp_path) for name, prompt in prompts.items()}
        assert made["bare"]["input_blocks.1.0.emb_layers.1.weight"].dtype == torch.float8_e4m3fn
        floats = {name: tensor.float() for name, tensor in made["bare"].items()}
        expected = floats if on_the_fly else turned(floats, [(base.adapters["one-step"], 1.0)])
        assert max(beyond_rounding(made["live"][name], exact, half_steps) for name, exact in expected.items()) <= 0
        assert all(torch.equal(made["back"][name].float(), tensor) for name, tensor in floats.items())
        plain, turned_picture = (webui.draw(prompts[name]).pictures[0] for name in ("bare", "live"))
        assert abs(plain - turned_picture).max() > 5
    finally:
        store("Automatic")
