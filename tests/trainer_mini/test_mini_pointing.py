"""Where the attention of wadi-mini's teacher is asked to look, and what it costs to look elsewhere."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.mini import scenes
from trainer.mini.pointing import FIRST_CELL, NOTHING, Pointing, all_places_to_look, places_to_look
from trainer.mini.teacher import TeacherConfig, make_unet


def one(x: int, y: int, size: int, mirrored: bool = False) -> scenes.Scene:
    return scenes.Scene("", (0, 0, 0), 0.0, (scenes.Placed(scenes.things()[0], x, y, size, mirrored),))


def test_a_big_object_has_two_by_two_latents_of_each_cell_in_reading_order() -> None:
    first, second = places_to_look(one(64, 64, 112))
    cells = torch.arange(FIRST_CELL, 77).reshape(7, 7).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(first[1:-1, 1:-1].long(), cells)
    assert (second == NOTHING).all()
    assert (first == NOTHING).sum() == 256 - 196  # the rim


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_a_mirrored_picture_asks_for_the_mirrored_places(seed: int) -> None:
    plan = scenes.draw_plan(random.Random(seed))
    turned = tuple(
        scenes.Placed(item.thing, scenes.SIZE - item.x, item.y, item.size, not item.mirrored) for item in plan.placed
    )
    other = scenes.Scene(plan.caption, plan.background, plan.shade, turned)
    assert torch.equal(places_to_look(other), places_to_look(plan).flip(2))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_the_objects_of_a_pair_have_their_own_heads_and_places(seed: int) -> None:
    wanted = places_to_look(scenes.draw_plan(random.Random(seed), pair=True)) != NOTHING
    assert wanted.sum((1, 2)).tolist() == [49, 49]  # a cell is as large as a latent in a pair
    assert not wanted.all(0).any()


def test_latents_of_other_scenes_are_refused() -> None:
    captions = [scenes.scene(seed).caption for seed in range(3)]
    assert all_places_to_look(captions).shape == (3, 2, 16, 16)
    with pytest.raises(ValueError, match="latent 1 shows 'a dog in space'"):
        all_places_to_look([captions[0], "a dog in space", captions[2]])


def hears(unet: torch.nn.Module, logits: torch.Tensor) -> None:
    """Let an attention look as the softmax of ``logits`` (pictures * heads, places, 77) says."""
    attention = unet.up_blocks[-1].attentions[0].transformer_blocks[0].attn2
    attention.get_attention_scores(logits / attention.scale, torch.eye(77).expand(len(logits), 77, 77))


@pytest.fixture
def unet() -> torch.nn.Module:
    network = make_unet(TeacherConfig(text_width=128))
    network.set_attn_processor(AttnProcessor())
    return network


def test_looking_at_the_right_cell_costs_nothing_and_not_knowing_the_logarithm_of_all(unet: torch.nn.Module) -> None:
    pointing = Pointing(unet)
    wanted = torch.stack([places_to_look(one(64, 64, 112)), places_to_look(one(56, 72, 112, mirrored=True))])
    keys = F.one_hot(wanted.flatten(2).flatten(0, 1).long(), 77).float()  # (4, 256, 77)
    told = torch.tensor([True, True])
    hears(unet, keys * 50)
    assert pointing.loss(wanted, told) < 1e-3
    hears(unet, keys * 0)
    assert math.isclose(pointing.loss(wanted, told).item(), math.log(77), rel_tol=1e-5)
    hears(unet, torch.cat([keys[:2], keys[2:].roll(1, 2)]) * 50)  # wrong in the second, whose caption is empty
    assert pointing.loss(wanted, torch.tensor([True, False])) < 1e-3


def test_a_place_of_several_latents_looks_at_the_cells_of_all(unet: torch.nn.Module) -> None:
    pointing = Pointing(unet)
    wanted = places_to_look(one(36, 60, 56))[None]
    assert len(set(wanted[0, 0, 8:10, 6:8].flatten().tolist())) == 4
    shares = (
        torch.stack([F.one_hot(wanted[0, :, y::2, x::2].flatten(1).long(), 77) for y in (0, 1) for x in (0, 1)]).float().mean(0)
    )
    hears(unet, shares.clamp(min=1e-9).log())
    honest = pointing.loss(wanted, torch.tensor([True]))
    entropy = -(shares * shares.clamp(min=1e-9).log()).sum(2).mean()
    assert math.isclose(honest.item(), entropy.item(), rel_tol=1e-3)


def test_the_loss_reaches_what_looks_and_pictures_stay_the_same(unet: torch.nn.Module) -> None:
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 128)
    before = unet(x, 500, text).sample
    pointing = Pointing(unet)
    assert torch.equal(before, unet(x, 500, text).sample)
    wanted = torch.stack([places_to_look(scenes.scene(seed)) for seed in range(2)])
    pointing.loss(wanted, torch.tensor([True, True])).backward()
    asked = ("down_blocks.0.", "up_blocks.1.", "up_blocks.2.")
    for name in (name for name, _ in unet.named_parameters() if "attn2.to_q" in name and name.startswith(asked)):
        assert unet.get_parameter(name).grad.abs().max() > 0
        assert unet.get_parameter(name.replace("to_q", "to_k")).grad.abs().max() > 0
    assert unet.mid_block.resnets[0].conv1.weight.grad.abs().max() > 0  # and what finds out where things are


def test_another_number_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="has 4 heads; pointing needs 2"):
        Pointing(make_unet(TeacherConfig(heads=4)))
