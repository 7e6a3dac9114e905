"""The mathematics of rotation: norms, inverse, sums, recovery, precision, and what OFT says of the same thing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wadi_core.lorad.rotation import angles, recover_angles, rotate, rotate_

sizes = st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(1, 6))  # out, in/2, rank
seeds = st.integers(0, 2**31)
HALVES = [torch.float16, torch.bfloat16]


def a_layer(size: tuple[int, int, int], seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows, pairs, rank = size
    weight = torch.randn(rows, 2 * pairs, generator=generator).to(dtype)
    theta_a = torch.randn(rows, rank, generator=generator) * scale / math.sqrt(rank)
    theta_b = torch.randn(rank, pairs, generator=generator)
    return weight, theta_a, theta_b


def as_complex(weight: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(weight.double().unflatten(1, (-1, 2)).contiguous())


@given(sizes, seeds)
def test_a_rotation_is_a_product_with_a_complex_number_of_length_one(size, seed):
    weight, a, b = a_layer(size, seed)
    theta = angles(a, b)
    expected = as_complex(weight) * torch.polar(torch.ones_like(theta), theta).to(torch.complex128)
    assert (as_complex(rotate(weight, theta)) - expected).abs().max() < 2e-6


@given(sizes, seeds)
def test_norms_of_rows_and_pairs_are_kept(size, seed):
    weight, a, b = a_layer(size, seed)
    turned = rotate(weight, angles(a, b))
    before, after = weight.double().norm(dim=1), turned.double().norm(dim=1)
    assert ((after - before).abs() / before).max() < 1e-6
    assert torch.allclose(as_complex(turned).abs(), as_complex(weight).abs(), rtol=1e-6, atol=1e-7)


@given(sizes, seeds)
def test_the_negative_angle_is_the_inverse(size, seed):
    weight, a, b = a_layer(size, seed)
    back = rotate(rotate(weight, angles(a, b)), angles(a, b, -1.0))
    assert (back - weight).abs().max() < 1e-6 * max(1.0, weight.abs().max().item())


@given(sizes, seeds, st.floats(-2, 2), st.floats(-2, 2))
def test_angles_of_several_add_whatever_the_order(size, seed, first, second):
    weight, a, b = a_layer(size, seed)
    _, c, d = a_layer(size, seed + 1)
    one = rotate_(weight.clone(), [(a, b, first), (c, d, second)])
    other = rotate_(weight.clone(), [(c, d, second), (a, b, first)])
    in_turn = rotate_(rotate_(weight.clone(), [(a, b, first)]), [(c, d, second)])
    assert torch.allclose(one, other, atol=2e-6)
    assert torch.allclose(one, in_turn, atol=4e-6)


@given(sizes, seeds)
def test_strength_scales_the_angle(size, seed):
    weight, a, b = a_layer(size, seed)
    assert torch.allclose(angles(a, b, 0.5), angles(a, b) * 0.5)
    half_twice = rotate_(rotate_(weight.clone(), [(a, b, 0.5)]), [(a, b, 0.5)])
    assert torch.allclose(half_twice, rotate(weight, angles(a, b)), atol=4e-6)


@given(sizes, seeds, st.sampled_from([torch.float32, *HALVES, torch.float64]))
def test_strength_zero_leaves_the_very_bits(size, seed, dtype):
    weight, a, b = a_layer(size, seed, dtype=dtype)
    untouched = weight.clone()
    assert torch.equal(rotate_(weight, [(a, b, 0.0)]), untouched)
    assert torch.equal(rotate_(weight, []), untouched)
    assert torch.equal(rotate(weight, torch.zeros(size[0], size[1])), untouched)


@given(sizes, seeds, st.integers(1, 50))
def test_blocks_of_rows_change_nothing(size, seed, block_rows):
    weight, a, b = a_layer(size, seed)
    whole = rotate(weight, angles(a, b))
    in_place = weight.clone()
    assert rotate_(in_place, [(a, b, 1.0)], block_rows=block_rows) is in_place
    assert torch.allclose(in_place, whole, atol=1e-6)


@given(sizes, seeds)
def test_a_view_is_turned_in_place_and_the_rest_is_left(size, seed):
    weight, a, b = a_layer(size, seed)
    stacked = torch.cat([weight, weight, weight])
    rows = size[0]
    rotate_(stacked.narrow(0, rows, rows), [(a, b, 1.0)])
    assert torch.equal(stacked[:rows], weight) and torch.equal(stacked[2 * rows :], weight)
    assert torch.allclose(stacked[rows : 2 * rows], rotate(weight, angles(a, b)), atol=1e-6)


@given(sizes, seeds, st.sampled_from([torch.float32, *HALVES, torch.float64]))
def test_in_place_is_the_same_as_out_of_place_wherever_the_weight_lies(size, seed, dtype):
    weight, a, b = a_layer(size, seed, dtype=dtype)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    expected = rotate(weight, angles(a.to(precise), b.to(precise), dtype=precise))
    buffer = torch.zeros(weight.numel() + 1, dtype=dtype)
    at_an_odd_place = buffer[1:].view(weight.shape).copy_(weight)
    transposed = weight.T.contiguous().T
    for place in (weight.clone(), at_an_odd_place, transposed):
        assert torch.allclose(rotate_(place, [(a, b, 1.0)]), expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-6)


def test_a_rotation_is_one_graph_for_the_compiler():
    weight, a, b = a_layer((6, 5, 2), 0)
    compiled = torch.compile(lambda w, a, b: rotate(w, angles(a, b)), backend="eager", fullgraph=True)
    assert torch.equal(compiled(weight, a, b), rotate(weight, angles(a, b)))


@given(sizes, seeds)
def test_angles_come_back_from_two_weights(size, seed):
    weight, a, b = a_layer(size, seed, scale=0.3)
    weight, a, b = weight.double(), a.double(), b.double()
    theta = angles(a, b, dtype=torch.float64)
    inside = theta.abs() < 3.1
    recovered = recover_angles(weight, rotate(weight, theta))
    assert recovered.shape == theta.shape
    assert (recovered - theta)[inside].abs().max() < 1e-8


def test_angles_of_zero_pairs_are_zero():
    base = torch.tensor([[0.0, 0.0, 3.0, 4.0]])
    turned = torch.tensor([[0.0, 0.0, -3.0, -4.0]])
    recovered = recover_angles(base, turned)
    assert recovered[0, 0] == 0
    assert recovered[0, 1].abs() == pytest.approx(math.pi)


@pytest.mark.parametrize("dtype", HALVES)
def test_angles_are_never_computed_in_half_precision(dtype):
    """Whatever the factors, the weight and an autocast around say: small angles must survive."""
    weight, a, b = a_layer((16, 8, 4), 0, scale=1e-3, dtype=dtype)
    exact = rotate(weight.double(), angles(a.to(dtype).double(), b.to(dtype).double(), dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theta = angles(a.to(dtype), b.to(dtype))
        turned = rotate_(weight.clone(), [(a.to(dtype), b.to(dtype), 1.0)])
    assert theta.dtype == torch.float32
    assert turned.dtype == dtype
    assert torch.equal(turned, exact.to(dtype)) or (turned.double() - exact).abs().max() < torch.finfo(dtype).eps * 4
    assert rotate(torch.ones(2, 4), torch.zeros(2, 2)).equal(torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_weights_are_turned_and_stored_back(dtype):
    weight, a, b = a_layer((8, 8, 2), 0, dtype=dtype)
    turned = rotate_(weight.clone(), [(a, b, 1.0)])
    assert turned.dtype == dtype
    exact = rotate(weight.float(), angles(a, b))
    assert torch.equal(turned.float(), exact.to(dtype).float())


@given(st.integers(1, 12), st.integers(1, 12), seeds)
def test_rank_one_with_ones_is_oft_with_blocks_of_two(rows, pairs, seed):
    """theta_a all ones gives each input pair one angle: OFT's block-diagonal orthogonal matrix R = (I+Q)(I-Q)^-1,
    Q = [[0, -q], [q, 0]] the Cayley parameter with q = tan(theta/2). Qiu et al., "Controlling Text-to-Image
    Diffusion by Orthogonal Finetuning" (2023)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 2 * pairs, generator=generator, dtype=torch.float64)
    theta = torch.randn(1, pairs, generator=generator, dtype=torch.float64).clamp(-3, 3)
    blocks = []
    for q in (theta[0] / 2).tan():
        skew = torch.tensor([[0.0, -q], [q, 0.0]], dtype=torch.float64)
        identity = torch.eye(2, dtype=torch.float64)
        blocks.append((identity + skew) @ torch.linalg.inv(identity - skew))
    oft = weight @ torch.block_diag(*blocks).T
    lorad = rotate(weight, angles(torch.ones(rows, 1).double(), theta, dtype=torch.float64))
    assert torch.allclose(lorad, oft, atol=1e-10)
