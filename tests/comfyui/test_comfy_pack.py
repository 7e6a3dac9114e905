"""The ComfyUI pack as far as it can be tested without ComfyUI: what loading it costs, its files, its weight adapter."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy_stubs
import lorad_networks
import networks
import pytest
import torch
from safetensors.torch import save_file

from wadi_core.lorad.rotation import rotate_

NODES = sorted((comfy_stubs.ROOT / "comfy_nodes").glob("*.py"))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models folder as ComfyUI has one."""
    (tmp_path / "models/loras").mkdir(parents=True)
    return tmp_path / "models"


@pytest.fixture
def load(models: Path) -> Iterator[Callable[..., Any]]:
    """Imports modules of the pack."""
    with comfy_stubs.pack(models) as importer:
        yield importer


@pytest.fixture
def files(load: Callable[..., Any]) -> Any:
    module = load("comfy_nodes.files")
    module.register()
    return module


# The pack


def test_loading_the_root_file_loads_nothing_else(load: Callable[..., Any]) -> None:
    root = load()
    assert inspect.iscoroutinefunction(root.comfy_entrypoint) and not hasattr(root, "NODE_CLASS_MAPPINGS")
    assert not [name for name in sys.modules if name.startswith(f"{comfy_stubs.PACK}.")]
    assert (comfy_stubs.ROOT / root.WEB_DIRECTORY).is_dir()


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.stem)
def test_nodes_run_nothing_that_a_registry_forbids(path: Path) -> None:
    """No code out of text, no installing, no other programs."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & {"subprocess", "pip", "pickle", "shutil", "requests", "urllib"}


# Files


def test_both_folders_are_looked_into(files: Any, models: Path) -> None:
    lorad = networks.random_lorad(lorad_networks.unet(lorad_networks.SMALL))
    lorad.save(models / "lorad/ours.safetensors")
    (models / "loras/deep").mkdir()
    lorad.save(models / "loras/deep/ours-too.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, models / "loras/theirs.safetensors")
    (models / "loras/broken.safetensors").write_bytes(b"no")
    with_the_pack = ["wadi-mini-left-of.safetensors", "wadi-mini-sks-hibiscus.safetensors"]
    assert files.names() == ["deep/ours-too.safetensors", "ours.safetensors", *with_the_pack]
    assert files.load("deep/ours-too.safetensors").rank == lorad.rank


def test_a_file_in_use_is_not_read_twice_and_a_changed_one_is(files: Any, models: Path) -> None:
    network = lorad_networks.unet(lorad_networks.SMALL)
    networks.random_lorad(network, rank=4).save(models / "lorad/a.safetensors")
    first = files.load("a.safetensors")
    assert files.load("a.safetensors") is first
    networks.random_lorad(network, rank=2).save(models / "lorad/a.safetensors")
    assert files.load("a.safetensors").rank == 2


@pytest.mark.parametrize("name", ["nothing.safetensors", "../secret.safetensors", "/etc/passwd", ""])
def test_names_lead_to_files_in_the_folders_only(files: Any, models: Path, name: str) -> None:
    (models.parent / "secret.safetensors").write_bytes(b"secret")
    with pytest.raises(FileNotFoundError, match="no such file in models/lorad"):
        files.path_of(name)


def test_new_files_get_names_that_are_free(files: Any, models: Path) -> None:
    root = models / "lorad"
    assert files.new_path("lorad", "a") == root / "a.safetensors"
    assert files.new_path("lorad", " mine/b.v1.safetensors ") == root / "mine/b.v1.safetensors"
    assert (root / "mine").is_dir()
    for taken in ("a.safetensors", "a-2.safetensors"):
        (root / taken).touch()
    assert files.new_path("lorad", "a") == root / "a-3.safetensors"
    assert files.name_of("lorad", root / "mine/b.safetensors") == str(Path("mine/b.safetensors"))


@pytest.mark.parametrize("name", ["", "  ", "..", "../a", "a/../../b", "/a", "\\\\host\\a", "C:a", "C:\\a", "a\\..\\..\\b"])
def test_new_files_stay_in_their_folder(files: Any, models: Path, name: str) -> None:
    before = sorted(models.parent.rglob("*"))
    with pytest.raises(ValueError, match="is no name for a file in models/lorad"):
        files.new_path("lorad", name)
    assert sorted(models.parent.rglob("*")) == before


def test_a_link_does_not_lead_out(files: Any, models: Path) -> None:
    outside = models.parent / "outside"
    outside.mkdir()
    (models / "lorad/link").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out"):
        files.new_path("lorad", "link/a")


# The weight adapter


def test_adapter_is_the_cores_rotation_in_place(load: Callable[..., Any]) -> None:
    adapter = load("comfy_nodes.weight_adapter").LoRaDAdapter
    a, b, whole = torch.randn(6, 2), torch.randn(2, 4), torch.randn(10, 8)
    expected = whole.clone()
    rotate_(expected[2:8], [(a, b, 0.5)])
    rows = whole[2:8]
    arguments = {"key": "k", "strength": 0.5, "strength_model": 1.0, "offset": (0, 2, 6), "function": lambda change: change}
    returned = adapter(set(), (a, b)).calculate_weight(rows, **arguments)
    assert returned is rows and torch.equal(whole, expected)


def test_adapter_claims_its_own_tensors_and_refuses_halves(load: Callable[..., Any]) -> None:
    adapter = load("comfy_nodes.weight_adapter").LoRaDAdapter
    a, b = torch.randn(6, 2), torch.randn(2, 4)
    found = adapter.load("x", {"x.lorad_a": a, "x.lorad_b": b, "x.alpha": torch.tensor(1.0)}, 1.0, None, set())
    assert found.loaded_keys == {"x.lorad_a", "x.lorad_b"} and found.weights == (a, b)
    assert adapter.load("x", {"x.lora_up.weight": a}, None, None) is None
    with pytest.raises(ValueError, match="only one of its two tensors"):
        adapter.load("x", {"x.lorad_a": a}, None, None)
    with pytest.raises(ValueError, match="do not multiply"):
        adapter.load("x", {"x.lorad_a": a, "x.lorad_b": torch.randn(3, 4)}, None, None)


def test_registering_twice_registers_once(load: Callable[..., Any]) -> None:
    module = load("comfy_nodes.weight_adapter")
    for _ in range(2):
        module.register()
    host = sys.modules["comfy.weight_adapter"]
    assert host.adapters == [module.LoRaDAdapter] and host.adapter_maps == {"LoRaD": module.LoRaDAdapter}


def test_angles_are_trained_on_matrices_and_nothing_on_the_rest(load: Callable[..., Any]) -> None:
    adapter = load("comfy_nodes.weight_adapter").LoRaDAdapter
    weight = torch.randn(6, 8)
    trained = adapter.create_train(weight, rank=2, alpha=1.0).to(torch.float32)
    assert [name for name, _ in trained.named_parameters()] == ["lorad_a", "lorad_b"]
    assert torch.equal(trained(weight), weight)
    with torch.no_grad():
        trained.lorad_a.copy_(torch.randn(6, 2))
    turned = trained(weight)
    a, b = trained.lorad_a.detach(), trained.lorad_b.detach()
    assert torch.allclose(turned, rotate_(weight.clone(), [(a, b, 1.0)]), atol=1e-6)
    turned.square().mul(torch.randn(6, 8)).sum().backward()
    assert trained.lorad_a.grad.any() and trained.lorad_b.grad.any() and turned.dtype == weight.dtype
    again = adapter(set(), (a, b)).to_train()
    assert torch.equal(again(weight), turned)
    for other in (torch.randn(6, 8, 3, 3), torch.randn(6, 7)):
        nothing = adapter.create_train(other, rank=2, alpha=1.0)
        assert not list(nothing.parameters()) and nothing(other) is other
