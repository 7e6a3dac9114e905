"""The LoRaD object on networks and on file: matching, stacking, fusing, metadata, hashes."""

from __future__ import annotations

import pytest
import torch
from lorad_networks import SMALL, SMALL_PIXART, STUDENT, pixart, random_adapter, same_bits, unet, weights
from torch import nn

from wadi_core.lorad import LoRaD, Metadata, check_together, fuse
from wadi_core.lorad.layers import fake_score_layers, network_sha256, student_layers
from wadi_core.lorad.linear import attach, factors_of, rotated_layers
from wadi_core.schedule import OneStep


@pytest.fixture
def network() -> nn.Module:
    return unet(SMALL)


# Creating


def test_a_new_adapter_turns_nothing_and_is_reproducible(network):
    one = LoRaD.create(network, 4, generator=torch.Generator().manual_seed(7))
    other = LoRaD.create(network, 4, generator=torch.Generator().manual_seed(7))
    for key, (a, b) in one.factors.items():
        assert not a.any() and torch.equal(b, other.factors[key][1])
        bound = (6 / (b.shape[0] + b.shape[1])) ** 0.5
        assert b.abs().max() <= bound and b.abs().max() > 0.3 * bound
        assert a.dtype == b.dtype == torch.float32
    before = weights(network)
    one.fuse_into(network)
    assert same_bits(weights(network), before)


def test_layers_can_be_chosen(network):
    fake = LoRaD.create(network, 2, layers=fake_score_layers(network))
    assert len(fake.factors) == len(fake_score_layers(network)) < len(student_layers(network))
    with pytest.raises(ValueError, match="no linear layer"):
        LoRaD.create(network, 2, layers=["conv_in"])


def test_a_rank_below_one_and_odd_inputs_are_refused(network):
    with pytest.raises(ValueError, match="rank"):
        LoRaD.create(network, 0)
    odd = unet({**SMALL, "cross_attention_dim": 25})
    with pytest.raises(ValueError, match="25 inputs do not make pairs"):
        LoRaD.create(odd, 2)


def test_factors_that_do_not_belong_together_are_refused():
    for a, b in [((4, 2), (3, 5)), ((4,), (4, 5)), ((0, 2), (2, 5)), ((4, 0), (0, 5))]:
        with pytest.raises(ValueError, match="do not multiply"):
            LoRaD({"lora_unet_x": (torch.zeros(a), torch.zeros(b))})
    with pytest.raises(ValueError, match="at least one layer"):
        LoRaD({})
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        LoRaD({"lora_unet_x": (torch.zeros(4, 2, dtype=torch.int32), torch.zeros(2, 2))})


# Matching


def test_a_match_reports_what_it_found(network):
    lorad = random_adapter(network, 3)
    match = lorad.matched(network)
    match.check()
    count = len(student_layers(network))
    assert str(match) == f"{count} of {count} layers, rank 3, unet-custom"
    assert set(match.paths.values()) == set(student_layers(network))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert lorad.matched(shapes) == match


def test_several_ranks_in_one_adapter(network):
    lorad = random_adapter(network, 4)
    key = next(iter(lorad.factors))
    a, b = lorad.factors[key]
    lorad.factors[key] = (torch.cat([a, a], 1), torch.cat([b, b], 0))
    assert lorad.rank == 8
    lorad.fuse_into(network)


def wrong_name(network: nn.Module) -> tuple[LoRaD, str]:
    return LoRaD(random_adapter(network).factors, Metadata("sd15")), "made for sd15, this is unet-custom"


def wrong_shape(network: nn.Module) -> tuple[LoRaD, str]:
    return random_adapter(unet({**SMALL, "cross_attention_dim": 32})), r"has a weight of shape \(32, 24\), it needs \(32, 32\)"


def unknown_layer(network: nn.Module) -> tuple[LoRaD, str]:
    factors = random_adapter(network).factors
    return LoRaD({**factors, "lora_unet_more": next(iter(factors.values()))}), "no layer for lora_unet_more"


def none_at_all(network: nn.Module) -> tuple[LoRaD, str]:
    factors = {f"lora_te_{i}": pair for i, pair in enumerate(random_adapter(network).factors.values())}
    return LoRaD(factors), "none of its"


def other_family(network: nn.Module) -> tuple[LoRaD, str]:
    return random_adapter(pixart(SMALL_PIXART)), "made for pixart-alpha, this is unet-custom"


@pytest.mark.parametrize("case", [wrong_name, wrong_shape, unknown_layer, none_at_all, other_family])
@pytest.mark.parametrize("how", ["live", "fused", "stacked"])
def test_an_adapter_that_does_not_fit_changes_nothing(network, case, how):
    lorad, said = case(network)
    before, modules = weights(network), list(network.modules())
    assert lorad.matched(network).problems
    with pytest.raises(ValueError, match=said) as caught:
        match how:
            case "live":
                lorad.apply_to(network)
            case "fused":
                lorad.fuse_into(network)
            case "stacked":
                fuse(network, [(random_adapter(network), 1.0), (lorad, 1.0)])
    assert "\n" not in str(caught.value)
    assert same_bits(weights(network), before) and list(network.modules()) == modules


def test_another_base_is_a_note_and_no_error(network):
    checksum = network_sha256(network)
    lorad = random_adapter(network, metadata=Metadata("unet-custom", base_sha256=checksum))
    assert lorad.matched(network).notes == ()
    with torch.no_grad():
        network.get_submodule(student_layers(network)[0]).weight.mul_(1.5)
    match = lorad.matched(network)
    match.check()
    assert len(match.notes) == 1 and "another base" in match.notes[0]
    lorad.apply_to(network)


def test_pixart(tmp_path):
    network = pixart(SMALL_PIXART)
    lorad = random_adapter(network, metadata=Metadata("pixart-alpha", 0.0047, 999))
    assert all(key.startswith("transformer.") for key in lorad.factors)
    lorad.save(tmp_path / "p.safetensors", torch.float32)
    loaded = LoRaD.load(tmp_path / "p.safetensors")
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "timestep": torch.tensor([999]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    with torch.no_grad():
        loaded.apply_to(network)
        live = network(**inputs).sample
        loaded.remove(network)
        fused = loaded.fuse_into(network)
        assert (network(**inputs).sample - live).abs().max() < 1e-5
        fused.restore()
        assert (network(**inputs).sample - live).abs().max() > 1e-3


# On a network


def test_a_trainer_s_adapter_comes_back_as_an_object(network):
    lorad = random_adapter(network, 3)
    match = lorad.matched(network)
    attach(network, {path: lorad.factors[key] for key, path in match.paths.items()}, "student", trainable=True)
    collected = LoRaD.from_module(network, "student", STUDENT)
    assert collected.metadata == STUDENT
    for key, (a, b) in lorad.factors.items():
        assert torch.equal(collected.factors[key][0], a) and torch.equal(collected.factors[key][1], b)
    with torch.no_grad():
        for a, _ in factors_of(network, "student").values():
            a.zero_()
    assert collected.factors[key][0].any() and not collected.factors[key][0].requires_grad
    with pytest.raises(ValueError, match="no adapter named 'fake'"):
        LoRaD.from_module(network, "fake")


def test_several_live_adapters_are_the_fused_stack(network):
    one, other = random_adapter(network, seed=1), random_adapter(network, 3, seed=2)
    one.apply_to(network, 0.7, name="one")
    other.apply_to(network, -0.4, name="other")
    turned = {path: layer.rotated_weight() for path, layer in rotated_layers(network)}
    one.remove(network, "one")
    other.remove(network, "other")
    fused = fuse(network, [(one, 0.7), (other, -0.4)])
    for path, weight in turned.items():
        assert (network.get_submodule(path).weight - weight).abs().max() < 1e-6
    fused.restore()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fusing_into_half_precision_restores_the_bits(network, dtype):
    network = network.to(dtype)
    before = weights(network)
    fused = random_adapter(network).fuse_into(network)
    after = weights(network)
    assert all(after[name].dtype == dtype for name in after) and not same_bits(before, after)
    fused.restore()
    assert same_bits(weights(network), before)


def test_without_a_backup_there_is_no_way_back_and_it_says_so(network):
    fused = random_adapter(network).fuse_into(network, keep_backup=False)
    with pytest.raises(ValueError, match="no backup"):
        fused.restore()


def test_an_interrupted_fusing_leaves_the_base(network, monkeypatch):
    from wadi_core.lorad import adapter

    lorad, before, calls = random_adapter(network), weights(network), []

    def interrupted(weight: torch.Tensor, factors: list) -> None:
        weight.zero_()
        calls.append(weight)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(adapter, "rotate_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorad.fuse_into(network)
    assert same_bits(weights(network), before)


def test_adapters_that_need_different_sampling_are_refused_together(network):
    def student(**values: object) -> LoRaD:
        return random_adapter(network, metadata=Metadata(**{"alpha_T_squared": 0.0047, "timestep": 999, **values}))

    style = random_adapter(network)
    velocity_style = random_adapter(network, metadata=Metadata(prediction_type="v_prediction"))
    assert check_together([]) is None and check_together([style, style]) is None
    assert check_together([student(), style, student()]) == OneStep()
    for other in (
        student(alpha_T_squared=0.005),
        student(timestep=979),
        student(prediction_type="v_prediction"),
        velocity_style,
    ):
        with pytest.raises(ValueError, match="cannot be used together") as caught:
            check_together([student(), style, other])
        assert "\n" not in str(caught.value)
        before = weights(network)
        with pytest.raises(ValueError, match="cannot be used together"):
            fuse(network, [(student(), 1.0), (other, 1.0)])
        assert same_bits(weights(network), before)
        fuse(network, [(student(), 1.0), (other, 0.0)]).restore()
