"""PixArt-alpha as a base: a transformer, T5 with its mask, an output of which half predicts a variance."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pixart import write_pixart
from training import tiny

from trainer.distill.distillation import Distillation
from trainer.distill.roles import STUDENT, TEACHER
from trainer.distill.session import train
from trainer.models.base_models import T5_TOKENS, PixArt, load
from wadi_core import LoRaD


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixart(tmp_path_factory.mktemp("base") / "pixart")


def test_it_says_what_its_own_pipeline_would(base: Path) -> None:
    from diffusers import PixArtAlphaPipeline

    pipeline = PixArtAlphaPipeline.from_pretrained(base, local_files_only=True)
    model = load(str(base), "", "epsilon")
    assert isinstance(model, PixArt) and model.architecture == "pixart-alpha" and model.native_size == (256, 256)
    assert model.alphas_cumprod[-1].item() == pytest.approx(4.04e-5, rel=1e-2)
    told = model.encode([" A red Apple", ""])
    text, mask, *_ = pipeline.encode_prompt([" A red Apple", ""], do_classifier_free_guidance=False)
    assert told.text.shape == (2, T5_TOKENS, 24)
    torch.testing.assert_close(told.text, text)
    assert torch.equal(told.mask, mask) and mask.sum(1).tolist() == [4, 1]
    x, t = torch.randn(2, 4, 32, 32), torch.tensor([999, 10])
    added = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        whole = pipeline.transformer(
            x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t, added_cond_kwargs=added
        ).sample
        got = model.call(model.network, x, t, told)
    assert whole.shape[1] == 8
    torch.testing.assert_close(got, whole[:, :4])


def test_only_the_largest_is_told_its_size(tmp_path: Path) -> None:
    model = load(str(write_pixart(tmp_path / "base", sample_size=128)), "", "epsilon")
    assert model.network.use_additional_conditions
    with torch.no_grad():
        assert model.call(model.network, torch.randn(1, 4, 16, 16), torch.tensor([999]), model.encode(["a cat"])).shape[1] == 4


def test_it_is_distilled_and_goes_on(base: Path, prompts: Path, tmp_path: Path) -> None:
    changes = {"resolution": 64, "gradient_checkpointing": True, "steps": 3, "sheet_every": 3}
    written = train(tiny(base, prompts, tmp_path, **{**changes, "steps": 2}))
    assert train(tiny(base, prompts, tmp_path, **changes)) == written
    lorad = LoRaD.load(written)
    run = Distillation(tiny(base, prompts, tmp_path / "other", **changes))
    assert lorad.metadata.architecture == "pixart-alpha"
    assert str(lorad.matched(run.model.network)).startswith(f"{len(lorad.factors)} of {len(lorad.factors)} layers")
    assert all(key.startswith("transformer.") and ".adaln_single." not in key for key in lorad.factors)
    x, t, told = torch.randn(1, 4, 8, 8), torch.tensor([999]), run.encode(["a cat"])
    with torch.no_grad():
        assert torch.equal(run.roles.predict(STUDENT, x, t, told), run.roles.predict(TEACHER, x, t, told))


def test_with_all_prompts_kept_no_text_encoder_is_needed(base: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    changes = {"resolution": 64, "embedding_cache": str(tmp_path / "kept"), "steps": 2}
    train(tiny(folder, prompts, tmp_path / "first", **changes))
    for path in (folder / "text_encoder").glob("*.safetensors"):
        path.unlink()
    run = Distillation(tiny(folder, prompts, tmp_path / "second", **changes))
    run.train_step()
    with pytest.raises(OSError, match="text_encoder: model.safetensors is missing"):
        run.encode(["a prompt that was never there"])


def test_parts_that_are_missing_are_named(base: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(OSError, match="vae/config.json is missing"):
        Distillation(tiny(folder, prompts, tmp_path / "run", resolution=64))
    shutil.copytree(base / "vae", folder / "vae")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="no T5 tokenizer can be read here"):
        Distillation(tiny(folder, prompts, tmp_path / "run", resolution=64))
