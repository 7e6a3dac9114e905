"""The extension in a real Forge, on the CPU, with a checkpoint of random weights and Stable Diffusion's own width."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not os.environ.get("FORGE_PATH"):
    pytest.skip("no Forge: set FORGE_PATH (and FORGE_PYTHON) to run the tests of its extension", allow_module_level=True)

pytest.register_assert_rewrite("webui_cases")

from webui_cases import *  # noqa: E402, F403 - the tests that both programs have
from webui_cases import beyond_rounding, tag, weights_after  # noqa: E402
from webui_models import Base, turned, wide, wide_velocity  # noqa: E402
from webui_server import WebUI, lay_out  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forge")


@pytest.fixture(scope="module")
def bases(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    models, work = lay_out("forge", data), tmp_path_factory.mktemp("bases")
    base = wide(models, work)
    return {"wide": base, "wide-v": wide_velocity(models, base, work)}


@pytest.fixture(scope="module")
def webui(data: Path, bases: dict[str, Base]) -> Iterator[WebUI]:
    server = WebUI("forge", data).start()
    server.choose("wide")
    yield server
    server.stop()


@pytest.fixture
def base(bases: dict[str, Base]) -> Base:
    return bases["wide"]


@pytest.fixture
def velocity(bases: dict[str, Base]) -> Base:
    return bases["wide-v"]


def test_forge_controlnet_is_there_and_makes_no_error(webui: WebUI) -> None:
    scripts = webui.get("/sdapi/v1/scripts")["txt2img"]
    assert "controlnet" in scripts and "wadi" in scripts
    assert "Traceback" not in webui.said().split("Startup time")[0]


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_eight_bit_storage(webui: WebUI, base: Base, tmp_path: Path, on_the_fly: bool) -> None:
    """Turned and stored in eight bits again, or turned in sixteen or more at every call."""

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
        assert max(beyond_rounding(made["live"][name], exact) for name, exact in expected.items()) <= 0
        assert all(torch.equal(made["back"][name].float(), tensor) for name, tensor in floats.items())
        plain, turned_picture = (webui.draw(prompts[name]).pictures[0] for name in ("bare", "live"))
        assert abs(plain - turned_picture).max() > 5
    finally:
        store("Automatic")
