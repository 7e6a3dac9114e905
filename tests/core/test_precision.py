"""Precision by part: which layers compute how, that it is hardly seen, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_kit import Kit, equal, weights_of
from torch import nn

from wadi_core import LoRaD, OneStepPipeline, pictures, precision
from wadi_core.lorad.linear import attach, detach
from wadi_core.precision import EXACT, NARROW, WIDE, Place

pytestmark = pytest.mark.usefixtures("no_network")

PROMPTS = ["a red apple", "a cat and a bicycle", "a frog on top of a pizza", "two owls"]


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bfloat16 in hardware, wherever the test runs: others compute the same, only slower."""
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: device.type == "cpu")


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: False)


@pytest.fixture(scope="module")
def wadi_mini() -> OneStepPipeline:
    return OneStepPipeline.from_pretrained("mini", device="cpu", control="mini", precision="exact")


def distance(one: list[Image.Image], other: list[Image.Image]) -> float:
    """Root mean square of the difference, in grey levels."""
    pairs = zip(one, other, strict=True)
    return float(np.sqrt(np.mean([(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)) ** 2 for a, b in pairs])))


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("conv_in", Place("entry")),
        ("conv_out", Place("exit")),
        ("decoder.conv_out", Place("exit")),
        ("time_embedding.linear_1", Place("time")),
        ("down_blocks.1.resnets.0.time_emb_proj", Place("time", 1)),
        ("down_blocks.0.resnets.1.conv2", Place("resnet", 0)),
        ("up_blocks.3.resnets.2.conv_shortcut", Place("shortcut", 0)),
        ("up_blocks.2.attentions.0.proj_out", Place("projection", 1)),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.2", Place("attention", 3)),
        ("down_blocks.0.downsamplers.0.conv", Place("sampler", 1)),
        ("up_blocks.2.upsamplers.0.conv", Place("sampler", 0)),
        ("controlnet_down_blocks.3", Place("other")),
    ],
)
def test_where_a_layer_is(path: str, place: Place) -> None:
    assert precision.place_of(path, 4) == place


def test_the_way_of_the_noise_is_exact_in_any_network() -> None:
    for kind in ("entry", "exit", "time", "shortcut", "projection", "other"):
        assert precision.balanced(Place(kind, 0)) == EXACT
    assert precision.balanced(Place("resnet", 0)) == WIDE
    assert {precision.balanced(Place(kind, 2)) for kind in ("resnet", "shortcut", "projection", "attention")} == {NARROW}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """How the figures of docs/speed.md were measured: kernels of more threads add up in another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("with_bfloat16")
def test_balanced_is_hardly_seen_and_exact_comes_back_to_the_bit(one_thread: None) -> None:
    pipe = OneStepPipeline.from_pretrained("mini", device="cpu")
    assert pipe.precision == "balanced"
    balanced = pipe(PROMPTS, seed=3, return_latents=True)
    pipe.set_precision("fast")
    fast = pipe(PROMPTS, seed=3, return_latents=True)
    pipe.set_precision("exact")
    exact = pipe(PROMPTS, seed=3, return_latents=True)
    fresh = OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")(PROMPTS, seed=3, return_latents=True)
    assert torch.equal(exact.latents, fresh.latents)
    # x0 by itself, through one and the same decoder
    decoded = [pipe.decode(made.latents) for made in (exact, balanced, fast)]
    assert 0.1 < distance(decoded[0], decoded[1]) < 1.6
    assert distance(decoded[0], decoded[1]) < 0.6 * distance(decoded[0], decoded[2]) < 6
    assert distance(exact.images, balanced.images) < 2
    assert [made.settings[0].precision for made in (exact, balanced, fast)] == ["exact", "balanced", "fast"]


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_where_bfloat16_is_slow_everything_is_exact(sd15: Kit, name: str) -> None:
    exact = sd15.load()(PROMPTS[0])
    made = sd15.load(precision=name)(PROMPTS[0])
    assert made.images[0].tobytes() == exact.images[0].tobytes()
    assert made.settings == exact.settings and made.settings[0].precision == "exact"


@pytest.mark.usefixtures("with_bfloat16")
@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_parameters_are_what_they_were_and_adapters_are_changed_as_ever(sd15: Kit, name: str) -> None:
    pipe = sd15.load(precision=name)
    assert equal(weights_of(pipe.unet), weights_of(sd15.load().unet))
    pipe(PROMPTS[0])
    pipe.set_lorad(sd15.lorad, strength=0.5)
    changed = pipe(PROMPTS[0], return_latents=True).latents
    assert torch.equal(changed, sd15.load(precision=name, strength=0.5)(PROMPTS[0], return_latents=True).latents)
    assert not torch.equal(changed, sd15.load(precision=name)(PROMPTS[0], return_latents=True).latents)
    pipe.set_lorad(None)
    assert equal(weights_of(pipe.unet), weights_of(sd15.load(lorad=[]).unet))


@pytest.mark.usefixtures("with_bfloat16")
def test_a_live_adapter_before_and_after_the_precision_is_chosen(sd15: Kit) -> None:
    fused = sd15.load(precision="balanced")(PROMPTS[0], return_latents=True).latents
    pipe = sd15.load(lorad=[], alpha_T_squared=0.0047, precision="balanced")
    bare = pipe(PROMPTS[0], return_latents=True).latents
    lorad = LoRaD.load(sd15.lorad)
    match = lorad.matched(pipe.unet)
    attach(pipe.unet, {path: lorad.factors[key] for key, path in match.paths.items()}, "live")
    live = pipe(PROMPTS[0], return_latents=True).latents
    torch.testing.assert_close(live, fused, rtol=0, atol=0.05 * (fused - bare).abs().max().item())
    pipe.set_precision("exact")
    exact = pipe(PROMPTS[0], return_latents=True).latents
    torch.testing.assert_close(exact, sd15.load()(PROMPTS[0], return_latents=True).latents, rtol=1e-4, atol=1e-4)
    pipe.set_precision("balanced")
    assert torch.equal(pipe(PROMPTS[0], return_latents=True).latents, live)
    detach(pipe.unet, "live")
    assert torch.equal(pipe(PROMPTS[0], return_latents=True).latents, bare)


@pytest.mark.usefixtures("with_bfloat16")
@pytest.mark.parametrize("hires", [None, "redilate", "shrink"])
def test_control_and_large_pictures_stay_what_they_are(wadi_mini: OneStepPipeline, hires: str | None) -> None:
    side = 192 if hires else 128
    edges = Image.new("RGB", (side, side))
    edges.paste((255, 255, 255), (40, 40, 88, 44))
    options = {"seed": 5, "width": side, "height": side, "control_image": edges, "hires": hires or False}
    wadi_mini.set_precision("exact")
    exact = wadi_mini(PROMPTS[0], **options).images
    wadi_mini.set_precision("balanced")
    balanced = wadi_mini(PROMPTS[0], **options).images
    assert 0 < distance(exact, balanced) < 3
    kept = type(wadi_mini.control[0].network.down_blocks[1].resnets[0].conv1)
    assert kept is not nn.Conv2d and issubclass(kept, nn.Conv2d)


def test_what_is_refused(sd15: Kit) -> None:
    with pytest.raises(ValueError, match="precision must be one of exact, balanced, fast, not 'best'"):
        sd15.load(precision="best")
    with pytest.raises(ValueError, match="dtype and precision both say"):
        sd15.load(precision="fast", dtype="fp32")
    pipe = sd15.load(dtype="bf16")
    assert pipe(PROMPTS[0]).settings[0].precision is None
    with pytest.raises(ValueError, match="rounded to bfloat16: load them with precision exact"):
        pipe.set_precision("exact")


@pytest.mark.usefixtures("with_bfloat16")
def test_another_number_format_ends_a_precision(sd15: Kit) -> None:
    pipe = sd15.load(precision="fast").to(torch.bfloat16)
    assert pipe.precision is None
    plain = sd15.load(dtype="bf16")
    assert {type(layer) for layer in pipe.unet.modules()} == {type(layer) for layer in plain.unet.modules()}
    assert {p.dtype for p in pipe.unet.parameters()} == {p.dtype for p in plain.unet.parameters()}


def test_a_picture_says_how_exactly_it_was_made(sd15: Kit, tmp_path: Path) -> None:
    (path,) = sd15.load()(PROMPTS[0]).save(tmp_path / "p.png")
    assert pictures.read_settings(path).precision == "exact"
    with Image.open(path) as picture:
        assert "Number format: float32, Precision: exact" in picture.info[pictures.TEXT_KEY]


# Nothing is done twice


def test_prompts_are_encoded_once_until_something_changes(sd15: Kit) -> None:
    pipe = sd15.load()
    calls: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    first = pipe(PROMPTS[:2], seed=1, return_latents=True).latents
    assert torch.equal(pipe(PROMPTS[:2], seed=1, return_latents=True).latents, first) and len(calls) == 1
    pipe(PROMPTS[1])
    assert len(calls) == 2  # another batch
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).add_(0.5)
    assert not torch.equal(pipe(PROMPTS[:2], seed=1, return_latents=True).latents, first) and len(calls) == 3


def test_only_so_many_prompts_are_kept() -> None:
    from wadi_core.stages import KEPT, Encoded

    kept, calls = Encoded(nn.Linear(1, 1)), []

    def encode(ids: torch.Tensor) -> torch.Tensor:
        calls.append(int(ids))
        return ids

    for number in [*range(KEPT + 1), KEPT, 1, 0]:
        assert int(kept.get(torch.tensor([[number]]), encode)) == number
    assert calls == [*range(KEPT + 1), 0]


def test_the_stages_of_a_call_are_told_apart(sd15: Kit) -> None:
    pipe = sd15.load()
    assert pipe.warm_up("a cat", batch=2).total > 0
    made = pipe(PROMPTS[:2], batch=1)
    parts = made.timings
    assert made.seconds == parts.network and made.calls == 2
    assert min(parts.text, parts.network, parts.decode, parts.pictures) >= 0
    assert parts.total == parts.text + parts.network + parts.decode + parts.pictures
    assert str(parts).count(" s") == 4
