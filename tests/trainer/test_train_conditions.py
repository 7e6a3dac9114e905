"""What a run draws and is told: sizes of its pictures, and layers of the text encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import make_networks
from training import tiny

from trainer.distill.buckets import latent_shape
from trainer.distill.distillation import Distillation
from trainer.distill.export import describe


def test_each_step_has_one_of_the_sizes(base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Distillation(tiny(base, prompts, tmp_path, buckets=["64x128", "128x64", "64x64"], fake_updates=2))
    shapes, generate = [], run.model.network.forward
    monkeypatch.setattr(
        run.model.network, "forward", lambda x, *rest, **named: shapes.append(x.shape[2:]) or generate(x, *rest, **named)
    )
    seen = []
    for step in range(6):
        shapes.clear()
        run.train_step()
        assert len(set(shapes)) == 1, f"step {step}"
        seen.append(tuple(shapes[0]))
    assert set(seen) == {(16, 8), (8, 16), (8, 8)}
    assert latent_shape(run.config, run.size, 4)[1:] == seen[4]  # from the step alone


@pytest.mark.parametrize(
    ("buckets", "told"),
    [
        (["64"], "buckets: WIDTHxHEIGHT is expected"),
        (["64x72"], "buckets: multiples of 64 up to 4096"),
        (["0x64"], "buckets: multiples of 64"),
        (["axb"], "buckets: WIDTHxHEIGHT is expected"),
    ],
)
def test_what_is_no_size_is_refused(buckets: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        tiny(tmp_path, tmp_path, tmp_path, buckets=buckets)


def test_layers_of_the_text_encoder_are_left_out(base: Path, prompts: Path, tmp_path: Path) -> None:
    plain, skipped = (Distillation(tiny(base, prompts, tmp_path, clip_skip=skip)) for skip in (0, 1))
    encoder = make_networks(base)["text_encoder"]
    ids = plain.model.pipeline.vocabulary.ids(["a cat"])
    with torch.no_grad():
        found = encoder(ids, output_hidden_states=True)
        norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
        wanted = norm(found.hidden_states[-2])
    torch.testing.assert_close(plain.encode(["a cat"]).text, found[0])
    torch.testing.assert_close(skipped.encode(["a cat"]).text, wanted)
    assert not torch.equal(wanted, found[0])
    assert plain.model.encoder_key != skipped.model.encoder_key
    assert [describe(run).extra["ss_clip_skip"] for run in (plain, skipped)] == ["1", "2"]
    with pytest.raises(ValueError, match="clip_skip: this text encoder has . layers, and one has to stay"):
        Distillation(tiny(base, prompts, tmp_path, clip_skip=11))
