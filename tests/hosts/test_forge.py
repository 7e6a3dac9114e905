"""The extension in a real Forge, on the CPU, with a checkpoint of random weights and Stable Diffusion's own width."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not os.environ.get("FORGE_PATH"):
    pytest.skip("no Forge: set FORGE_PATH (and FORGE_PYTHON) to run the tests of its extension", allow_module_level=True)

pytest.register_assert_rewrite("webui_cases")

from webui_cases import *  # noqa: E402, F403 - the tests that both programs have
from webui_cases import close, tag, weights_after  # noqa: E402
from webui_models import Base, turned, wide, wide_velocity  # noqa: E402
from webui_server import WebUI, lay_out  # noqa: E402

FP8, FP8_SMALLEST = 2**-4, 2**-10  # half a step of float8_e4m3fn, relative, and absolute below its normal numbers


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("forge")
    models, work = lay_out(data), tmp_path_factory.mktemp("bases")
    base = wide(models, work)
    return {"data": data, "wide": base, "wide-v": wide_velocity(models, base, work)}


@pytest.fixture(scope="module")
def webui(laid_out: dict[str, Any]) -> Iterator[WebUI]:
    server = WebUI("forge", laid_out["data"]).start()
    server.choose("wide")
    yield server
    server.stop()


@pytest.fixture
def base(laid_out: dict[str, Any]) -> Base:
    return laid_out["wide"]


def test_forge_controlnet_is_there_and_makes_no_error(webui: WebUI) -> None:
    scripts = webui.get("/sdapi/v1/scripts")["txt2img"]
    assert "controlnet" in scripts and "wadi" in scripts
    assert "Traceback" not in webui.said().split("Startup time")[0]


def test_a_network_that_returns_v(webui: WebUI, laid_out: dict[str, Any]) -> None:
    webui.choose("wide-v")
    try:
        v = laid_out["wide-v"]
        assert close(webui.draw("a cat" + tag(v, "velocity")), v.pictures("a cat", [3], v.adapters["velocity"]))
        assert webui.draw().fields["WaDi"].startswith("alpha_T^2 0.0047 t 999 v_prediction")
        webui.draw("a cat" + tag(v, "one-step"))
        assert any("they are followed" in line for line in webui.comments())
    finally:
        webui.choose("wide")


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
        for name, exact in expected.items():
            assert torch.allclose(made["live"][name].float(), exact, rtol=FP8, atol=FP8_SMALLEST)
        assert all(torch.equal(made["back"][name].float(), tensor) for name, tensor in floats.items())
        plain, turned_picture = (webui.draw(prompts[name]).pictures[0] for name in ("bare", "live"))
        assert abs(plain - turned_picture).max() > 5
    finally:
        store("Automatic")
