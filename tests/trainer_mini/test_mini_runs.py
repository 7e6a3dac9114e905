"""The scripts that make wadi-mini, run for a few steps on small networks, stopped and started again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel

from trainer.engine.checkpoints import Checkpoints
from trainer.mini import decoder, export, latents, scenes, teacher, vae, words
from wadi_core import configs, mini


def vae_settings(output: Path, **changes: object) -> vae.VaeConfig:
    narrow = (96, 96, 96, 96)  # three channels a group, as the starting values need them
    return vae.VaeConfig(output=str(output), channels=narrow, batch=2, crop=32, save_every=2, warmup=1, measured=8, **changes)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of most objects the words learn what others look like: each is a call of the autoencoder at its full size."""
    all_things, maps = scenes.things(), words._maps

    def of_few(vae: torch.nn.Module, size: int) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scenes, "things", lambda: all_things[:20])
            found = maps(vae, size)
        return found.repeat(len(all_things) // 20 + 1, 1, 1, 1)[: len(all_things)]

    monkeypatch.setattr(words, "_maps", of_few)


def test_from_scenes_to_the_files_of_the_package(few_looks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae.run(vae_settings(tmp_path / "vae", steps=4))
    assert {path.name for path in (tmp_path / "vae").iterdir()} >= {"sheet-000004.png", "losses.csv", "vae"}

    monkeypatch.setattr(latents, "SHARD", 64)
    monkeypatch.setattr("sys.argv", ["latents", "--vae", str(tmp_path / "vae/vae"), "--output", str(tmp_path / "latents")]
                        + ["--shards", "1"])  # fmt: skip
    latents.main()
    encoded, captions = latents.read_shards(tmp_path / "latents")
    assert encoded.shape == (64, 4, 16, 16)
    assert captions == [scenes.scene(seed).caption for seed in range(64)]
    assert 0.5 < encoded.float().std() < 2  # scaled to about 1

    pretraining = words.WordsConfig(
        vae=str(tmp_path / "vae" / "vae"), tokenizer=str(configs.TOKENIZER), output=str(tmp_path / "words"),
        steps=20, batch=16, text_layers=1,
    )  # fmt: skip
    words.run(pretraining)
    assert (tmp_path / "words" / "losses.csv").read_text().startswith("step,names,looks,places,right")
    words.run(dataclasses.replace(pretraining, output=str(tmp_path / "no more words"), start_from=pretraining.output, steps=0))
    assert same(*(load_file(tmp_path / run / "text_encoder" / "model.safetensors") for run in ("words", "no more words")))

    settings = teacher.TeacherConfig(
        vae=str(tmp_path / "vae" / "vae"), latents=str(tmp_path / "latents"), tokenizer=str(configs.TOKENIZER),
        output=str(tmp_path / "teacher"), channels=(96, 96, 96), steps=2, batch=4, save_every=1, sheet_every=2, text_layers=1,
        words_from=str(tmp_path / "words"), words_frozen=True, pointing=0.1,
    )  # fmt: skip
    asked: list[tuple[int, ...]] = []
    answer = teacher.Pointing.loss
    monkeypatch.setattr(
        teacher.Pointing, "loss", lambda self, look, *told: asked.append(look.shape) or answer(self, look, *told)
    )
    teacher.run(settings)
    assert (tmp_path / "teacher" / "sheet-000002.png").is_file()
    assert asked == [(4, 2, 16, 16)] * 2  # where its attention should look, at both steps
    assert same(*(load_file(tmp_path / run / "text_encoder" / "model.safetensors") for run in ("words", "teacher")))

    # Another run goes on from what was written.
    on = dataclasses.replace(
        settings, output=str(tmp_path / "on"), steps=0, start_from=str(tmp_path / "teacher"), words_from=None
    )
    teacher.run(on)
    for part, name in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        assert same(load_file(tmp_path / "on" / part / name), load_file(tmp_path / "teacher" / part / name))
    with pytest.raises(ValueError, match="text_encoder: its shape is another"):
        teacher.run(dataclasses.replace(on, text_layers=2))

    # A decoder that learns on leaves the encoder, and so the teacher's latents, as they are.
    second = decoder.DecoderConfig(
        vae=str(tmp_path / "vae" / "vae"), teacher=str(tmp_path / "teacher"), latents=str(tmp_path / "latents"),
        tokenizer=str(configs.TOKENIZER), output=str(tmp_path / "decoder"), steps=2, batch=2, crop=32, save_every=1,
    )  # fmt: skip
    monkeypatch.setattr(decoder, "SHOWN", 2)
    decoder.run(second)
    before, after = (load_file(tmp_path / run / "vae" / "diffusion_pytorch_model.safetensors") for run in ("vae", "decoder"))
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    # Going on from the first step's checkpoint ends in the same weights.
    (tmp_path / "decoder" / "step-00000002.pt").unlink()
    (tmp_path / "decoder" / "vae").rename(tmp_path / "straight")
    decoder.run(second)
    assert same(after, load_file(tmp_path / "decoder" / "vae" / "diffusion_pytorch_model.safetensors"))
    monkeypatch.setattr(decoder, "read_shards", lambda folder: (encoded, ["a red apple", *captions[1:]]))
    with pytest.raises(ValueError, match="these latents are of other scenes"):
        decoder.run(second)

    target = tmp_path / "package"
    monkeypatch.setattr("sys.argv", ["export", "--vae", str(tmp_path / "vae/vae"), "--teacher", str(tmp_path / "teacher")]
                        + ["--output", str(target)])  # fmt: skip
    export.main()
    for part, name in mini.WEIGHTS.items():
        tensors = load_file(target / name)
        assert all(tensor.dtype == torch.float16 for tensor in tensors.values()), part
        assert (target / part / "config.json").is_file()
    assert all(name.startswith("text_model.") for name in load_file(target / mini.WEIGHTS["text_encoder"]))
    assert not any(CLIPTextModel.from_pretrained(target / "text_encoder", output_loading_info=True)[1].values())
    (rows,) = (t for n, t in load_file(target / mini.WEIGHTS["text_encoder"]).items() if n.endswith("token_embedding.weight"))
    trained = set(rows.abs().amax(dim=1).nonzero().flatten().tolist())
    assert trained == export.words_that_occur()
    assert 300 < len(trained) < 1500


def test_the_words_of_captions_are_kept() -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(configs.TOKENIZER)
    kept = export.words_that_occur()
    for seed in range(500):
        assert set(tokenizer(scenes.scene(seed).caption).input_ids) <= kept


def test_an_autoencoder_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    vae.run(vae_settings(tmp_path / "straight", steps=4))
    run = vae_settings(tmp_path / "halved", steps=4)
    original = Checkpoints.save

    class Stopped(Exception):
        pass

    def save_and_stop(self: Checkpoints, step: int, state: dict) -> Path:
        path = original(self, step, state)
        if step == 2:
            raise Stopped
        return path

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Checkpoints, "save", save_and_stop)
        vae.run(run)
    vae.run(run)
    states = [Checkpoints(tmp_path / name).latest()["model"] for name in ("straight", "halved")]
    assert same(*states)
