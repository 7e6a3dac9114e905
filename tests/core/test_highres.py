"""Pictures larger than native: which convolutions are treated, what they do then, and that nothing of it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from control_networks import random_controlnet
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from ldm_unet import LdmUNet
from lorad_networks import MINI, SD15, SD21, SMALL, pixart, same_bits, unet, weights
from lorad_networks import SMALL_PIXART as PIXART
from torch import Tensor, nn

from wadi_core import highres, settings

# Three levels, an attention only where it is cheap.
THREE: dict[str, Any] = {**SMALL, "block_out_channels": (32, 32, 64), "sample_size": 8, "layers_per_block": 1} | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
NATIVE = 8  # cells


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return unet(THREE)


@pytest.fixture(scope="module")
def controlnet(network: nn.Module) -> nn.Module:
    return random_controlnet(network)


def latent(height: int, width: int, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(3))


def text(width: int = 24) -> Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def run(network: nn.Module, z: Tensor, **more: Any) -> Tensor:
    return network(z, torch.tensor(999), encoder_hidden_states=text(), **more).sample


@torch.no_grad()
def run_ldm(network: nn.Module, z: Tensor, **more: Any) -> Tensor:
    return network(z, torch.tensor(999), context=text(), **more)


def fingerprint(network: nn.Module) -> list[Any]:
    """All that a module has besides its parameters, hooks and attributes included."""
    return [
        (path, {key: repr(value) for key, value in vars(module).items() if key not in ("_parameters", "_modules")})
        for path, module in network.named_modules()
    ]


# --- which convolutions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SD15, SD21, MINI])
def test_the_layers_of_known_networks(config: dict[str, Any]) -> None:
    found = highres.layers(unet(config, "meta"))
    levels = len(config.get("block_out_channels", (320, 640, 1280, 1280)))
    per_level = config.get("layers_per_block", 2)
    assert sum(layer.role == "down" for layer in found) == sum(layer.role == "up" for layer in found) == levels - 1
    blocks = [layer for layer in found if layer.role == "block"]
    # Two convolutions a residual block; one block more on the way out than on the way in, and two in the middle.
    assert len(blocks) == 2 * (levels * (2 * per_level + 1) + 2)
    assert {layer.level for layer in found} == set(range(levels))
    assert all(layer.conv.kernel_size == (3, 3) for layer in found)
    outermost = {layer.path.rpartition(".resnets")[0] for layer in blocks if layer.level == 0}
    assert outermost == {"down_blocks.0", f"up_blocks.{levels - 1}"}
    deepest = {layer.path.split(".resnets")[0] for layer in blocks if layer.level == levels - 1}
    assert deepest == {f"down_blocks.{levels - 1}", "mid_block", "up_blocks.0"}
    assert [layer.level for layer in found if layer.role == "up"] == list(range(levels - 1, 0, -1))
    assert [layer.level for layer in found if layer.role == "down"] == list(range(levels - 1))


def test_ldm_structure_gives_the_same_layers(network: nn.Module) -> None:
    ldm = LdmUNet(network)
    theirs, ours = highres.layers(ldm), highres.layers(network)
    assert [(one.level, one.role) for one in theirs] == [(one.level, one.role) for one in ours]
    for one, other in zip(theirs, ours, strict=True):
        assert torch.equal(one.conv.weight, other.conv.weight)
    assert "input_blocks.0.0" not in {one.path for one in theirs}


def test_a_controlnet_is_half_a_unet(network: nn.Module, controlnet: nn.Module) -> None:
    whole = {layer.path: (layer.level, layer.role) for layer in highres.layers(network)}
    half = {layer.path: (layer.level, layer.role) for layer in highres.layers(controlnet)}
    assert half == {path: at for path, at in whole.items() if not path.startswith("up_blocks")}


def test_other_networks_are_refused() -> None:
    for other in (pixart(PIXART, "meta"), nn.Sequential(nn.Conv2d(4, 4, 3))):
        with pytest.raises(ValueError, match="Stable Diffusion 1 and 2 only") as error:
            highres.attach(other, (2.0, 2.0))
        assert "\n" not in str(error.value)


# --- factors ---------------------------------------------------------------------------------------------------------


def test_factors() -> None:
    native = (512, 512)
    assert highres.factors(512, 512, native) == highres.factors(520, 512, native) == (1.0, 1.0)
    assert highres.factors(1024, 1024, native) == (2.0, 2.0)
    assert highres.factors(1024, 1792, native, "stretch") == (3.5, 2.0)
    assert highres.factors(1024, 1792, native) == pytest.approx((7**0.5, 7**0.5))
    assert highres.factors(256, 1024, native, "stretch") == (2.0, 1.0)
    assert highres.factors(256, 384, (128, 192)) == (2.0, 2.0)
    with pytest.raises(ValueError, match="8192x512 is too large for this network: enlarging goes up to 2048x2048"):
        highres.factors(8192, 512, native)
    with pytest.raises(ValueError, match="proportions must be one of keep, stretch, not fill"):
        highres.factors(512, 512, native, "fill")


def test_the_settings_know_the_methods() -> None:
    assert settings.HIRES == highres.METHODS


def test_dilations_grow_inwards() -> None:
    assert [highres.dilation(2.0, level) for level in range(4)] == [1, 2, 2, 2]
    assert [highres.dilation(4.0, level) for level in range(4)] == [1, 2, 3, 4]
    assert [highres.dilation(2.5, level) for level in range(4)] == [1, 2, 2.5, 2.5]
    assert [highres.dilation(3.0, level, first_level=2) for level in range(4)] == [1, 1, 2, 3]
    assert [highres.dilation(1.0, level) for level in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((2.0, 2.0), "widen"), "one of redilate, shrink, not widen"),
        (((0.5, 2.0),), "factors from 1 to 4, not 0.5 and 2"),
        (((2.0, float("nan")),), "factors from 1 to 4"),
        (((2.0, 2.0), "shrink", 3), "levels of this network that can be enlarged are 1 to 2, not 3"),
    ],
)
def test_bad_arguments_change_nothing(network: nn.Module, arguments: tuple[Any, ...], says: str) -> None:
    before = fingerprint(network)
    with pytest.raises(ValueError, match=says):
        highres.attach(network, *arguments)
    assert fingerprint(network) == before


# --- on and off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", highres.METHODS)
@pytest.mark.parametrize("factors", [(2.0, 2.0), (2.0, 3.5), (1.0, 2.0), (1.7, 1.3)])
def test_switched_off_nothing_has_changed(network: nn.Module, method: str, factors: tuple[float, float]) -> None:
    z = latent(16, 28)
    state, before, native = weights(network), fingerprint(network), run(network, z)
    with highres.attach(network, factors, method):
        enlarged = run(network, z)
        assert fingerprint(network) != before
    assert fingerprint(network) == before
    assert same_bits(weights(network), state)
    assert torch.equal(run(network, z), native)
    assert enlarged.shape == native.shape and torch.isfinite(enlarged).all()
    assert not torch.allclose(enlarged, native)


@pytest.mark.parametrize("method", highres.METHODS)
def test_native_size_is_left_alone(network: nn.Module, method: str) -> None:
    before = fingerprint(network)
    with highres.attach(network, highres.factors(8, 8, (8, 8)), method):
        assert fingerprint(network) == before


@pytest.mark.parametrize("method", highres.METHODS)
def test_an_error_inside_switches_off_too(network: nn.Module, method: str) -> None:
    before = fingerprint(network)
    with pytest.raises(RuntimeError), highres.attach(network, (2.0, 2.0), method):
        run(network, latent(16, 16, channels=5))
    assert fingerprint(network) == before


def test_if_one_of_several_networks_is_refused_the_others_are_left_alone(network: nn.Module) -> None:
    before = fingerprint(network)
    with pytest.raises(ValueError, match="this is none"):
        highres.attach([network, nn.Identity()], (2.0, 2.0))
    assert fingerprint(network) == before


@pytest.mark.parametrize("method", highres.METHODS)
@pytest.mark.parametrize("to_skip", [False, True])
@pytest.mark.parametrize(("size", "factors"), [((16, 16), (2.0, 2.0)), ((16, 24), (6**0.5, 6**0.5)), ((16, 28), (2.0, 3.5))])
def test_ldm_structure_computes_the_same(
    network: nn.Module, method: str, to_skip: bool, size: tuple[int, int], factors: tuple[float, float]
) -> None:
    ldm, z = LdmUNet(network, to_skip), latent(*size)
    assert torch.allclose(run_ldm(ldm, z), run(network, z), atol=1e-5)
    before = fingerprint(ldm)
    with highres.attach([network, ldm], factors, method):
        assert torch.allclose(run_ldm(ldm, z), run(network, z), atol=1e-5)
    assert fingerprint(ldm) == before


@examples(max_examples=25)
@given(
    st.integers(4, 40),
    st.integers(4, 40),
    st.floats(1, 4),
    st.floats(1, 4),
    st.sampled_from(highres.METHODS),
    st.integers(1, 2),
)
def test_any_size_and_factor_goes_through(height: int, width: int, f_h: float, f_w: float, method: str, first: int) -> None:
    small = _shared_small()
    z = latent(height, width)
    with highres.attach(small, (f_h, f_w), method, first_level=first):
        assert run(small, z).shape == z.shape


def _shared_small(made: list[nn.Module] = []) -> nn.Module:  # noqa: B006 (made once for all examples)
    if not made:
        made.append(unet({**THREE, "block_out_channels": (16, 16, 16)}))
    return made[0]


# --- what re-dilation computes -----------------------------------------------------------------------------------------


def test_a_redilated_convolution_sees_every_second_cell(network: nn.Module) -> None:
    """On the cells of one parity it is the convolution itself, as if the others were not there."""
    layer = next(layer for layer in highres.layers(network) if layer.level == 2)
    x = latent(12, 12, layer.conv.in_channels)
    alone = layer.conv(x[..., ::2, 1::2])
    with highres.attach(network, (2.0, 2.0), "redilate"):
        assert torch.allclose(layer.conv(x)[..., ::2, 1::2], alone, atol=1e-5)


def test_a_halving_convolution_still_halves(network: nn.Module) -> None:
    layer = next(layer for layer in highres.layers(network) if layer.role == "down" and layer.level == 1)
    x = latent(16, 16, layer.conv.in_channels)
    alone = layer.conv(x[..., ::2, ::2])
    with highres.attach(network, (2.0, 2.0), "redilate"):
        found = layer.conv(x)
    assert found.shape[-2:] == (8, 8)
    assert torch.allclose(found[..., ::2, ::2], alone, atol=1e-5)


def test_only_the_inner_levels_are_redilated(network: nn.Module) -> None:
    with highres.attach(network, (4.0, 1.0), "redilate"):
        dilations = {path: conv.dilation for path, conv in network.named_modules() if isinstance(conv, nn.Conv2d)}
    assert dilations["conv_in"] == dilations["conv_out"] == dilations["down_blocks.0.resnets.0.conv1"] == (1, 1)
    assert dilations["down_blocks.0.downsamplers.0.conv"] == dilations["up_blocks.2.resnets.1.conv2"] == (1, 1)
    assert dilations["down_blocks.1.resnets.0.conv1"] == dilations["up_blocks.1.upsamplers.0.conv"] == (2, 1)
    assert dilations["mid_block.resnets.1.conv2"] == (3, 1)
    assert all(dilation == (1, 1) for path, dilation in dilations.items() if "shortcut" in path or "proj" in path)


def test_a_fractional_dilation_lies_between_whole_ones(network: nn.Module) -> None:
    """On a smooth input, an edge detector's answer grows with the distance of its taps."""
    layer = next(layer for layer in highres.layers(network) if layer.level == 2 and layer.role == "block")
    kept = layer.conv.weight.clone(), layer.conv.bias.clone()
    layer.conv.weight.zero_()
    layer.conv.bias.zero_()
    layer.conv.weight[:, 0, 1, 0], layer.conv.weight[:, 0, 1, 2] = -0.5, 0.5
    x = torch.zeros(1, layer.conv.in_channels, 24, 24) + torch.arange(24.0)
    slopes = []
    for factor in (1.0, 1.5, 2.0, 2.5, 3.0):
        with highres.attach(network, (factor, factor), "redilate"):
            slopes.append(layer.conv(x)[0, 0, 8:16, 8:16].mean().item())
    layer.conv.weight.copy_(kept[0]), layer.conv.bias.copy_(kept[1])
    assert slopes == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0], rel=0.02)


def test_seamless_pictures_stay_seamless(network: nn.Module) -> None:
    """Hosts make pictures that tile by wrapping every convolution around: dilated ones have to wrap further."""
    network = copy.deepcopy(network)
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d):
            conv.padding_mode = "circular"
    z = latent(16, 16)
    with highres.attach(network, (2.0, 2.0), "redilate"):
        moved = run(network, z.roll((8, 8), (2, 3))).roll((-8, -8), (2, 3))
        assert torch.allclose(run(network, z), moved, atol=1e-4)


# --- what shrinking computes -------------------------------------------------------------------------------------------


def sizes_inside(network: nn.Module, act: Callable[[], Any]) -> dict[str, tuple[int, int]]:
    """The size of what each convolution is given."""
    seen: dict[str, tuple[int, int]] = {}
    hooks = [
        layer.conv.register_forward_pre_hook(lambda _, args, path=layer.path: seen.update({path: tuple(args[0].shape[-2:])}))
        for layer in highres.layers(network)
    ]
    act()
    for hook in hooks:
        hook.remove()
    return seen


def test_inner_levels_have_the_size_that_they_know(network: nn.Module) -> None:
    native = sizes_inside(network, lambda: run(network, latent(NATIVE, NATIVE)))
    with highres.attach(network, (2.0, 3.0), "shrink"):
        seen = sizes_inside(network, lambda: run(network, latent(2 * NATIVE, 3 * NATIVE)))
    for layer in highres.layers(network):
        whole = layer.level == 0 and layer.role == "block"
        assert seen[layer.path] == ((16, 24) if whole else native[layer.path])


def test_shrunk_sizes() -> None:
    assert highres.shrunk((128, 128), (2.0, 2.0), 3) == (64, 64)
    assert highres.shrunk((128, 224), (2.0, 3.5), 3) == (64, 64)
    assert highres.shrunk((128, 224), (7**0.5, 7**0.5), 3) == (48, 88)
    assert highres.shrunk((9, 4), (2.0, 2.0), 3) == (8, 8)
    assert highres.shrunk((33, 29), (2.0, 2.0), 1) == (16, 14)


def test_spread_puts_cells_back_where_they_were_picked() -> None:
    x = latent(8, 12)
    back = highres.spread(x, (16, 36))
    assert torch.allclose(highres.pick(back, (8, 12)), x, atol=1e-6)
    assert torch.allclose(back[..., 1, 0], (x[..., 0, 0] + x[..., 1, 0]) / 2, atol=1e-6)
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    assert torch.allclose(highres.spread(highres.pick(ramp, (16, 16)), (32, 32))[..., :30], ramp[..., :30], atol=1e-5)


def test_a_flat_noise_keeps_its_strength() -> None:
    noise = latent(64, 64)
    assert highres.pick(noise, (32, 32)).std().item() == pytest.approx(1.0, rel=0.05)


# --- with ControlNets ------------------------------------------------------------------------------------------------


@torch.no_grad()
def residuals(controlnet: nn.Module, z: Tensor) -> dict[str, Any]:
    picture = torch.rand(2, 3, 8 * z.shape[2], 8 * z.shape[3], generator=torch.Generator().manual_seed(5))
    down, mid = controlnet(
        z, torch.tensor(999), encoder_hidden_states=text(), controlnet_cond=picture, conditioning_scale=0.7, return_dict=False
    )
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


@pytest.mark.parametrize("method", highres.METHODS)
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (17, 22)])
def test_control_keeps_working(network: nn.Module, controlnet: nn.Module, method: str, size: tuple[int, int]) -> None:
    """A ControlNet that is treated along, and one that is not, as a host's may be."""
    z = latent(*size)
    without = residuals(controlnet, z)
    factors = highres.factors(size[1], size[0], (NATIVE, NATIVE))
    with highres.attach([network, controlnet], factors, method):
        along = residuals(controlnet, z)
        plain, controlled, from_outside = run(network, z), run(network, z, **along), run(network, z, **without)
    assert not torch.allclose(plain, controlled) and not torch.allclose(plain, from_outside)
    assert torch.equal(along["down_block_additional_residuals"][0], without["down_block_additional_residuals"][0])


def test_comfyuis_control_is_fitted_too(network: nn.Module, controlnet: nn.Module) -> None:
    z, ldm = latent(16, 16), LdmUNet(network)
    made = residuals(controlnet, z)

    def control() -> dict[str, Any]:
        return {
            "output": [*made["down_block_additional_residuals"]],
            "middle": [made["mid_block_additional_residual"]],
            "input": [None],
        }

    with highres.attach([network, ldm], (2.0, 2.0), "shrink"):
        assert torch.allclose(run_ldm(ldm, z, control=control()), run(network, z, **made), atol=1e-5)


def test_residuals_that_fit_are_left_alone() -> None:
    full, small = (32, 32), (16, 16)
    fitting = [torch.zeros(1, 1, side, side) for side in (32, 32, 8, 8, 4, 4)]
    assert highres.fit_residuals(fitting, full, small, 2) is fitting
    large = [torch.zeros(1, 1, side, side) for side in (32, 32, 16, 16, 8, 8)]
    found = highres.fit_residuals({"a": (*large, None), "b": large[-1]}, full, small, 2)
    assert [tensor.shape[-1] for tensor in found["a"][:-1]] == [32, 32, 8, 8, 4, 4]
    assert found["a"][-1] is None and found["b"].shape[-1] == 4
