"""The rotation as training computes it: the same numbers as the plain formula, compiled or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from wadi_core.lorad import kernels
from wadi_core.lorad.linear import turned
from wadi_core.lorad.rotation import angles, rotate

SHAPES = ((6, 8, 3), (5, 2, 1), (1, 64, 4), (40, 32, 7))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    kernels.choose()


@pytest.fixture(scope="module")
def compiler() -> None:
    why_not = kernels.choose(compiled=True)
    if why_not:
        pytest.skip(f"no compiler that torch can use: {why_not}")


def a_case(out: int, inputs: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(out, inputs).to(dtype)
    return weight, torch.randn(out, rank) * 0.4, torch.randn(rank, inputs // 2) * 0.4


def bits_apart(one: Tensor, other: Tensor) -> int:
    """By how many steps of bfloat16 the furthest two numbers differ."""
    ordered = [torch.where(x < 0, -32768 - x, x) for x in (t.view(torch.int16).int() for t in (one, other))]
    return int((ordered[0] - ordered[1]).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_words_turn_like_pairs(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight, a, b = a_case(*shape, dtype)
    words = kernels._words(weight)
    assert words is not None and words.data_ptr() == weight.data_ptr()
    found = kernels._turn[dtype](words, angles(a, b)).view(torch.bfloat16)
    expected = rotate(weight.float(), angles(a, b)).bfloat16()
    assert found.shape == weight.shape and bits_apart(found, expected) <= 1
    assert (found != expected).float().mean() < 0.02


@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, -1.0, 1e-40, 3.3e38, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 2.0**-133])
def test_numbers_are_rounded_as_everywhere(number: float) -> None:
    exact = torch.tensor([number, number * 1.00391, number * 0.99609])
    rounded = ((kernels._nearest(exact) >> 16) & 0xFFFF).to(torch.int32)
    assert torch.equal(rounded, exact.bfloat16().view(torch.int16).int() & 0xFFFF)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_blocks_are_those_of_the_formula(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", 3 * shape[1])  # three rows at a time
    grad, a, b = a_case(*shape, dtype)
    rotated = torch.randn(grad.shape).to(dtype)
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = a.to(factor), b.to(factor)
    grad_a, grad_b = kernels.factor_gradients(grad, rotated, a, b)
    g, r = (x.double().unflatten(1, (-1, 2)) for x in (grad, rotated))
    theta = g[..., 1] * r[..., 0] - g[..., 0] * r[..., 1]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert grad_a.dtype == grad_b.dtype == factor
    assert torch.allclose(grad_a.double(), theta @ b.double().T, atol=tolerance * (1 + theta.norm()))
    assert torch.allclose(grad_b.double(), a.double().T @ theta, atol=tolerance * (1 + theta.norm()))


def test_products_in_bfloat16_cost_three_tenths_of_a_per_cent() -> None:
    weight, a, b = a_case(64, 128, 16, torch.float32)
    exact = rotate(weight, angles(a, b))
    kernels.choose(products=torch.bfloat16)
    change = (exact - weight).norm()
    assert 1e-4 < float((turned(weight, [(a, b, 1.0)], torch.float32) - exact).norm() / change) < 5e-3
    grad, rotated = torch.randn(64, 128), torch.randn(64, 128)
    rough = kernels.factor_gradients(grad, rotated, a, b)
    kernels.choose()
    for one, other in zip(rough, kernels.factor_gradients(grad, rotated, a, b), strict=True):
        assert 1e-4 < float((one - other).norm() / other.norm()) < 6e-3


def test_odd_places_in_memory_are_read_pair_by_pair() -> None:
    weight = torch.randn(6, 10).bfloat16()
    assert kernels._words(weight[:, 2:8]) is not None
    assert kernels._words(weight[:, 1:9]) is None  # begins in the middle of a pair
    assert kernels._words(torch.randn(8, 6).bfloat16().T) is None
    assert kernels._words(torch.randn(4, 9).bfloat16()[:, :8]) is None  # every second row does


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_loops_give_the_same(dtype: torch.dtype, compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COMPILED_ELEMENTS", 20 * 32)  # two blocks
    weight, a, b = a_case(*SHAPES[-1], dtype)
    kernels.choose()
    expected = turned(weight, [(a, b, 1.0), (a, b, -0.5)], torch.bfloat16)
    grad, rotated = torch.randn(weight.shape).bfloat16(), expected
    by_formula = kernels.factor_gradients(grad, rotated, a, b)
    assert kernels.choose(compiled=True) == ""
    found = kernels.turned_words(weight, [(a, b, 1.0), (a, b, -0.5)], torch.bfloat16)
    assert found is not None and bits_apart(found, expected) <= 1
    for one, other in zip(kernels.factor_gradients(grad, rotated, a, b), by_formula, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    halves = kernels.factor_gradients(grad.half(), rotated.half(), a, b)
    assert torch.allclose(halves[0], by_formula[0], rtol=2e-2, atol=2e-2)


def test_without_a_compiler_it_is_told_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler was found\nand more lines")

    monkeypatch.setattr(kernels, "_functions", {})
    monkeypatch.setattr(torch, "compile", lambda function, **_: refuse)
    assert kernels.choose(compiled=True) == "no C++ compiler was found"
    assert not kernels.chosen.compiled
    weight, a, b = a_case(6, 8, 3, torch.bfloat16)
    assert kernels.turned_words(weight, [(a, b, 1.0)], torch.bfloat16) is None
