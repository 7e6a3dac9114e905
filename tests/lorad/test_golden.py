"""Parity with the authors' reference implementation, on two small U-Nets whose every number it computed.

conv_proj: convolutional proj_in and proj_out, as in SD 1.5; linear_proj: linear ones, as in SD 2.1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lorad_networks import same_bits, unet, weights
from safetensors import safe_open
from torch import Tensor, nn

from wadi_core.lorad import LoRaD, Metadata, fuse
from wadi_core.lorad.layers import adapter_key, student_layers
from wadi_core.lorad.linear import RotatedLinear
from wadi_core.lorad.rotation import recover_angles, rotate_

DATA = Path(__file__).parents[1] / "data"
STUDENT = Metadata("unet-custom", alpha_T_squared=0.0047, timestep=999)


@dataclass
class Reference:
    network: nn.Module
    lorad: LoRaD
    tensors: dict[str, Tensor]

    def __getitem__(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    @torch.no_grad()
    def eps(self) -> Tensor:
        return self.network(self.tensors["z"], 999, self.tensors["prompt_embeds"]).sample

    def check_output(self) -> None:
        eps = self.eps()
        assert (eps - self.tensors["eps"]).abs().max() < 1e-5
        assert self.lorad.one_step is not None
        assert (self.lorad.one_step.x0(self.tensors["z"], eps) - self.tensors["x0"]).abs().max() < 2e-4


@pytest.fixture(params=["conv_proj", "linear_proj"])
def reference(request: pytest.FixtureRequest) -> Reference:
    with safe_open(DATA / f"reference_unet_{request.param}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["unet_config"])
        rank = int(file.metadata()["rank"])
    network = unet(config)
    result = Reference(network, LoRaD({"none": (torch.zeros(1, 1), torch.zeros(1, 1))}), tensors)
    network.load_state_dict(result["base."])
    theta = result["theta."]
    paths = [name.removesuffix(".theta_a") for name in theta if name.endswith(".theta_a")]
    factors = {adapter_key(path, "unet-custom"): (theta[f"{path}.theta_a"], theta[f"{path}.theta_b"]) for path in paths}
    assert set(paths) == set(student_layers(network))
    result.lorad = LoRaD(factors, STUDENT)
    assert result.lorad.rank == rank
    return result


def test_merged_weights(reference):
    before = weights(reference.network)
    reference.lorad.fuse_into(reference.network)
    after = weights(reference.network)
    merged = reference["merged."]
    assert len(merged) == len(reference.lorad.factors)
    assert max((after[name] - merged[name]).abs().max().item() for name in merged) < 1e-6
    assert same_bits({n: t for n, t in before.items() if n not in merged}, {n: t for n, t in after.items() if n not in merged})


def test_one_step_fused(reference):
    fused = reference.lorad.fuse_into(reference.network)
    reference.check_output()
    assert len(fused.layers) == len(reference.lorad.factors)


def test_one_step_live(reference):
    reference.lorad.apply_to(reference.network)
    reference.check_output()
    layers = [layer for layer in reference.network.modules() if isinstance(layer, RotatedLinear)]
    assert len(layers) == len(reference.lorad.factors)
    merged = reference["merged."]
    for name, weight in merged.items():
        layer = reference.network.get_submodule(name.removesuffix(".weight"))
        assert (layer.rotated_weight() - weight).abs().max() < 1e-6


def test_one_step_live_with_weights_rotated_again_in_backward(reference):
    reference.lorad.apply_to(reference.network)
    for layer in reference.network.modules():
        if isinstance(layer, RotatedLinear):
            layer.recompute = True
    reference.check_output()


def test_strength_zero_is_the_base_to_the_bit(reference):
    bare = reference.eps()
    before = weights(reference.network)
    reference.lorad.apply_to(reference.network, strength=0.0)
    assert torch.equal(reference.eps(), bare)
    reference.lorad.remove(reference.network)
    assert fuse(reference.network, [(reference.lorad, 0.0)]).layers == []
    assert same_bits(weights(reference.network), before)
    assert torch.equal(reference.eps(), bare)


def test_removing_and_restoring_put_the_very_bits_back(reference):
    bare, before = reference.eps(), weights(reference.network)
    modules = dict(reference.network.named_modules())
    reference.lorad.apply_to(reference.network)
    reference.lorad.remove(reference.network)
    assert same_bits(weights(reference.network), before)
    assert all(module is modules[name] for name, module in reference.network.named_modules())
    fused = reference.lorad.fuse_into(reference.network)
    assert not same_bits(weights(reference.network), before)
    fused.restore()
    fused.restore()
    assert same_bits(weights(reference.network), before)
    assert torch.equal(reference.eps(), bare)


def test_the_negative_angle_is_the_inverse(reference):
    before = weights(reference.network)
    reference.lorad.fuse_into(reference.network, keep_backup=False)
    reference.lorad.fuse_into(reference.network, strength=-1.0, keep_backup=False)
    after = weights(reference.network)
    assert max((after[name] - before[name]).abs().max().item() for name in before) < 1e-6


def test_norms_of_rows_are_kept(reference):
    before = weights(reference.network)
    reference.lorad.fuse_into(reference.network)
    for path in student_layers(reference.network):
        old, new = before[f"{path}.weight"].norm(dim=1), reference.network.get_submodule(path).weight.norm(dim=1)
        assert (new - old).abs().max() < 1e-6


def test_the_reference_s_angles_come_back_from_its_weights(reference):
    theta = reference["theta."]
    for name, merged in reference["merged."].items():
        path = name.removesuffix(".weight")
        angles = theta[f"{path}.theta_a"].double() @ theta[f"{path}.theta_b"].double()
        base = reference["base."][name]
        assert angles.abs().max() < 3.1
        recovered = recover_angles(base, merged)
        lengths = base.unflatten(1, (-1, 2)).norm(dim=-1)
        assert ((recovered - angles).abs() * lengths).max() < 1e-6


def test_the_authors_factors_are_read_as_the_same_adapter(reference, tmp_path):
    factors = reference["theta."]
    torch.save({f"module.{name}": tensor for name, tensor in factors.items()}, tmp_path / "kduv.pth")
    lorad = LoRaD.load(tmp_path / "kduv.pth")
    assert lorad.one_step == reference.lorad.one_step
    lorad.fuse_into(reference.network)
    reference.check_output()


def test_saved_and_loaded_in_float32_it_is_the_same_adapter(reference, tmp_path):
    reference.lorad.save(tmp_path / "student.safetensors", dtype=torch.float32)
    LoRaD.load(tmp_path / "student.safetensors").apply_to(reference.network)
    reference.check_output()


def test_two_halves_are_the_whole(reference):
    """Angles add: half on the weights, half live."""
    reference.lorad.fuse_into(reference.network, strength=0.5)
    reference.lorad.apply_to(reference.network, strength=0.5)
    reference.check_output()


def test_several_are_rounded_once(reference):
    network = reference.network.half()
    before = weights(network)
    fuse(network, [(reference.lorad, 0.25), (reference.lorad, 0.75)])
    for path in student_layers(network):
        key = adapter_key(path, "unet-custom")
        once = before[f"{path}.weight"].float()
        rotate_(once, [(*reference.lorad.factors[key], 1.0)])
        assert (network.get_submodule(path).weight - once.half()).abs().max() < 1e-6 + once.abs().max() * 2**-10
