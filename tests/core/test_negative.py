"""Negative prompts in one call: the formulas, where they work in a network, and what a picture says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm_unet import LdmUNet
from PIL import Image
from pipeline_kit import count_calls, equal, largest_difference, weights_of
from pixart import write_pixart
from stock_pipelines import mini_parts, stock
from torch import Tensor, nn

from wadi_core import OneStepPipeline, cli, guidance, mini, pictures
from wadi_core.avoid import avoid
from wadi_core.negative import METHODS, PRESETS, Guidance, Negative, of_each, preset
from wadi_core.scheduler import load_lorad
from wadi_core.settings import PictureSettings

pytestmark = pytest.mark.usefixtures("no_network")
PROMPT, UNWANTED = "a cat and a bicycle", "a bicycle"
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def ours() -> OneStepPipeline:
    return OneStepPipeline.from_pretrained("mini", device="cpu", precision="exact")


def edges() -> Image.Image:
    picture = Image.new("RGB", (128, 128))
    picture.paste("white", (40, 40, 44, 90))
    return picture


def same(one: Any, other: Any) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one.images, other.images, strict=True))


# --- the formulas


@pytest.mark.parametrize("tau", [1.0, 2.5, 30.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_nag_is_what_its_authors_write(tau: float, alpha: float) -> None:
    positive, negative = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    moved = positive + 4.0 * (positive - negative)
    ratio = moved.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
    assert (ratio > 2.5).any()  # so that the limit is met, and not by all
    expected = alpha * moved * torch.minimum(ratio, torch.tensor(tau)) / ratio + (1 - alpha) * positive
    torch.testing.assert_close(guidance.nag(positive, negative, 4.0, tau, alpha), expected)


def test_nasa_is_what_its_authors_write() -> None:
    positive, negative = torch.randn(2, 3, 7, 8)
    torch.testing.assert_close(guidance.nasa(positive, negative, 0.3), positive - 0.3 * negative)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nag_of_nothing_and_of_very_much_stays_finite(dtype: torch.dtype) -> None:
    nothing, much = torch.zeros(1, 2, 1280, dtype=dtype), torch.full((1, 2, 1280), 900.0, dtype=dtype)
    for positive, negative in ((nothing, nothing), (nothing, much), (much, nothing)):
        found = guidance.nag(positive, negative, 2.0, 2.5, 0.5)
        assert found.dtype == dtype and found.isfinite().all()


# --- the layers


def expected_output(layer: Any, x: Tensor, text: Tensor, unwanted: Tensor, how: Guidance) -> Tensor:
    """A cross-attention layer by its definition, without anything of what is tested but the formula."""

    def attended(context: Tensor) -> Tensor:
        q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
        parts = []
        for head in range(layer.heads):
            size = q.shape[-1] // layer.heads
            own = slice(head * size, (head + 1) * size)
            weights = (q[..., own] @ k[..., own].transpose(1, 2) / size**0.5).softmax(-1)
            parts.append(weights @ v[..., own])
        return torch.cat(parts, -1)

    return layer.to_out[0](guidance.steered(attended(text), attended(unwanted), how))


class CrossAttention(nn.Module):
    """LDM's, in a few lines."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, width, bias=False) for n in (width, context_width, context_width))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout())

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        parts = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Layered(nn.Module):
    """A network with one cross-attention layer beside a self-attention layer, built like diffusers' or like LDM's."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        if layout == "ldm":
            self.attn1, self.attn2 = CrossAttention(16, 16, 2), CrossAttention(16, 12, 2)
        else:
            from diffusers.models.attention_processor import Attention

            self.attn1 = Attention(16, heads=2, dim_head=8)
            self.attn2 = Attention(16, cross_attention_dim=12, heads=2, dim_head=8)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.attn2(x, text)


@every_method
@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
@torch.no_grad()
def test_a_layer_does_what_the_formula_says_and_then_forgets_it(layout: str, method: str) -> None:
    network, how = Layered(layout).eval(), preset(method)
    x, text, unwanted = torch.randn(3, 5, 16), torch.randn(3, 7, 12), torch.randn(1, 4, 12)
    before = network(x, text)
    with guidance.attach(network, unwanted, how):
        steered = network(x, text)
        with guidance.attach(network, unwanted, preset(method, 0.0)):
            assert torch.equal(network(x, text), steered)
    torch.testing.assert_close(steered, expected_output(network.attn2, x, text, unwanted.expand(3, -1, -1), how))
    assert torch.equal(network(x, text), before) and not torch.allclose(before, steered)


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
@torch.no_grad()
def test_rows_are_steered_each_by_its_own_text_or_not_at_all(layout: str) -> None:
    network, how = Layered(layout).eval(), preset()
    x, text = torch.randn(4, 5, 16), torch.randn(4, 7, 12)
    texts = {"short": torch.randn(4, 12), "long": torch.randn(6, 12)}
    unwanted = [
        (Negative(texts=("long",)),),
        (),
        (Negative(texts=("short",)),),
        (Negative("nasa", 0.5, texts=("short", "long")),),
    ]
    with guidance.attach_each(network, unwanted, texts.__getitem__):
        found = network(x, text)
    assert torch.equal(found[1], network(x, text)[1])
    for row, context, its in (
        (0, texts["long"], how),
        (2, texts["short"], how),
        (3, torch.cat([*texts.values()]), PRESETS["nasa"]),
    ):
        alone = expected_output(network.attn2, x[row, None], text[row, None], context[None], its)
        torch.testing.assert_close(found[row, None], alone)


def test_the_inner_levels_are_the_same_layers_in_both_layouts(ours: OneStepPipeline) -> None:
    ldm = LdmUNet(ours.unet)
    for level, count in ((0, 7), (1, 4), (2, 1), (3, 0)):
        found = list(guidance.layers(ours.unet, level))
        assert len(found) == count == len(list(guidance.layers(ldm, level)))
    middle = ours.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    assert list(guidance.layers(torch.compile(ours.unet, backend="eager"), 2)) == [middle]


@torch.no_grad()
def test_a_compiled_network_notices_and_keeps_up() -> None:
    network = Layered("diffusers").eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    x, text = torch.randn(1, 5, 16), torch.randn(1, 7, 12)
    compiled(x, text)
    for seed in range(3):
        unwanted = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(seed))
        with guidance.attach(network, unwanted, preset()):
            torch.testing.assert_close(compiled(x, text), network(x, text))
    torch.testing.assert_close(compiled(x, text), network(x, text))


@pytest.mark.parametrize(
    "network, width, message", [(nn.Linear(2, 2), 12, "cross-attention"), (Layered("ldm"), 13, "13 numbers.* reads 12")]
)
def test_other_networks_and_texts_are_refused(network: nn.Module, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guidance.attach(network, torch.zeros(1, 4, width), preset())


# --- the pipeline


@pytest.mark.parametrize("nothing", [{}, {"negative_prompt": ""}, {"negative_prompt": UNWANTED, "negative_scale": 0.0}])
def test_nothing_unwanted_is_the_same_picture_at_no_cost(
    ours: OneStepPipeline, nothing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ours(PROMPT, seeds=[1, 2])
    monkeypatch.setattr(guidance, "attach", None)  # would be called if there was anything to do
    found = ours(PROMPT, seeds=[1, 2], **nothing)
    assert same(found, plain) and found.settings == plain.settings and found.settings[0].negative == ()


@pytest.mark.parametrize("name", PRESETS)
def test_the_network_is_called_once_and_is_as_before(ours: OneStepPipeline, name: str) -> None:
    calls, processors, weights = count_calls(ours.unet), dict(ours.unet.attn_processors), weights_of(ours.unet)
    plain = ours(PROMPT, seeds=[1, 2])
    found = ours(PROMPT, seeds=[1, 2], negative_prompt=UNWANTED, negative_method=name)
    assert calls == [2, 2] and found.calls == 1
    assert largest_difference(plain.images[0], found.images[0]) > 30
    assert ours.unet.attn_processors == processors and equal(weights, weights_of(ours.unet))
    assert same(ours(PROMPT, seeds=[1, 2]), plain)


def test_each_picture_of_a_batch_is_the_one_that_is_made_alone(ours: OneStepPipeline) -> None:
    unwanted = [UNWANTED, "", ["a dog", "a red background"], "a dog " * 100]
    asked = {"prompts": [PROMPT] * 4, "negative_prompt": unwanted}
    together, apart = ours(**asked, batch=4), ours(**asked, batch=1)
    assert together.calls == 1
    assert all(largest_difference(a, b) <= 1 for a, b in zip(together.images, apart.images, strict=True))
    assert [len(one.negative) for one in together.settings] == [1, 0, 1, 1]
    for seed, text in enumerate(unwanted):
        assert largest_difference(together.images[seed], ours(PROMPT, seed=seed, negative_prompt=[text]).images[0]) <= 1


def test_one_text_twice_is_that_text(ours: OneStepPipeline) -> None:
    one, twice = (ours(PROMPT, negative_prompt=[texts]).images[0] for texts in ([UNWANTED], [UNWANTED] * 2))
    assert largest_difference(one, twice) <= 1


def test_a_long_text_is_read_to_its_end(ours: OneStepPipeline) -> None:
    long = "a dog " * 60
    assert ours.encode_whole(long).shape == (2 * 77, 128)
    one, other = (ours(PROMPT, negative_prompt=long + more).images[0] for more in ("", UNWANTED))
    assert largest_difference(one, other) > 5


@pytest.mark.parametrize(
    "more", [{"control_image": edges()}, {"width": 192, "height": 128, "hires": "shrink"}], ids=["control", "larger"]
)
def test_it_works_beside_what_else_steers(ours: OneStepPipeline, more: dict[str, Any]) -> None:
    ours.set_control("mini" if "control_image" in more else None)
    plain, found = ours(PROMPT, **more), ours(PROMPT, **more, negative_prompt=UNWANTED)
    ours.set_control(None)
    assert largest_difference(plain.images[0], found.images[0]) > 20


def test_learned_words_and_strengths(ours: OneStepPipeline) -> None:
    """The keys and values of the negative text come from the weights as the adapters turned them."""
    ours.set_embeddings("mini")
    word = ours.vocabulary.learned[0].token
    one, other = (ours(PROMPT, negative_prompt=text).images[0] for text in (word, UNWANTED))
    ours.set_embeddings(None)
    ours.set_lorad(mini.lorad_path(), 0.7)
    weaker = ours(PROMPT, negative_prompt=UNWANTED).images[0]
    ours.set_lorad(mini.lorad_path())
    assert largest_difference(one, other) > 5 and largest_difference(other, weaker) > 5


def test_a_failing_call_leaves_nothing_behind(ours: OneStepPipeline) -> None:
    processors = dict(ours.unet.attn_processors)
    with pytest.raises(RuntimeError), guidance.attach_each(ours.unet, [(Negative(texts=("a",)),)], ours.encode_whole):
        ours.unet(torch.zeros(1, 3, 16, 16), 999, encoder_hidden_states=ours.encode([""]))
    assert ours.unet.attn_processors == processors


# --- what a picture says


def test_settings_go_there_and_back(ours: OneStepPipeline) -> None:
    how = Guidance("nag", 3.0, 4.0, 0.7)
    made = ours(PROMPT, negative_prompt=[["a bicycle, red", "blur"]], negative_method=how)
    its = made.settings[0]
    assert its.negative == (Negative("nag", 3.0, 4.0, 0.7, texts=("a bicycle, red", "blur")),)
    assert PictureSettings.from_json(its.to_json()) == its
    lines = its.to_infotext("wadi").splitlines()
    assert lines[1] == "Negative prompt: a bicycle, red, blur" and "Negative method: nag, Negative scale: 3" in lines[2]
    again = next(ours.run([its]))
    assert again.images[0].tobytes() == made.images[0].tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": "x"},
        {"scale": 31},
        {"tau": 0.5},
        {"alpha": 2},
        {"method": "cfg"},
        {"texts": []},
        {"texts": "a"},
        {"texts": [7]},
    ],
    ids=str,
)
def test_settings_that_are_none_are_refused(ours: OneStepPipeline, changes: dict[str, Any]) -> None:
    values = json.loads(ours.plan(PROMPT, negative_prompt=UNWANTED)[0].to_json())
    values["negative"][0] |= changes
    with pytest.raises(ValueError, match="negative|tau|alpha|first_level"):
        PictureSettings.from_json(json.dumps(values))


@pytest.mark.parametrize("texts", [None, "", " ", [""], [None], [[]], [["", " "]]], ids=repr)
def test_no_text_is_no_negative_prompt(texts: Any) -> None:
    assert of_each(texts, preset(), 3) == [()] * 3


def generated(capsys: pytest.CaptureFixture[str], place: Path, *words: str) -> tuple[int, str]:
    try:
        status = cli.main(["generate", PROMPT, "-o", str(place / "p.png"), "--device", "cpu", *words])
    except SystemExit as end:
        status = int(end.code or 0)
    return status, capsys.readouterr().err


def test_the_command_line_draws_what_the_pipeline_does(
    ours: OneStepPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--negative", "a bicycle", "--negative", "blur", "--negative-scale", "1.5", "--negative-method", "nasa")
    assert generated(capsys, tmp_path, *words, "--precision", "exact")[0] == 0
    asked = {"negative_prompt": [["a bicycle", "blur"]], "negative_scale": 1.5, "negative_method": "nasa"}
    assert largest_difference(Image.open(tmp_path / "p.png"), ours(PROMPT, **asked).images[0]) == 0
    assert pictures.read_settings(tmp_path / "p.png").negative == (Negative("nasa", 1.5, texts=("a bicycle", "blur")),)


@pytest.mark.parametrize(
    "words, status, message",
    [
        (("--negative-scale", "2"), 2, "go with --negative"),
        (("--negative", "x", "--negative-scale", "99"), 1, "negative scale must lie from 0 to 30, not 99"),
        (("--negative", "x", "--negative-method", "cfg"), 2, "cfg"),
    ],
)
def test_the_command_line_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], status: int, message: str
) -> None:
    found, said = generated(capsys, tmp_path, *words)
    assert found == status and message in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# --- stock pipelines


def test_a_stock_pipeline_draws_what_ours_does(ours: OneStepPipeline) -> None:
    pipe = stock(mini_parts())
    load_lorad(pipe, mini.lorad_path())
    calls = count_calls(pipe.unet)
    expected = ours([PROMPT] * 2, seed=4, negative_prompt=[UNWANTED, "a cat"]).images
    latents = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5)])
    made = pipe([PROMPT] * 2, latents=latents, negative_prompt=[UNWANTED, "a cat"]).images
    assert calls == [2]
    assert all(largest_difference(a, b) <= 1 for a, b in zip(made, expected, strict=True))
    with avoid(pipe, UNWANTED, scale=1.0, method="nasa"):
        made = pipe(PROMPT, latents=latents[:1]).images[0]
    assert (
        largest_difference(
            made, ours(PROMPT, seed=4, negative_prompt=UNWANTED, negative_scale=1.0, negative_method="nasa").images[0]
        )
        <= 1
    )
    assert largest_difference(pipe(PROMPT, latents=latents[:1]).images[0], ours(PROMPT, seed=4).images[0]) <= 1


@torch.no_grad()
def test_pixart_is_steered_without_its_padding(tmp_path: Path) -> None:
    from diffusers import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline.from_pretrained(write_pixart(tmp_path / "pixart"))
    x, text = torch.randn(2, 4, 32, 32), torch.randn(2, 6, 24)
    asked = {"timestep": torch.tensor([999, 999]), "return_dict": False}
    found, told = [], {"resolution": None, "aspect_ratio": None}
    for unwanted in ("", "a dog", "a dog"):
        with avoid(pipe, unwanted):
            found.append(pipe.transformer(x, encoder_hidden_states=text, added_cond_kwargs=told, **asked)[0])
    assert torch.equal(found[1], found[2]) and not torch.allclose(found[0], found[1])
    encoded = pipe.encode_prompt("a dog", do_classifier_free_guidance=False)[0][:, :3]  # two words and the end
    with guidance.attach(pipe.transformer, encoded, preset()):
        whole = pipe.transformer(x, encoder_hidden_states=text, added_cond_kwargs=told, **asked)[0]
    torch.testing.assert_close(whole, found[1])
