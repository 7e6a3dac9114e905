"""LoRaD on a live network: the same numbers and gradients as plain autograd, and a well-behaved module."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lorad_networks import same_bits, weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wadi_core.lorad.linear import RotatedLinear, attach, detach, factors_of, set_active
from wadi_core.lorad.rotation import angles, rotate


def a_layer(out: int = 6, pairs: int = 4, rank: int = 3, bias: bool = True, dtype=torch.float64, scale: float = 0.5):
    linear = nn.Linear(2 * pairs, out, bias=bias, dtype=dtype).requires_grad_(False)
    theta_a = torch.randn(out, rank, dtype=dtype) * scale
    theta_b = torch.randn(rank, pairs, dtype=dtype) * scale
    return linear, theta_a, theta_b


def live(linear: nn.Linear, *factors: Tensor, recompute: bool = False) -> RotatedLinear:
    layer = RotatedLinear(linear)
    layer.add("student", *factors, trainable=True)
    layer.recompute = recompute
    return layer


def plain(x: Tensor, linear: nn.Linear, theta_a: Tensor, theta_b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by rotate alone, differentiated by autograd."""
    return F.linear(x, rotate(linear.weight, theta_a @ theta_b), linear.bias if bias is None else bias)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_plain_autograd(recompute, shape, bias):
    linear, a, b = a_layer(bias=bias)
    layer = live(linear, a, b, recompute=recompute)
    x = torch.randn(*shape[:-1], 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*shape[:-1], 6, dtype=torch.float64)
    (layer(x).sin() * weight).sum().backward()
    expected_x = x.detach().clone().requires_grad_()
    a, b = a.requires_grad_(), b.requires_grad_()
    output = plain(expected_x, linear, a, b)
    (output.sin() * weight).sum().backward()
    assert torch.allclose(layer(x), output, atol=1e-12)
    for got, wanted in [(x, expected_x), (layer.lorad_a["student"], a), (layer.lorad_b["student"], b)]:
        assert torch.allclose(got.grad, wanted.grad, atol=1e-12)
    assert linear.weight.grad is None


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute):
    linear, a, b = a_layer(out=3, pairs=2, rank=2)
    layer = live(linear, a, b, recompute=recompute)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def of(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lorad_a.student": a, "lorad_b.student": b}, (x,))

    assert torch.autograd.gradcheck(of, (x, a.clone().requires_grad_(), b.clone().requires_grad_()))


def test_a_trainable_bias_gets_its_gradient():
    linear, a, b = a_layer()
    linear.bias.requires_grad_()
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    (live(linear, a, b)(x) * weight).sum().backward()
    assert torch.allclose(linear.bias.grad, weight.sum(0))


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**31))
def test_gradients_in_float32(out, pairs, rank, batch, seed):
    torch.manual_seed(seed)
    linear, a, b = a_layer(out, pairs, rank, dtype=torch.float32)
    x = torch.randn(batch, 2 * pairs)
    layer = live(linear, a, b)
    layer(x).square().sum().backward()
    a64, b64 = a.double().requires_grad_(), b.double().requires_grad_()
    plain(x.double(), linear.double(), a64, b64).square().sum().backward()
    scale = 1 + a64.grad.abs().max() + b64.grad.abs().max()
    assert (layer.lorad_a["student"].grad - a64.grad).abs().max() < 1e-5 * scale
    assert (layer.lorad_b["student"].grad - b64.grad).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_under_autocast_only_the_product_is_rounded(inside):
    """theta, its sine and cosine stay float32; angles of 1e-4 would vanish in bfloat16."""
    linear, a, b = a_layer(16, 16, 4, dtype=torch.float32, scale=1e-2)
    layer = live(linear, a, b)
    x = torch.randn(8, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        if inside:
            y.sum().backward()
    assert y.dtype == torch.bfloat16
    if not inside:
        y.sum().backward()
    rotated = rotate(linear.weight, angles(a, b))
    expected = F.linear(x.bfloat16(), rotated.bfloat16(), linear.bias.bfloat16())
    assert torch.equal(y, expected)
    exact = layer.lorad_a["student"].grad
    a, b = a.requires_grad_(), b.requires_grad_()
    plain(x, linear, a, b).sum().backward()
    for got, wanted in [(layer.lorad_a["student"].grad, a.grad), (layer.lorad_b["student"].grad, b.grad)]:
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.02 * wanted.norm()
    assert not torch.equal(exact, exact.bfloat16().float())  # products with the factors are not rounded either


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_keeps_its_angles_in_float32(dtype):
    linear, a, b = a_layer(dtype=torch.float32, scale=1e-2)
    before = RotatedLinear(copy.deepcopy(linear).to(dtype))
    before.add("student", a, b)
    after = live(copy.deepcopy(linear), a, b).to(dtype)
    for layer in (before, after):
        assert layer.weight.dtype == dtype
        assert layer.lorad_a["student"].dtype == layer.lorad_b["student"].dtype == torch.float32
        assert torch.equal(layer.lorad_a["student"], a) and torch.equal(layer.lorad_b["student"], b)
        rotated = rotate(linear.weight.to(dtype), angles(a, b))
        assert torch.equal(layer.rotated_weight(), rotated)
        if dtype == torch.bfloat16:  # torch 2.1 has no product in float16 on the CPU
            x = torch.randn(3, 8, dtype=dtype)
            assert torch.equal(layer(x), F.linear(x, rotated, linear.bias.to(dtype)))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_checkpointing(recompute):
    linear, a, b = a_layer()
    one, other = live(linear, a, b, recompute=recompute), live(linear, a, b)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for reentrant in (False, True):
        for tensor in (x, y, *one.parameters(), *other.parameters()):
            tensor.grad = None
        checkpoint(lambda v: one(v).tanh(), x, use_reentrant=reentrant).sum().backward()
        other(y).tanh().sum().backward()
        assert torch.equal(x.grad, y.grad)
        for name in ("lorad_a", "lorad_b"):
            assert torch.equal(getattr(one, name)["student"].grad, getattr(other, name)["student"].grad)


def test_active_adapters_add_their_angles_and_none_is_the_bare_layer():
    linear, a, b = a_layer()
    _, c, d = a_layer(rank=2)
    x = torch.randn(3, 8, dtype=torch.float64)
    bare = linear(x)
    layer = RotatedLinear(linear)
    layer.add("student", a, b)
    layer.add("style", c, d, strength=0.5)
    assert layer.active == ("student", "style")
    both = F.linear(x, rotate(linear.weight, a @ b + 0.5 * (c @ d)), linear.bias)
    assert torch.allclose(layer(x), both, atol=1e-12)
    assert torch.allclose(F.linear(x, layer.rotated_weight(), linear.bias), both, atol=1e-12)
    set_active(layer, ["style"])
    assert torch.allclose(layer(x), F.linear(x, rotate(linear.weight, 0.5 * (c @ d)), linear.bias), atol=1e-12)
    set_active(layer, [])
    assert torch.equal(layer(x), bare)
    layer.strengths["student"] = 0.0
    set_active(layer, ["student"])
    assert torch.equal(layer(x), bare)


def test_gradients_reach_each_of_several_active_adapters():
    linear, a, b = a_layer()
    _, c, d = a_layer(rank=2)
    layer = RotatedLinear(linear)
    layer.add("student", a, b, trainable=True)
    layer.add("style", c, d, strength=0.5, trainable=True)
    x = torch.randn(3, 8, dtype=torch.float64)
    layer(x).sin().sum().backward()
    factors = [t.clone().requires_grad_() for t in (a, b, c, d)]
    theta = factors[0] @ factors[1] + 0.5 * (factors[2] @ factors[3])
    F.linear(x, rotate(linear.weight, theta), linear.bias).sin().sum().backward()
    got = [layer.lorad_a["student"], layer.lorad_b["student"], layer.lorad_a["style"], layer.lorad_b["style"]]
    for one, other in zip(got, factors, strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-12)


def test_an_inactive_or_frozen_adapter_gets_no_gradient():
    linear, a, b = a_layer()
    layer = live(linear, a, b)
    layer.add("frozen", a, b, trainable=False)
    layer.add("idle", a, b, trainable=True)
    set_active(layer, ["student", "frozen"])
    layer(torch.randn(3, 8, dtype=torch.float64)).sum().backward()
    assert layer.lorad_a["student"].grad is not None
    assert layer.lorad_a["frozen"].grad is None and layer.lorad_a["idle"].grad is None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.inner = nn.Sequential(nn.SiLU(), nn.Linear(6, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


def factors_for(net: Net, rank: int = 2, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {
        "first": (torch.randn(6, rank, generator=g), torch.randn(rank, 4, generator=g)),
        "inner.1": (torch.randn(4, rank, generator=g), torch.randn(rank, 3, generator=g)),
    }


def test_attach_and_detach_keep_parameters_and_modules():
    net = Net()
    parameters = {name: p for name, p in net.named_parameters()}
    modules = {name: m for name, m in net.named_modules()}
    before, x = weights(net), torch.randn(2, 8)
    bare = net(x)
    attach(net, factors_for(net), "student")
    assert isinstance(net.first, RotatedLinear) and net.first.original is modules["first"]
    assert all(net.get_parameter(name) is p for name, p in parameters.items())
    assert not torch.equal(net(x), bare)
    attach(net, factors_for(net, 3, seed=1), "fake")
    detach(net, "student")
    assert isinstance(net.first, RotatedLinear) and net.first.active == ("fake",)
    detach(net, "fake")
    detach(net, "fake")
    assert {name: m for name, m in net.named_modules()} == modules
    assert same_bits(weights(net), before) and torch.equal(net(x), bare)


def test_attaching_again_replaces_and_does_not_wrap_twice():
    net = Net()
    attach(net, factors_for(net), "student")
    layer = net.first
    attach(net, factors_for(net, 5, seed=2), "student", strength=0.5, trainable=True)
    assert net.first is layer and list(layer.strengths) == ["student"]
    assert layer.lorad_b["student"].shape == (5, 4) and layer.strengths["student"] == 0.5
    assert all(p.requires_grad for pair in factors_of(net, "student").values() for p in pair)


@pytest.mark.parametrize("wrong", ["missing", "not linear", "out", "in", "rank"])
def test_nothing_is_half_attached(wrong):
    net = Net()
    factors = factors_for(net)
    a, b = factors["inner.1"]
    match wrong:
        case "missing":
            factors["inner.7"] = factors.pop("inner.1")
        case "not linear":
            factors["inner.0"] = factors.pop("inner.1")
        case "out":
            factors["inner.1"] = (torch.zeros(5, 2), b)
        case "in":
            factors["inner.1"] = (a, torch.zeros(2, 4))
        case "rank":
            factors["inner.1"] = (a, torch.zeros(3, 3))
    before, modules = weights(net), list(net.modules())
    with pytest.raises(ValueError) as caught:
        attach(net, factors, "student")
    assert "inner" in str(caught.value) and "\n" not in str(caught.value)
    assert same_bits(weights(net), before) and list(net.modules()) == modules


def test_a_copy_is_a_network_of_its_own():
    net = Net()
    attach(net, factors_for(net), "student", trainable=True)
    twin = copy.deepcopy(net)
    x = torch.randn(2, 8)
    assert torch.equal(net(x), twin(x))
    with torch.no_grad():
        net.first.lorad_a["student"].zero_()
        net.first.weight.add_(1)
    assert not torch.equal(net(x), twin(x))
    detach(twin, "student")
    assert type(twin.first) is nn.Linear and twin.first.weight is not net.first.weight
    assert torch.allclose(twin.first.weight + 1, net.first.weight)


def test_a_state_dict_is_that_of_the_bare_network():
    """What other programs save and load is the base; the adapter has a file of its own."""
    net = Net()
    plain = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    attach(net, factors_for(net), "student")
    assert list(net.state_dict()) == list(plain)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in plain.items())
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other = Net()
    attach(other, factors_for(other), "student")
    other.load_state_dict(torch.load(buffer, weights_only=True))  # strictly
    x = torch.randn(2, 8)
    assert torch.equal(net(x), other(x))


def test_moving_the_network_moves_the_layer_under_it():
    net = Net()
    attach(net, factors_for(net), "student")
    net.double()
    detach(net, "student")
    assert type(net.first) is nn.Linear and net.first.weight.dtype == torch.float64


def test_modes_are_passed_on():
    net = Net().train()
    attach(net, factors_for(net), "student")
    assert net.first.training
    net.eval()
    detach(net, "student")
    assert not net.first.training


def test_only_the_factors_are_trainable():
    net = Net().requires_grad_(False)
    attach(net, factors_for(net), "student", trainable=True)
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"{layer}.{part}.student" for layer in ("first", "inner.1") for part in ("lorad_a", "lorad_b")}
