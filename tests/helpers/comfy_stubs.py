"""The few names of ComfyUI that the pack's plain parts touch, for tests that run without it.

What needs more than this is tested in a real ComfyUI: ``tests/hosts``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACK = "custom_nodes_wadi"


class WeightAdapterBase:
    """ComfyUI's base class has no code that the adapter uses."""


class WeightAdapterTrainBase(torch.nn.Module):
    """ComfyUI's is such a module too."""


def _folder_paths(models: Path) -> ModuleType:
    """Looking files up in model folders, as ComfyUI does: a name is taken relative to the root and then to the folder."""
    module = ModuleType("folder_paths")
    folders: dict[str, Any] = {"loras": ([str(models / "loras")], {".safetensors"})}

    def get_full_path(kind: str, name: str) -> str | None:
        name = os.path.relpath(os.path.join("/", name), "/")
        found = (os.path.join(place, name) for place in folders[kind][0])
        return next((path for path in found if os.path.isfile(path)), None)

    def get_filename_list(kind: str) -> list[str]:
        places, endings = folders[kind]
        files = [(path, place) for place in places for path in Path(place).rglob("*") if path.suffix in endings]
        return sorted(str(path.relative_to(place)) for path, place in files)

    module.models_dir = str(models)
    module.folder_names_and_paths = folders
    module.get_full_path = get_full_path
    module.get_filename_list = get_filename_list
    module.get_folder_paths = lambda kind: list(folders[kind][0])
    module.add_model_folder_path = lambda kind, place: folders.setdefault(kind, ([], set()))[0].append(place)
    return module


@contextmanager
def pack(models: Path) -> Iterator[Any]:
    """A function that imports a module of the pack by its name, under a name made of a path as ComfyUI does it.

    Args:
        models: what the pack takes for ComfyUI's models folder.
    """
    comfy, adapters, base = (ModuleType(name) for name in ("comfy", "comfy.weight_adapter", "comfy.weight_adapter.base"))
    base.WeightAdapterBase, base.WeightAdapterTrainBase = WeightAdapterBase, WeightAdapterTrainBase
    adapters.adapter_maps = {}
    adapters.adapters, adapters.base, comfy.weight_adapter = [], base, adapters
    stubs = {module.__name__: module for module in (comfy, adapters, base)}
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    root = importlib.util.module_from_spec(spec)
    sys.modules |= {**stubs, "folder_paths": _folder_paths(models), PACK: root}
    try:
        spec.loader.exec_module(root)
        yield lambda name="": importlib.import_module(f"{PACK}.{name}" if name else PACK)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in (PACK, "comfy", "folder_paths")]:
            del sys.modules[name]
