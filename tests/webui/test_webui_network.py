"""LoRaD as a network module of A1111, against the core's rotation; the program is stood in for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from layout_networks import ldm_state, small_state
from lorad_networks import SMALL, unet
from networks import random_lorad
from torch import Tensor, nn
from webui_stand_ins import host_modules, lora_modules, standing_in

from wadi_core import LoRaD
from wadi_core.lorad import layouts
from wadi_core.lorad.layers import adapter_key
from wadi_core.lorad.rotation import rotate, sum_angles


def program(tmp_path: Path, knows: bool = True) -> tuple[dict[str, ModuleType], dict[str, nn.Linear]]:
    """Stand-ins for A1111 with a small network loaded, and its linear layers by the program's names."""
    state = ldm_state(small_state(), prefix="")
    names = {name: name.removesuffix(".weight").replace(".", "_") for name, t in state.items() if t.ndim == 2}
    layers = {}
    for name, short in names.items():
        layer = nn.Linear(state[name].shape[1], state[name].shape[0], bias=False)
        layer.weight = nn.Parameter(state[name].clone(), requires_grad=False)
        layers[f"diffusion_model_{short}"] = layer
    diffusion_model = SimpleNamespace(state_dict=lambda: state)
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=diffusion_model), network_layer_mapping=layers)
    loras = lora_modules(tmp_path)
    layout = layouts.detect({name: tuple(tensor.shape) for name, tensor in state.items()})
    table = {adapter_key(path, layout.architecture): place.name for path, place in layout.places.items()}

    def convert(key: str, is_sd2: bool) -> str:
        known = "diffusion_model_" + table[key].removesuffix(".weight").replace(".", "_")
        return known if knows else known.replace("input_blocks_1", "input_blocks_9")

    loras["networks"].convert_diffusers_name_to_compvis = convert
    return {**host_modules(tmp_path, model), **loras}, layers


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    network = unet(SMALL)
    paths = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    random_lorad(network, seed=1).save(paths[0], torch.float32)
    random_lorad(network, seed=2, one_step=False).save(paths[1], torch.float32)
    return paths


@pytest.fixture(params=[True, False], ids=["names known", "names unknown"])
def loaded(request: Any, tmp_path: Path, files: tuple[Path, Path]) -> Iterator[tuple[Any, dict[str, nn.Linear]]]:
    modules, layers = program(tmp_path, request.param)
    with standing_in(modules) as extension:
        network = extension("network")
        network.register()
        yield modules["networks"], layers


def load(networks: Any, layers: dict[str, nn.Linear], file: Path, strength: float) -> SimpleNamespace:
    """What the program does with a file: each layer that it finds by a key goes to the first type that takes it."""
    lorad = LoRaD.load(file)
    net = SimpleNamespace(
        modules={}, unet_multiplier=strength, network_on_disk=SimpleNamespace(filename=str(file)), name=file.stem
    )
    for key, (a, b) in lorad.factors.items():
        name = networks.convert_diffusers_name_to_compvis(key, False)
        if name not in layers:
            continue
        weights = SimpleNamespace(network_key=key, sd_key=name, w={"lorad_a": a, "lorad_b": b}, sd_module=layers[name])
        net.modules[name] = networks.module_types[-1].create_module(net, weights)
    return net


def expected(layers: dict[str, nn.Linear], stack: list[tuple[Path, float]]) -> dict[str, Tensor]:
    state = ldm_state(small_state(), prefix="")
    layout = layouts.detect({name: tuple(tensor.shape) for name, tensor in state.items()})
    turned = {}
    for path, place in layout.layers().items():
        key, name = adapter_key(path, layout.architecture), place.name.removesuffix(".weight").replace(".", "_")
        factors = [(*LoRaD.load(file).factors[key], strength) for file, strength in stack]
        turned[f"diffusion_model_{name}"] = rotate(state[place.name], sum_angles(factors))
    return turned


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0, -0.3])
def test_each_layer_is_turned_as_the_core_turns_it(
    loaded: tuple[Any, dict[str, nn.Linear]], files: tuple[Path, Path], strength: float
) -> None:
    networks, layers = loaded
    net = load(networks, layers, files[0], strength)
    wanted = expected(layers, [(files[0], strength)])
    assert wanted.keys() <= net.modules.keys()
    for name, weight in wanted.items():
        delta, bias = net.modules[name].calc_updown(layers[name].weight)
        assert bias is None and delta.dtype == torch.float32
        assert torch.allclose(layers[name].weight + delta, weight, atol=1e-7)


def test_one_after_another_the_angles_add(loaded: tuple[Any, dict[str, nn.Linear]], files: tuple[Path, Path]) -> None:
    networks, layers = loaded
    stack = [(files[0], 0.7), (files[1], -1.2)]
    nets = [load(networks, layers, *one) for one in stack]
    for name, wanted in expected(layers, stack).items():
        weight = layers[name].weight.clone()
        for net in nets:
            weight += net.modules[name].calc_updown(weight)[0]
        assert torch.allclose(weight, wanted, atol=2e-7)


def test_the_old_method_adds_angles_too(loaded: tuple[Any, dict[str, nn.Linear]], files: tuple[Path, Path]) -> None:
    networks, layers = loaded
    stack = [(files[0], 0.7), (files[1], -1.2)]
    networks.loaded_networks[:] = nets = [load(networks, layers, *one) for one in stack]
    for name, wanted in expected(layers, stack).items():
        x = torch.randn(3, wanted.shape[1])
        y = x @ layers[name].weight.T
        for net in nets:
            y = net.modules[name].forward(x, y)
        assert torch.allclose(y, x @ wanted.T, atol=1e-5)


def test_half_precision_is_turned_in_full(loaded: tuple[Any, dict[str, nn.Linear]], files: tuple[Path, Path]) -> None:
    networks, layers = loaded
    for layer in layers.values():
        layer.weight.data = layer.weight.data.half()
    net = load(networks, layers, files[0], 1.0)
    for name, wanted in expected(layers, [(files[0], 1.0)]).items():
        weight = layers[name].weight
        assert torch.allclose(weight.float() + net.modules[name].calc_updown(weight)[0], wanted, atol=3e-4)


def test_registering_again_adds_nothing(tmp_path: Path) -> None:
    modules, _ = program(tmp_path)
    with standing_in(modules) as extension:
        for _ in range(3):
            extension("network").register()
        types = modules["networks"].module_types
        assert types[0] == "the program's own" and [type(one).__name__ for one in types[1:]] == ["ModuleTypeLoRaD"]


def test_without_the_programs_extension_nothing_happens(tmp_path: Path) -> None:
    modules = host_modules(tmp_path, None)
    with standing_in(modules) as extension:
        extension("network").register()
        assert extension("catalog").choices() == ["None"]
        assert extension("catalog").file_of("anything") is None


def test_what_does_not_fit_is_refused(tmp_path: Path, files: tuple[Path, Path]) -> None:
    modules, layers = program(tmp_path)
    name, layer = next(iter(layers.items()))
    with standing_in(modules) as extension:
        extension("network").register()
        kind = modules["networks"].module_types[-1]
        net = SimpleNamespace(modules={}, unet_multiplier=1.0, network_on_disk=SimpleNamespace(filename=str(files[0])))

        def create(**w: Tensor) -> Any:
            weights = SimpleNamespace(network_key="key", sd_key=name, w=w, sd_module=layer)
            return kind.create_module(net, weights)

        assert create(**{"lora_up.weight": torch.zeros(1)}) is None
        with pytest.raises(ValueError, match="one is missing"):
            create(lorad_a=torch.zeros(layer.out_features, 1))
        with pytest.raises(ValueError, match="do not fit"):
            create(lorad_a=torch.zeros(layer.out_features + 1, 1), lorad_b=torch.zeros(1, layer.in_features // 2))
