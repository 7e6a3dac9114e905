"""The one-step formula, for both kinds of prediction, and its limits."""

from __future__ import annotations

import math

import pytest
import torch

from wadi_core.lorad import Metadata
from wadi_core.lorad.metadata import schedule_strings
from wadi_core.schedule import OneStep
from wadi_core.settings import PictureSettings


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


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_network_that_sees_scaled_noise(kind):
    x0, z = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    alpha, sigma = math.sqrt(0.1378), math.sqrt(1 - 0.1378)
    noise = (sigma * z - alpha * x0) / sigma  # what makes the scaled noise the noised x0
    said = noise if kind == "epsilon" else alpha * noise - sigma * x0
    schedule = OneStep(0.1378, 625, kind, "sigma")
    assert torch.allclose(schedule.network_input(z), sigma * z, atol=1e-12)
    assert torch.allclose(schedule.x0(schedule.network_input(z), said), x0, atol=1e-9)
    assert torch.equal(OneStep(0.1378, 625, kind).network_input(z), z)


def test_files_say_what_the_network_sees():
    schedule = OneStep(0.1378, 625, input_scale="sigma")
    assert Metadata.from_strings(schedule_strings(schedule)).one_step == schedule
    strings = Metadata("sd15", 0.1378, 625, input_scale="sigma").to_strings(4, "a")
    assert strings["wadi.format"] == "2" and strings["wadi.input_scale"] == "sigma"
    assert Metadata.from_strings(strings).one_step == schedule
    usual = Metadata("sd15", 0.0047, 999).to_strings(4, "a")
    assert usual["wadi.format"] == "1" and "wadi.input_scale" not in usual
    with pytest.raises(ValueError, match="the input scale must be one of one, sigma"):
        Metadata.from_strings({**strings, "wadi.input_scale": "three"})


def test_a_picture_says_it_too():
    known = {"width": 64, "height": 64, "alpha_T_squared": 0.1378, "timestep": 625, "prediction_type": "epsilon"}
    one = PictureSettings("a cat", 1, dtype="float32", input_scale="sigma", **known)
    assert PictureSettings.from_json(one.to_json()) == one and "Input scale: sigma" in one.to_infotext("wadi")
    usual = PictureSettings("a cat", 1, dtype="float32", **known)
    assert "input_scale" not in usual.to_json() and PictureSettings.from_json(usual.to_json()) == usual
    with pytest.raises(ValueError, match="input_scale must be known"):
        PictureSettings("a cat", 1, dtype="float32", input_scale=None, **known)


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
        {"input_scale": "two"},
    ],
)
def test_values_outside_their_range_are_refused(values):
    with pytest.raises(ValueError) as caught:
        OneStep(**values)
    assert "\n" not in str(caught.value)
