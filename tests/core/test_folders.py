"""Folders in diffusers layout as programs write them: every spelling of the weights is found, by every command."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipeline_kit import Kit, equal, make_kit, weights_of
from torch import Tensor

from wadi_core import LoRaD, OneStepPipeline
from wadi_core.control import load as load_control
from wadi_core.lorad.checkpoint import read_header, read_tensors, write_safetensors
from wadi_core.lorad.folders import weight_files
from wadi_core.lorad.merge import merge
from wadi_core.lorad.weights import Weights

pytestmark = pytest.mark.usefixtures("no_network")

State = dict[str, Tensor]
Writer = Callable[[Path, str, State], None]

STEM = "diffusion_pytorch_model"


def one(name: str) -> Writer:
    """A writer of one file; {stem} is the safetensors stem, {pickle} that of pickles."""

    def write(folder: Path, stem: str, state: State) -> None:
        pickle = "pytorch_model" if stem == "model" else stem
        path = folder / name.format(stem=stem, pickle=pickle)
        torch.save(state, path) if path.suffix == ".bin" else write_safetensors(path, state)

    return write


def shards(index: str, shard: str) -> Writer:
    def write(folder: Path, stem: str, state: State) -> None:
        pickle = "pytorch_model" if stem == "model" else stem
        names, places = sorted(state), {}
        for number, held in enumerate((names[::2], names[1::2]), 1):
            file = shard.format(stem=stem, pickle=pickle, n=f"{number:05}-of-00002")
            part = {name: state[name] for name in held}
            torch.save(part, folder / file) if file.endswith(".bin") else write_safetensors(folder / file, part)
            places |= dict.fromkeys(held, file)
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
        (folder / index.format(stem=stem, pickle=pickle)).write_text(text)

    return write


SPELLINGS: dict[str, Writer] = {
    "plain": one("{stem}.safetensors"),
    "fp16": one("{stem}.fp16.safetensors"),
    "bf16": one("{stem}.bf16.safetensors"),
    "non_ema": one("{stem}.non_ema.safetensors"),
    "another variant": one("{stem}.ema-only.safetensors"),
    "shards": shards("{stem}.safetensors.index.json", "{stem}-{n}.safetensors"),
    "fp16 shards": shards("{stem}.safetensors.index.fp16.json", "{stem}.fp16-{n}.safetensors"),
    "fp16 shards, newer": shards("{stem}.fp16.safetensors.index.json", "{stem}.fp16-{n}.safetensors"),
    "fp16 shards, newest": shards("{stem}.fp16.safetensors.index.json", "{stem}-{n}.fp16.safetensors"),
    "pickle": one("{pickle}.bin"),
    "fp16 pickle": one("{pickle}.fp16.bin"),
    "pickled shards": shards("{pickle}.bin.index.json", "{pickle}-{n}.bin"),
    "fp16 pickled shards": shards("{pickle}.bin.index.fp16.json", "{pickle}.fp16-{n}.bin"),
}


def rewrite(source: Path, target: Path, writer: Writer, parts: tuple[str, ...] = ("unet",)) -> Path:
    """A copy of a folder with some of its networks in another spelling."""
    folder = Path(shutil.copytree(source, target))
    for part in parts:
        stem = "model" if part == "text_encoder" else STEM
        file = folder / part / f"{stem}.safetensors"
        state = read_tensors(read_header(file))
        file.unlink()
        writer(folder / part, stem, state)
    return folder


@pytest.fixture(scope="module")
def weights(sd15: Kit) -> dict[str, dict[str, Tensor]]:
    """Of each network as the plain folder has it, and of the U-Net with the adapter merged."""
    plain = sd15.load(lorad=[]).base
    found = {part: weights_of(getattr(plain, part)) for part in ("unet", "vae", "text_encoder")}
    return {**found, "merged": weights_of(sd15.load().base.unet)}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_by_every_command(
    spelling: str, sd15: Kit, weights: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder = rewrite(sd15.folder, tmp_path / "base", SPELLINGS[spelling], ("unet", "vae", "text_encoder"))
    pipe = OneStepPipeline.from_pretrained(folder, [], device="cpu", precision="exact")
    for part in ("unet", "vae", "text_encoder"):
        assert equal(weights_of(getattr(pipe.base, part)), weights[part]), part
    assert Weights.open(folder).sha256() == Weights.open(sd15.folder).sha256()

    merge(folder, [(sd15.lorad, 1.0)], tmp_path / "merged")
    merged = OneStepPipeline.from_pretrained(tmp_path / "merged", [], device="cpu", precision="exact")
    assert equal(weights_of(merged.base.unet), weights["merged"])


@pytest.mark.parametrize("spelling", ["fp16 shards", "fp16 pickle", "bf16"])
def test_the_trainer_reads_them_too(spelling: str, sd15: Kit, tmp_path: Path) -> None:
    from trainer.models.base_models import load

    folder = rewrite(sd15.folder, tmp_path / "base", SPELLINGS[spelling], ("unet", "text_encoder"))
    model = load(str(folder), "", "epsilon")
    assert equal(weights_of(model.network), weights_of(sd15.load(lorad=[]).base.unet))
    merge(folder, [(sd15.lorad, 1.0)], tmp_path / "merged")
    with pytest.raises(ValueError, match="one-step network already"):
        load(str(tmp_path / "merged"), "", "epsilon")


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["fp16", "plain"], "plain"),
        (["bf16", "fp16"], "fp16"),
        (["non_ema", "another variant"], "another variant"),
        (["non_ema", "fp16 pickle"], "fp16 pickle"),
        (["pickle", "fp16"], "fp16"),
        (["non_ema", "pickle"], "pickle"),
        (["fp16 shards", "plain"], "plain"),
    ],
    ids=lambda names: "+".join(names) if isinstance(names, list) else names,
)
def test_of_several_variants_one_is_taken_by_rule_and_named(
    there: list[str], taken: str, sd15: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    state = read_tensors(read_header(sd15.folder / "unet" / f"{STEM}.safetensors"))
    for name in there:
        SPELLINGS[name](tmp_path, STEM, state)
    chosen = weight_files(tmp_path)
    only = tmp_path / "only"
    only.mkdir()
    SPELLINGS[taken](only, STEM, state)
    assert [path.name for path in chosen.files] == [path.name for path in weight_files(only).files]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "is read; left out: " in told[0] and (chosen.index or chosen.files[0]).name in told[0]


def test_the_same_weights_as_a_pickle_beside_are_no_news(sd15: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name in ("plain", "pickle"):
        SPELLINGS[name](tmp_path, STEM, {"a": torch.zeros(1)})
    assert weight_files(tmp_path).files == (tmp_path / f"{STEM}.safetensors",)
    assert not caplog.records


def shard_missing(folder: Path) -> None:
    (folder / f"{STEM}-00002-of-00002.safetensors").unlink()


def index_missing(folder: Path) -> None:
    (folder / f"{STEM}.safetensors.index.json").unlink()


def twice(folder: Path) -> None:
    shutil.copy(folder / f"{STEM}-00001-of-00002.safetensors", folder / f"{STEM}-00002-of-00002.safetensors")


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 3438167534\n"
    (folder / f"{STEM}-00001-of-00002.safetensors").write_text(text)


def only(name: str, text: str = "") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.glob(f"{STEM}*"):
            path.unlink()
        (folder / name).write_text(text)

    return change


def dangling(folder: Path) -> None:
    only("config2.json")(folder)
    (folder / f"{STEM}.safetensors").symlink_to(folder / ".." / "blobs" / "0a1b")


def pickled_pointer(folder: Path) -> None:
    only(f"{STEM}.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\n")(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shard_missing, "-00002-of-00002.safetensors: this file is missing, and .* names it: download it again"),
        (index_missing, "without the index that belongs to it"),
        (twice, "two of its files hold the same tensor"),
        (pointer, "a git-lfs pointer"),
        (pickled_pointer, "a git-lfs pointer"),
        (only(f"{STEM}.safetensors.incomplete"), "a download that did not end"),
        (dangling, "is a link to a file that is not there"),
        (only("diffusion_flax_model.msgpack"), "diffusion_flax_model.msgpack, which is not read"),
        (only("nothing"), f"{STEM}.safetensors is missing"),
        (only(f"{STEM}.safetensors.index.json", '{"weight_map": {}}'), "does not say which file"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("command", ["generate", "merge"])
def test_half_a_folder_is_told(command: str, change: Callable[[Path], None], message: str, sd15: Kit, tmp_path: Path) -> None:
    folder = rewrite(sd15.folder, tmp_path / "base", SPELLINGS["shards"])
    change(folder / "unet")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        if command == "generate":
            OneStepPipeline.from_pretrained(folder, sd15.lorad, device="cpu", precision="exact")
        else:
            merge(folder, [(sd15.lorad, 1.0)], tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_a_merged_folder_holds_the_list_of_its_own_shards_alone(sd15: Kit, tmp_path: Path) -> None:
    folder = rewrite(sd15.folder, tmp_path / "base", SPELLINGS["fp16 shards"])
    SPELLINGS["pickled shards"](folder / "unet", STEM, {"a": torch.zeros(1), "b": torch.zeros(1)})
    merge(folder, [(sd15.lorad, 1.0)], tmp_path / "merged")
    written = sorted(path.name for path in (tmp_path / "merged" / "unet").iterdir())
    files = [f"{STEM}.fp16-{n}-of-00002.safetensors" for n in ("00001", "00002")]
    assert written == ["config.json", *files, f"{STEM}.safetensors.index.fp16.json"]


def test_a_controlnet_is_found_in_every_spelling(sd15: Kit, tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    base = sd15.load(lorad=[]).base
    network = ControlNetModel.from_unet(base.unet)
    network.save_pretrained(tmp_path / "control")
    expected = weights_of(network)
    for number, writer in enumerate(SPELLINGS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(tmp_path / "control" / "config.json", folder)
        writer(folder, STEM, expected)
        found = load_control(folder, base, torch.device("cpu"), torch.float32)
        assert equal(weights_of(found.network), expected) and found.file == str(number)


@pytest.mark.parametrize("architecture", ["sd15", "sd21"])
def test_sgms_names_of_the_text_encoder(architecture: str, tmp_path: Path) -> None:
    kit = make_kit(tmp_path, architecture)
    state = read_tensors(read_header(kit.single_file))
    old = "cond_stage_model."
    renamed = {name.replace(old, "conditioner.embedders.0.") if name.startswith(old) else name: t for name, t in state.items()}
    write_safetensors(kit.single_file, renamed)
    made, expected = kit.load("file"), kit.load()
    assert equal(weights_of(made.base.text_encoder), weights_of(expected.base.text_encoder))


# Names


@pytest.fixture
def cache(sd15: Kit, tmp_path: Path) -> Path:
    """A model hub's cache with a checkpoint and a pipeline: links to blobs."""
    repository = tmp_path / "hub" / "models--somebody--fine-tune"
    blobs, revision = repository / "blobs", repository / "snapshots" / ("0123456789" * 4)
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in sd15.folder.rglob("*") if path.is_file())):
        blob = blobs / f"{number:064}"
        shutil.copy(file, blob)
        link = revision / file.relative_to(sd15.folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    shutil.copy(sd15.single_file, blobs / ("ab" * 32))
    (revision / "fine-tune.safetensors").symlink_to(blobs / ("ab" * 32))
    return repository


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("snapshots/{revision}/fine-tune.safetensors", "fine-tune.safetensors"),
        ("blobs/{blob}", "somebody/fine-tune"),
        ("snapshots/{revision}", "somebody/fine-tune"),
        ("snapshots/{revision}/", "somebody/fine-tune"),
        ("snapshots/{revision}/unet/..", "somebody/fine-tune"),
    ],
)
def test_a_base_in_a_hubs_cache_keeps_the_name_that_people_know(place: str, name: str, sd15: Kit, cache: Path) -> None:
    path = cache / place.format(revision="0123456789" * 4, blob="ab" * 32)
    config = None if path.is_dir() else sd15.folder
    pipe = OneStepPipeline.from_pretrained(path, sd15.lorad, device="cpu", config=config, precision="exact")
    picture = pipe("a cat").settings[0]
    assert picture.base == name and f"Model: {name}" in picture.to_infotext("wadi")


def test_a_link_is_called_as_the_user_called_it(
    sd15: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    (tmp_path / "my base").symlink_to(cache / "snapshots" / ("0123456789" * 4))
    assert OneStepPipeline.from_pretrained(tmp_path / "my base", [], device="cpu", precision="exact").base.name == "my base"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.safetensors").symlink_to(cache / "blobs" / ("ab" * 32))
    pipe = OneStepPipeline.from_pretrained("my.safetensors", [], device="cpu", config=sd15.folder, precision="exact")
    assert pipe.base.name == "my.safetensors"
    monkeypatch.chdir(sd15.folder)
    assert OneStepPipeline.from_pretrained(".", [], device="cpu", precision="exact").base.name == sd15.folder.name


def test_a_link_to_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "base.safetensors").symlink_to(tmp_path / "blobs" / "0a1b")
    with pytest.raises(OSError, match="a link to a file that is not there"):
        OneStepPipeline.from_pretrained(tmp_path / "base.safetensors", [], device="cpu", precision="exact")
    with pytest.raises(OSError, match="a link to a file that is not there"):
        LoRaD.load(tmp_path / "base.safetensors")


def test_a_controlnet_in_a_hubs_cache_keeps_its_name(sd15: Kit, cache: Path) -> None:
    from diffusers import ControlNetModel

    base = sd15.load(lorad=[]).base
    folder = cache.parent / "models--somebody--canny" / "snapshots" / "abc"
    ControlNetModel.from_unet(base.unet).save_pretrained(folder)
    assert load_control(folder, base, torch.device("cpu"), torch.float32).file == "somebody/canny"
