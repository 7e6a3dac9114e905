"""The analysis returns known amounts of norm and direction change, swaps them, and draws its picture."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import lorad_networks as nets
import networks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wadi_core.lorad.adapter import fuse
from wadi_core.lorad.analysis import RANK_SHARE, analyze, compare_layer, energy_at, swapped
from wadi_core.lorad.chart import plot
from wadi_core.lorad.layers import student_layers
from wadi_core.lorad.weights import Weights, write_stream

State = dict[str, torch.Tensor]


def teacher_and_rotated(seed: int = 3) -> tuple[State, State]:
    network = nets.unet(nets.SMALL)
    teacher = nets.weights(network)
    fuse(network, [(networks.random_lorad(network, seed=seed), 1.0)], keep_backup=False)
    return teacher, nets.weights(network)


def perturbed(weight: torch.Tensor, norm: float, angle: float) -> torch.Tensor:
    """Rows longer or shorter by the share ``norm``, turned by ``angle`` towards random directions at right angles."""
    weight = weight.double()
    lengths = weight.norm(dim=1, keepdim=True)
    directions = weight / lengths
    aside = torch.randn_like(directions)
    aside -= (aside * directions).sum(1, keepdim=True) * directions
    aside /= aside.norm(dim=1, keepdim=True)
    signs = torch.where(torch.arange(len(weight)) % 2 == 0, 1.0, -1.0)[:, None]
    return lengths * (1 + norm * signs) * (math.cos(angle) * directions + math.sin(angle) * aside)


def linear_layers(state: State) -> list[str]:
    return student_layers({name: tuple(tensor.shape) for name, tensor in state.items()})


@pytest.mark.parametrize(("norm", "angle"), [(0.001, 0.022), (0.02, 0.01), (0.3, 0.5), (0.0, 0.1), (0.05, 0.0)])
def test_known_changes_of_norm_and_direction_are_measured(norm: float, angle: float) -> None:
    teacher = nets.weights(nets.unet(nets.SMALL))
    student = dict(teacher)
    for path in linear_layers(teacher):
        student[f"{path}.weight"] = perturbed(teacher[f"{path}.weight"], norm, angle).float()
    found = analyze(Weights.of(teacher), Weights.of(student))
    assert len(found.layers) == 48
    for layer in found.layers:
        assert layer.norm == pytest.approx(100 * norm, rel=0.01, abs=1e-5)
        assert layer.direction == pytest.approx(100 * 2 * math.sin(angle / 2), rel=0.01, abs=1e-4)
    assert found.norm.mean == pytest.approx(100 * norm, rel=0.01, abs=1e-5)
    assert found.norm.std < 0.01 * found.norm.mean + 1e-5


def test_a_rotated_network_has_kept_its_norms() -> None:
    teacher, student = teacher_and_rotated()
    settings = nets.SMALL
    ldm = {f"model.diffusion_model.{networks.ldm_unet_name(name, settings)}": t for name, t in teacher.items()}
    found = analyze(Weights.of(ldm), Weights.of(student))
    assert found.norm.mean < 1e-5
    assert found.direction.mean > 1
    assert found.norm.std < 1e-5 < found.direction.std
    assert 0.3 < found.energy.mean <= 1.0


def test_the_same_network_has_not_changed() -> None:
    teacher = Weights.of(nets.weights(nets.unet(nets.SMALL)))
    told: list[tuple[int, int]] = []
    found = analyze(teacher, teacher, lambda done, of: told.append((done, of)))
    assert (found.norm.mean, found.direction.mean, found.energy) == (0.0, 0.0, None)
    assert told == [(done, 48) for done in range(49)]


def test_totals_are_over_layers_and_records_are_plain() -> None:
    teacher, student = teacher_and_rotated()
    found = analyze(Weights.of(teacher), Weights.of(student))
    directions = torch.tensor([layer.direction for layer in found.layers], dtype=torch.float64)
    assert found.direction.mean == pytest.approx(directions.mean().item())
    assert found.direction.std == pytest.approx(directions.std(correction=0).item())
    record = json.loads(json.dumps(asdict(found)))
    assert record["layers"][0].keys() == {"path", "shape", "norm", "direction", "energy"}


def test_rows_of_zeros_have_no_direction() -> None:
    teacher = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    student = torch.tensor([[1.0, 0.0], [6.0, 8.0]])
    found = compare_layer("one", teacher, student)
    assert (found.norm, found.direction, found.energy) == (100.0, 0.0, None)
    nothing = compare_layer("one", torch.zeros(2, 2), student)
    assert (nothing.norm, nothing.direction, nothing.energy) == (0.0, 0.0, None)
    with pytest.raises(ValueError, match="NaN or Inf"):
        compare_layer("one", teacher, student * math.nan)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**31))
def test_energy_is_that_of_the_singular_values(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = torch.linalg.svdvals(matrix).square()
    kept = values[: math.ceil(RANK_SHARE * min(rows, columns))].sum() / values.sum()
    assert energy_at(matrix, RANK_SHARE) == pytest.approx(kept.item())
    assert energy_at(matrix, 1.0) == pytest.approx(1.0)


# The swap experiment


def test_swapped_networks_have_the_norms_of_one_and_the_directions_of_the_other(tmp_path: Path) -> None:
    teacher = nets.weights(nets.unet(nets.SMALL))
    student = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in teacher.items()}
    both = Weights.of(teacher), Weights.of(student)
    for keep, unlike in (("directions", both[0]), ("norms", both[1])):
        path = tmp_path / f"{keep}.safetensors"
        write_stream(path, swapped(*both, keep))
        made = Weights.open(path)
        assert set(made.names) == set(student)
        norms, directions = analyze(unlike, made).norm, analyze(both[1] if keep == "directions" else both[0], made).direction
        assert norms.mean < 1e-4 and directions.mean < 1e-4
        assert torch.equal(made.tensor("conv_in.weight"), student["conv_in.weight"])


def test_a_rotated_network_with_its_teachers_norms_is_itself() -> None:
    teacher, student = teacher_and_rotated()
    for name, _, _, make in swapped(Weights.of(teacher), Weights.of(student), "directions"):
        assert torch.allclose(make(), student[name], rtol=1e-5, atol=1e-8)


def test_swapping_works_across_layouts_and_keeps_types() -> None:
    teacher, student = teacher_and_rotated()
    ldm = {f"model.diffusion_model.{networks.ldm_unet_name(name, nets.SMALL)}": t.half() for name, t in student.items()}
    made = {name: make() for name, _, _, make in swapped(Weights.of(teacher), Weights.of(ldm), "norms")}
    assert made.keys() == ldm.keys()
    assert {tensor.dtype for tensor in made.values()} == {torch.float16}
    assert analyze(Weights.of(teacher), Weights.of(made)).direction.mean < 0.1


def test_what_cannot_be_compared_is_refused() -> None:
    teacher = Weights.of(nets.weights(nets.unet(nets.SMALL)))
    other = Weights.of(nets.weights(nets.pixart(nets.SMALL_PIXART)))
    with pytest.raises(ValueError, match="different networks"):
        analyze(teacher, other)
    with pytest.raises(ValueError, match="different networks"):
        list(swapped(teacher, other, "norms"))
    with pytest.raises(ValueError, match="either the directions or the norms"):
        list(swapped(teacher, teacher, "both"))


# The picture


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    teacher, student = teacher_and_rotated()
    path = plot(analyze(Weights.of(teacher), Weights.of(student)), tmp_path / "change.png", "A title")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width >= 1200
    same = Weights.of(teacher)
    plot(analyze(same, same), tmp_path / "nothing.png")
    with pytest.raises(OSError, match="folder does not exist"):
        plot(analyze(same, same), tmp_path / "missing" / "change.png")
