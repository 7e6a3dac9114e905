"""A LoRaD out of two networks: angles and weights come back in every precision and layout, and what is no rotation shows."""

from __future__ import annotations

import math

import lorad_networks as nets
import networks
import pytest
import torch

from wadi_core import LoRaD
from wadi_core.lorad import lowrank
from wadi_core.lorad.extract import extract
from wadi_core.lorad.layers import layers_of_keys, network_sha256
from wadi_core.lorad.rotation import angles, recover_angles, rotate, rotate_
from wadi_core.lorad.weights import Weights

State = dict[str, torch.Tensor]
Known = dict[str, tuple[torch.Tensor, torch.Tensor]]

SMALL_SD21 = {**nets.SMALL, "attention_head_dim": [4, 8], "use_linear_projection": True}
# One block of each network at its own width.
ONE_LEVEL = {
    "block_out_channels": (320,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
NETWORKS = {
    "sd15 small": (nets.unet, nets.SMALL, 4),
    "sd21 small": (nets.unet, SMALL_SD21, 4),
    "pixart small": (nets.pixart, nets.SMALL_PIXART, 3),
    "sd15 one level": (nets.unet, {**nets.SD15, **ONE_LEVEL}, 24),
    "sd21 one level": (nets.unet, {**nets.SD21, **ONE_LEVEL, "attention_head_dim": 5}, 24),
    "pixart one block": (nets.pixart, {**nets.PIXART, "num_layers": 1}, 24),
}
FULL = {
    "sd15": (nets.unet, nets.SD15, 256),
    "sd21": (nets.unet, nets.SD21, 256),
    "pixart": (nets.pixart, nets.PIXART, 128),
}
# Relative error of the change that storing the weights may cost.
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def rotated(network: torch.nn.Module, rank: int, rms: float = 0.1, dtype: torch.dtype = torch.float32):
    """A base, a student turned by random angles of this size, and the factors of those by path."""
    generator = torch.Generator().manual_seed(7)
    lorad = LoRaD.create(network, rank, generator=generator)
    base = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    student, known = {name: tensor.clone() for name, tensor in base.items()}, {}
    for key, path in layers_of_keys(lorad.factors, network, lorad.metadata.architecture).items():
        b = lorad.factors[key][1]
        a = torch.randn(lorad.factors[key][0].shape, generator=generator)
        a *= rms / (a @ b).square().mean().sqrt()
        known[path] = (a, b)
        rotate_(student[f"{path}.weight"], [(a, b, 1.0)])
    return base, student, known


def by_path(lorad: LoRaD, network: torch.nn.Module) -> Known:
    paths = layers_of_keys(lorad.factors, network, lorad.metadata.architecture)
    return {paths[key]: pair for key, pair in lorad.factors.items()}


def error_of_change(base: State, student: State, found: Known) -> float:
    """|merged - student| / |student - base| over all layers."""
    missed = change = 0.0
    for path, (a, b) in found.items():
        name = f"{path}.weight"
        merged = rotate_(base[name].clone(), [(a, b, 1.0)])
        missed += (merged.double() - student[name].double()).square().sum().item()
        change += (student[name].double() - base[name].double()).square().sum().item()
    return math.sqrt(missed / change)


def check_round_trip(make, settings, rank: int, dtype: torch.dtype) -> None:
    network = make(settings)
    base, student, known = rotated(network, rank, dtype=dtype)
    assert max(angles(a, b).abs().max().item() for a, b in known.values()) < 3
    lorad, report = extract(Weights.of(base), Weights.of(student))
    found = by_path(lorad, network)
    assert found.keys() == known.keys()
    assert error_of_change(base, student, found) < LIMITS[dtype]
    assert report.error < LIMITS[dtype]
    assert report.is_rotation and not report.not_rotated and report.wrapped == 0
    assert report.explained == pytest.approx(1.0, abs=1e-3)
    for path, (a, b) in found.items():
        assert a.dtype == torch.float32
        assert a.shape[1] <= max(rank + 2, 8)
        if dtype == torch.float32:
            assert a.shape[1] == min(rank, known[path][1].shape[1], a.shape[0])
            assert (angles(a, b) - angles(*known[path])).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_rotated_network_comes_back(name: str, dtype: torch.dtype) -> None:
    check_round_trip(*NETWORKS[name], dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", FULL)
def test_a_rotated_network_of_full_size_comes_back(name: str, dtype: torch.dtype) -> None:
    check_round_trip(*FULL[name], dtype)


@pytest.mark.parametrize("linear", [False, True])
def test_base_and_student_may_differ_in_layout_and_precision(linear: bool) -> None:
    settings = SMALL_SD21 if linear else nets.SMALL
    network = nets.unet(settings)
    base, student, known = rotated(network, 4)
    ldm = {f"model.diffusion_model.{networks.ldm_unet_name(name, settings)}": t for name, t in base.items()}
    lorad, report = extract(Weights.of(ldm), Weights.of(student))
    assert report.error < 1e-5
    for path, (a, b) in by_path(lorad, network).items():
        assert (angles(a, b) - angles(*known[path])).abs().max() < 1e-5
    halved, report = extract(Weights.of({name: t.half() for name, t in ldm.items()}), Weights.of(student))
    assert report.is_rotation and report.error < LIMITS[torch.float16]
    assert lorad.metadata.base_sha256 == halved.metadata.base_sha256 == network_sha256(base)


@pytest.mark.parametrize("rms", [0.02, 1e-3])
def test_small_angles_are_found_as_well_as_float32_allows(rms: float) -> None:
    network = nets.unet(nets.SMALL)
    base, student, known = rotated(network, 4, rms)
    lorad, report = extract(Weights.of(base), Weights.of(student))
    for path, (a, b) in by_path(lorad, network).items():
        assert (angles(a, b) - angles(*known[path])).abs().max() < 1e-6
    assert report.error < 1e-6 / rms


def test_what_the_lorad_says_of_itself() -> None:
    base, student, _ = rotated(nets.unet(nets.SMALL), 2)
    lorad, _ = extract(Weights.of(base), Weights.of(student))
    assert lorad.metadata.architecture == "unet-custom"
    assert (lorad.one_step.alpha_T_squared, lorad.one_step.timestep) == (0.0047, 999)
    said = {"wadi.alpha_T_squared": "0.005", "wadi.timestep": "950", "wadi.prediction_type": "v_prediction"}
    lorad, _ = extract(Weights.of(base), Weights.of(student, said))
    assert (lorad.one_step.alpha_T_squared, lorad.one_step.timestep) == (0.005, 950)
    assert lorad.one_step.prediction_type == "v_prediction"


def test_layers_that_did_not_change_are_left_out_and_others_than_the_students_are_found() -> None:
    network = nets.unet(nets.SMALL)
    base, student, known = rotated(network, 2)
    same, extra = next(iter(known)), "time_embedding.linear_2"
    student[f"{same}.weight"] = base[f"{same}.weight"]
    student[f"{extra}.weight"] = rotate(base[f"{extra}.weight"], torch.full((128, 64), 0.1))
    lorad, report = extract(Weights.of(base), Weights.of(student))
    assert by_path(lorad, network).keys() == known.keys() - {same} | {extra}
    assert set(report.unchanged) == {same, "time_embedding.linear_1"}
    assert LoRaD.matched(lorad, network).problems == ()


def test_progress_is_told() -> None:
    base, student, _ = rotated(nets.unet(nets.SMALL), 2)
    told: list[tuple[int, int]] = []
    extract(Weights.of(base), Weights.of(student), progress=lambda done, of: told.append((done, of)))
    assert told == [(done, 50) for done in range(51)]


# Ranks


def test_no_rank_is_larger_than_what_angles_can_have() -> None:
    network = nets.unet(nets.SMALL)
    base, student, _ = rotated(network, 100)
    lorad, report = extract(Weights.of(base), Weights.of(student), rank=100)
    assert report.error < 1e-5
    for layer in report.layers:
        assert layer.rank == min(100, layer.shape[0], layer.shape[1] // 2)


def test_too_small_a_rank_is_used_where_long_pairs_are() -> None:
    network = nets.unet(nets.SMALL)
    with torch.no_grad():
        for weight in network.parameters():  # some inputs matter more than others, as in trained networks
            if weight.ndim == 2:
                weight *= torch.exp(torch.randn(1, weight.shape[1]))
    base, student, known = rotated(network, 16)
    lorad, report = extract(Weights.of(base), Weights.of(student), rank=4)
    assert {layer.rank for layer in report.layers} == {4}
    assert all(layer.weighted for layer in report.layers)
    plain = {}
    for path in known:
        weights = base[f"{path}.weight"].double(), student[f"{path}.weight"].double()
        plain[path] = lowrank.decompose(recover_angles(*weights)).factors(4)
    of_svd, of_fit = error_of_change(base, student, plain), error_of_change(base, student, by_path(lorad, network))
    assert of_fit < 0.95 * of_svd
    assert report.error == pytest.approx(of_fit, rel=1e-3)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_energy_chooses_the_smallest_rank_that_keeps_it(energy: float) -> None:
    network = nets.unet(nets.SMALL)
    base, student, known = rotated(network, 8)
    lorad, _ = extract(Weights.of(base), Weights.of(student), energy=energy)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    values = torch.linalg.svdvals(angles(*known[path]).double()).square()
    rank = by_path(lorad, network)[path][0].shape[1]
    assert values[:rank].sum() >= 0.999999 * energy * values.sum()
    if energy < 1:
        assert values[: rank - 1].sum() < energy * values.sum()


# What is no rotation, and what went round


def test_a_student_that_was_trained_freely_is_told_from_a_rotated_one() -> None:
    network = nets.unet(nets.SMALL)
    base, student, known = rotated(network, 4)
    free = {name: t + 0.02 * t.std() * torch.randn_like(t) if t.ndim == 2 else t for name, t in base.items()}
    _, report = extract(Weights.of(base), Weights.of(free))
    assert not report.is_rotation
    assert len(report.not_rotated) == len(report.layers)
    # Of a change in a random direction half is a rotation of pairs: one of two dimensions.
    assert report.explained == pytest.approx(0.5, abs=0.02)
    assert report.change == pytest.approx(0.02, rel=0.05)

    one = next(iter(known))
    student[f"{one}.weight"] = 1.1 * student[f"{one}.weight"]
    _, report = extract(Weights.of(base), Weights.of(student))
    assert [layer.path for layer in report.not_rotated] == [one]
    assert report.not_rotated[0].norm_change == pytest.approx(0.1, rel=1e-3)


def test_angles_beyond_pi_are_found_and_put_back() -> None:
    network = nets.unet({**nets.SMALL, "block_out_channels": (64, 64)})
    base, student, known = rotated(network, 2, rms=0.8)
    beyond = sum(int((angles(*pair).abs() > math.pi).sum()) for pair in known.values())
    assert beyond > 100
    lorad, report = extract(Weights.of(base), Weights.of(student))
    assert report.wrapped > 0.8 * beyond
    assert report.error < 1e-5
    found, ranks = by_path(lorad, network), [layer.rank for layer in report.layers]
    assert ranks.count(2) > 0.8 * len(ranks)
    for path, (a, b) in found.items():
        if a.shape[1] == 2:
            assert (angles(a, b) - angles(*known[path])).abs().max() < 1e-4


# Refusals


def test_what_cannot_be_extracted_is_refused_in_one_line() -> None:
    base, student, known = rotated(nets.unet(nets.SMALL), 2)
    weights = Weights.of(base), Weights.of(student)
    other = nets.weights(nets.pixart(nets.SMALL_PIXART))
    wider = nets.weights(nets.unet({**nets.SMALL, "cross_attention_dim": 32}))
    deeper = nets.weights(nets.unet({**nets.SMALL, "layers_per_block": 2}))
    spoilt = {name: tensor.clone() for name, tensor in student.items()}
    spoilt[f"{next(iter(known))}.weight"][0, 0] = math.nan
    for pair, options, message in [
        ((weights[0], Weights.of(other)), {}, "different networks: unet-custom and pixart-alpha"),
        ((weights[0], Weights.of(wider)), {}, "different networks: .* in one, .* in the other"),
        ((weights[0], Weights.of(deeper)), {}, "only one of them has the layer"),
        ((weights[0], weights[0]), {}, "nothing to extract"),
        ((weights[0], Weights.of(spoilt)), {}, "NaN or Inf"),
        (weights, {"rank": 0}, "rank must be at least 1"),
        (weights, {"energy": 0.0}, "energy is a share"),
        (weights, {"energy": 1.5}, "energy is a share"),
        (weights, {"energy": 0.9, "rank": 4}, "not both"),
    ]:
        with pytest.raises(ValueError, match=message) as refused:
            extract(*pair, **options)
        assert "\n" not in str(refused.value)
