"""The one-step formula, for both kinds of prediction, and its limits."""

from __future__ import annotations

import math

import pytest
import torch

from wadi_core.schedule import OneStep


def test_the_numbers_of_the_released_weights():
    schedule = OneStep()
    assert (schedule.alpha_T_squared, schedule.timestep, schedule.prediction_type) == (0.0047, 999, "epsilon")
    assert schedule.alpha_T**2 + schedule.sigma_T**2 == pytest.approx(1.0, abs=1e-15)
    assert schedule.sigma == pytest.approx(14.5521805, abs=1e-7)


@pytest.mark.parametrize("alpha_T_squared", [0.0047, 0.0046601, 4.04e-5, 0.5])
def test_the_true_noise_gives_the_true_latent_back(alpha_T_squared):
    x0, noise = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    alpha, sigma = math.sqrt(alpha_T_squared), math.sqrt(1 - alpha_T_squared)
    z = alpha * x0 + sigma * noise
    epsilon = OneStep(alpha_T_squared).x0(z, noise)
    velocity = OneStep(alpha_T_squared, prediction_type="v_prediction").x0(z, alpha * noise - sigma * x0)
    assert torch.allclose(epsilon, x0, atol=1e-9) and torch.allclose(velocity, x0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_type_is_that_of_the_noise_and_the_arithmetic_is_not(dtype):
    z, prediction = torch.randn(1, 4, 8, 8).to(dtype), torch.randn(1, 4, 8, 8).to(dtype)
    exact = OneStep().x0(z.double(), prediction.double())
    got = OneStep().x0(z, prediction)
    assert got.dtype == dtype
    assert torch.allclose(got, exact.to(dtype), rtol=2e-6 if dtype.itemsize > 2 else 0, atol=1e-5)


def test_a_learned_sigma_is_left_out():
    z, prediction = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8, 8)
    assert torch.equal(OneStep().x0(z, prediction), OneStep().x0(z, prediction[:, :4]))


def test_the_smallest_signal_gives_numbers():
    z, prediction = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    assert OneStep(1e-8).x0(z, prediction).isfinite().all()


@pytest.mark.parametrize(
    "values",
    [
        {"alpha_T_squared": 0.0},
        {"alpha_T_squared": 1.0},
        {"alpha_T_squared": -0.1},
        {"alpha_T_squared": math.nan},
        {"alpha_T_squared": 5e-324},
        {"alpha_T_squared": 9.9e-9},
        {"timestep": -1},
        {"timestep": 1000},
        {"prediction_type": "sample"},
    ],
)
def test_values_outside_their_range_are_refused(values):
    with pytest.raises(ValueError) as caught:
        OneStep(**values)
    assert "\n" not in str(caught.value)
