"""What is registered in which program, and what is said where a program has no place for it; they are stood in for."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lorad_networks import SMALL, unet
from networks import random_lorad
from webui_stand_ins import host_modules, lora_modules, module, standing_in

from wadi_core.lorad.rotation import rotate_

SENTENCE = "supported are stable-diffusion-webui (A1111) 1.9 or newer, Forge, Forge Neo and reForge"


def program(folder: Path, **parts: Any) -> dict[str, ModuleType]:
    """A1111 with its extension for LoRA, and other parts beside it by their dotted names, ``__`` for a dot."""
    found = {**host_modules(folder, SimpleNamespace()), **lora_modules(folder)}
    callbacks = found["modules.script_callbacks"]
    callbacks.__dict__.update(
        {name: lambda *args, **kwargs: None for name in ("on_before_ui", "on_ui_settings", "on_app_started")}
    )
    for name, contents in parts.items():
        words = name.split("__")
        for place in range(1, len(words)):
            found.setdefault(".".join(words[:place]), package(".".join(words[:place])))
        found[".".join(words)] = module(".".join(words), **contents)
    return found


def package(name: str) -> ModuleType:
    made = module(name)
    made.__path__ = []  # type: ignore[attr-defined]
    return made


def scheme() -> SimpleNamespace:
    """ComfyUI's scheme of weight adapters, as Forge Neo and reForge have it."""
    base = type("WeightAdapterBase", (), {})
    own = type("LoRAAdapter", (base,), {"name": "lora"})
    return SimpleNamespace(WeightAdapterBase=base, adapters=[own])


def panel() -> dict[str, ModuleType]:
    """Stands in for the extension's own panel, which wants the library that draws the page."""
    return {"a1111_extension.panel": module("a1111_extension.panel", Panel="the panel")}


@pytest.mark.parametrize(
    ("lacking", "file", "name"),
    [
        ("modules.sd_samplers_timesteps", "modules/sd_samplers_diffusers.py", "SD.Next"),
        ("modules.sd_samplers.get_sampler_and_scheduler", "ldm_patched/modules/model_patcher.py", "Forge Classic"),
        ("modules.sd_samplers_timesteps", "modules/sd_samplers_compvis.py", "an A1111 older than 1.6"),
        ("modules.sd_samplers_timesteps", "webui.py", "the program in"),
    ],
)
def test_a_program_that_is_not_supported_is_told_in_one_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lacking: str, file: str, name: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    found = program(tmp_path)
    found["modules.paths"].script_path = str(tmp_path)
    if lacking in found:
        del found[lacking]
    else:
        del found["modules.sd_samplers"].get_sampler_and_scheduler
    with standing_in(found) as extension, caplog.at_level(logging.WARNING, "wadi"):
        assert extension("start").register() is None
    (said,) = caplog.messages
    assert name in said and said.endswith(SENTENCE) and "\n" not in said
    assert [one.name for one in found["modules.sd_samplers"].all_samplers] == ["Euler"]


def test_a_part_that_fails_leaves_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = program(tmp_path)
    del found["networks"].module_types
    with standing_in({**found, **panel()}) as extension, caplog.at_level(logging.WARNING, "wadi"):
        assert extension("start").register() == "the panel"
        assert found["modules.sd_samplers"].names == ["Euler", "WaDi one-step"]
    (said,) = caplog.messages
    assert said.startswith("WaDi: LoRaD files cannot be used in this program (AttributeError: ")
    assert said.endswith("module_types'); the rest can")


def test_a_panel_that_fails_leaves_the_sampler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = program(tmp_path)
    broken = module("a1111_extension.panel")  # as in a program whose page is drawn by another library
    with standing_in({**found, broken.__name__: broken}) as extension, caplog.at_level(logging.WARNING, "wadi"):
        assert extension("start").register() is None
        assert found["modules.sd_samplers"].names == ["Euler", "WaDi one-step"]
        assert len(found["networks"].module_types) == 2
    (said,) = caplog.messages
    assert said.startswith("WaDi: the panel cannot be used in this program")


@pytest.mark.parametrize("place", ["backend__patcher__lora", "ldm_patched__modules__lora"], ids=["Forge Neo", "reForge"])
def test_programs_with_weight_adapters_get_one(tmp_path: Path, place: str) -> None:
    adapters = scheme()
    found = program(tmp_path, **{place: {"weight_adapter": adapters, "extra_weight_calculators": {}}})
    with standing_in(found) as extension:
        host = extension("host")
        assert host.adapter_module() == "adapters"
        for _ in range(2):  # at every "Reload UI"
            extension("adapters").register()
    own, ours = adapters.adapters
    assert (own.name, ours.name) == ("lora", "lorad") and issubclass(ours, adapters.WeightAdapterBase)
    a, b, weight = torch.randn(6, 2), torch.randn(2, 4), torch.randn(6, 8)
    expected = rotate_(weight.clone(), [(a, b, 0.5)])
    adapter = ours.load("x", {"x.lorad_a": a, "x.lorad_b": b}, None, None, set())
    assert adapter.loaded_keys == {"x.lorad_a", "x.lorad_b"}
    assert torch.equal(adapter.calculate_weight(weight, "x", 0.5, 1.0, None, lambda change: change), expected)


def test_forge_gets_a_loader_and_a_calculator(tmp_path: Path) -> None:
    lists = {"lora_collection_priority": ["the program's own"], "extra_weight_calculators": {}}
    found = program(tmp_path, backend__patcher__lora=lists)
    with standing_in(found) as extension:
        assert extension("host").adapter_module() == "patches"
        for _ in range(2):
            extension("patches").register()
        lora = found["backend.patcher.lora"]
        assert len(lora.lora_collection_priority) == 2 and list(lora.extra_weight_calculators) == ["lorad"]


def test_a1111_gets_a_kind_of_network(tmp_path: Path) -> None:
    with standing_in(program(tmp_path)) as extension:
        host = extension("host")
        assert (host.adapter_module(), host.sampler_module()) == ("network", "sampler")
        assert not host.knows_networks_by_widths()


def test_what_forge_has_applied_is_its_own_list(tmp_path: Path) -> None:
    found = program(tmp_path)
    file = r"C:\models\it's \"one\".safetensors"
    found["modules.sd_models"].model_data.sd_model.current_lora_hash = str([[file, 0.5, 1.0, False], ["b", -1, 1, True]])
    with standing_in(found) as extension:
        assert extension("host").applied() == [(Path(file), 0.5), (Path("b"), -1.0)]


@pytest.mark.parametrize("table", [set(), {}])
def test_an_alias_of_several_files_is_forbidden(tmp_path: Path, table: Any) -> None:
    found = program(tmp_path)
    found["networks"].forbidden_network_aliases = table
    with standing_in(found) as extension:
        extension("host").forbid_alias("Style")
    assert list(table) == ["style"]


def test_linked_subfolders_of_lorads_are_followed(tmp_path: Path) -> None:
    """Also one that leads back to where it lies."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "LoRaD"
    for place in (elsewhere / "deeper", folder):
        place.mkdir(parents=True)
    random_lorad(unet(SMALL)).save(elsewhere / "deeper" / "mine.safetensors")
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(folder, target_is_directory=True)
    (tmp_path / "loras").mkdir()
    found = {**program(tmp_path), **lora_modules(tmp_path / "loras")}
    with standing_in(found) as extension:
        catalog = extension("catalog")
        assert catalog.names() == ["mine"]
        assert catalog.file_of("mine") == folder / "linked" / "deeper" / "mine.safetensors"
