"""Run by ComfyUI's own Python: what its patching does with LoRaD layers in ways that need a GPU when a server does them.

    python comfy_inside.py COMFYUI PACK OUTPUT        writes what was measured as JSON

Errors are Frobenius norms over that of the change: 1 is as wrong as no adapter at all.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any


def host(path: str) -> None:
    """Make ComfyUI's modules importable, set up for the CPU."""
    sys.path.insert(0, path)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()


def pack(path: str) -> Any:
    """The pack, imported as ComfyUI imports it: under a name made of its path."""
    name = "custom_nodes_wadi"
    spec = importlib.util.spec_from_file_location(name, Path(path, "__init__.py"), submodule_search_locations=[path])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return name


def measure(name: str) -> dict[str, Any]:
    """Everything."""
    import comfy.lora
    import comfy.model_patcher
    import comfy.weight_adapter
    import torch

    adapters = importlib.import_module(f"{name}.comfy_nodes.weight_adapter")
    rotation = importlib.import_module(f"{name}.wadi_core.lorad.rotation")
    make = adapters.LoRaDAdapter
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    weight = random(96, 64, scale=0.05)
    one, two = [(random(96, 8, scale=0.2), random(8, 32, scale=0.2)) for _ in range(2)]
    whole = random(160, 64, scale=0.05)  # a fused weight: rows 32 to 128 are the layer's

    def exact(start: torch.Tensor, *parts: tuple[Any, float]) -> torch.Tensor:
        return rotation.rotate_(start.double().clone(), [(a.double(), b.double(), strength) for (a, b), strength in parts])

    def error(found: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> float:
        return float((found.double() - expected).norm() / (expected - start.double()).norm())

    def patch(pair: Any, strength: float = 1.0, model: float = 1.0, offset: Any = None, function: Any = None) -> tuple:
        return (strength, make(set(), pair), model, offset, function)

    def calculate(start: torch.Tensor, *patches: tuple, **more: Any) -> torch.Tensor:
        return comfy.lora.calculate_weight(list(patches), start.clone(), "key", **more)

    found: dict[str, Any] = {"errors": {}}
    errors = found["errors"]
    errors["float32"] = error(calculate(weight, patch(one)), exact(weight, (one, 1.0)), weight)
    errors["strength"] = error(calculate(weight, patch(one, 0.3)), exact(weight, (one, 0.3)), weight)
    errors["two"] = error(calculate(weight, patch(one), patch(two, -0.5)), exact(weight, (one, 1.0), (two, -0.5)), weight)
    errors["strength of the model"] = error(calculate(weight, patch(one, model=0.5)), exact(weight, (one, 1.0)) * 0.5, weight)
    fused = calculate(whole, patch(one, offset=(0, 32, 96)))
    expected = whole.double().clone()
    expected[32:128] = exact(whole[32:128], (one, 1.0))
    errors["rows of a fused weight"] = error(fused, expected, whole)
    halved = calculate(weight, patch(one, function=lambda change: change * 0.5))
    errors["function of the change"] = error(halved, (weight.double() + exact(weight, (one, 1.0))) / 2, weight)
    hooked = calculate(weight, patch(one), original_weights={"key": [(weight, lambda value, **_: value)]})
    errors["under hooks"] = error(hooked, exact(weight, (one, 1.0)), weight)

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        # Low VRAM: the weight is cast while the network runs, and patched in that type.
        start = weight.to(dtype)
        low = comfy.model_patcher.LowVramPatch("key", {"key": [patch(one), patch(two, 0.5)]})(start.clone())
        assert low.dtype == dtype
        expected = exact(start, (one, 1.0), (two, 0.5))
        found["errors"][f"low VRAM, {dtype}"] = error(low, expected, start)
        # What one rounding of the exact result to this type leaves: the measure for the above.
        found["errors"][f"rounding, {dtype}"] = error(expected.to(dtype), expected, start)

    half = tuple(factor.half() for factor in one)
    prepared = prepare(comfy.model_patcher.LowVramPatch, patch(half))
    if prepared is not None:
        made, result = prepared
        found["rebuilt"] = {"type": type(made).__name__, "moved": made.weights[0].data_ptr() != half[0].data_ptr()}
        errors["dynamic VRAM"] = error(result(weight), exact(weight, (half, 1.0)), weight)

    try:
        make(set(), one).bypass_forward(lambda x: x, random(1, 64))
    except ValueError as refusal:
        found["bypass"] = str(refusal)
    try:
        calculate(random(96, 62), patch(one))
    except ValueError as refusal:
        found["other shape"] = str(refusal)

    for _ in range(2):
        adapters.register()
    found["registered"] = [getattr(known, "name", "") for known in comfy.weight_adapter.adapters].count("lorad")
    file = {"layer.lorad_a": one[0], "layer.lorad_b": one[1], "other.lora_up.weight": weight}
    claimed = {key: make.load(key, file, None, None, set()) for key in ("layer", "other", "none")}
    found["claimed"] = {key: sorted(adapter.loaded_keys) for key, adapter in claimed.items() if adapter is not None}
    found["embedded"] = embedded(name)
    return found


def embedded(name: str) -> dict[str, Any]:
    """wadi-mini as ComfyUI's objects, and whether ComfyUI could load its parts a second time, as it does for hooks."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models

    extension, loader = (importlib.import_module(f"{name}.comfy_nodes.{part}") for part in ("extension", "embedded"))
    for _ in range(2):
        extension.register()
    found = {"kinds": [kind.__name__ for kind in comfy.supported_models.models].count("WadiMini")}
    options = {"disable_dynamic": True} if "disable_dynamic" in signature(comfy.sd.load_diffusion_model_state_dict) else {}
    for part, patcher in (("model", loader.load_model()), ("clip", loader.load_clip().patcher)):
        again = patcher.cached_patcher_init[0](*patcher.cached_patcher_init[1], **options)
        found[part] = isinstance(again, comfy.model_patcher.ModelPatcher) and again.model is not patcher.model
    return found


def signature(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def prepare(patch_class: Any, patch: tuple) -> Any:
    """An adapter as dynamic VRAM rebuilds it out of a buffer, and a function that patches with it; None where it cannot."""
    if not hasattr(patch_class, "prepare"):  # older ComfyUI has no dynamic VRAM
        return None
    import torch

    lazy = patch_class("key", {"key": [patch]})
    lazy.prepare(torch.empty(lazy.memory_required(), dtype=torch.uint8), None)
    return lazy.prepared_patches[0][1], lambda weight: lazy(weight.clone())


if __name__ == "__main__":
    _, comfyui, folder, output = sys.argv
    host(comfyui)
    Path(output).write_text(json.dumps(measure(pack(folder))))
