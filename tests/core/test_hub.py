"""Names of the model hub: what is one, what is fetched of a repository, and what is said when that fails."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import hub_networks
import hub_server
import pytest
from hub_server import Fault, Hub, Repository

from wadi_core import hub

SMALL = b"some bytes that are a file" * 100
TENS_OF_MEGABYTES = hub_networks.random_file(24_000_000)  # the client takes ten at a time


@pytest.fixture
def server() -> Iterator[Hub]:
    repositories = {
        "org/one": Repository({"a.safetensors": SMALL, "README.md": b"x"}, revisions=("main", "fp16")),
        "org/two": Repository({"a.safetensors": SMALL, "b.safetensors": b"zz", "folder/c.safetensors": b"c"}),
        "org/large": Repository({"large.safetensors": TENS_OF_MEGABYTES}),
        "org/gated": Repository({"a.safetensors": SMALL}, token="right", gated=True),
        "org/private": Repository({"a.safetensors": SMALL}, token="right"),
        "org/none": Repository({"README.md": b"x", "model.bin": b"x"}),
    }
    with hub_server.running(repositories) as running:
        yield running


def kept_bytes(home: Path) -> list[str]:
    """The names of all that lies in the cache under ``home`` beside links, locks and lists."""
    return [path.name for path in home.rglob("blobs/*") if path.is_file()]


# Names


@pytest.mark.parametrize(
    ("name", "repo", "revision", "file"),
    [
        ("org/name", "org/name", "main", None),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "main", None),
        ("org/name:file.safetensors", "org/name", "main", "file.safetensors"),
        ("org/name@v1.0", "org/name", "v1.0", None),
        ("org/name@refs/pr/3:unet/a.safetensors", "org/name", "refs/pr/3", "unet/a.safetensors"),
    ],
)
def test_names_of_the_hub(name: str, repo: str, revision: str, file: str | None) -> None:
    found = hub.parse(name)
    assert found == hub.HubName(repo, revision, file)
    assert str(found) == name


@pytest.mark.parametrize(
    "name",
    ["mini", "./mini",
     "folder", "models/some.safetensors", "models/some.CKPT", "./org/name", "../org/name", "/org/name", "a/b/c", "org/",
     "/name", "C:/models/name", r"C:\models\name", "org/name:", "org/name@", "org/na me", "", "org/name:a b", "ö/name"],
)  # fmt: skip
def test_paths_are_no_names_of_the_hub(name: str) -> None:
    assert hub.parse(name) is None
    assert hub.local(name) == name


def test_a_local_folder_or_file_of_the_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "file:a").write_bytes(b"x")
    assert hub.local("org/name", hub.BASE) == "org/name"
    assert hub.local("org/file:a") == "org/file:a"


def test_libraries_stay_offline_unless_the_user_names_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    hub.only_named(["org/name", "mini"])
    assert "HF_HUB_OFFLINE" not in os.environ
    hub.only_named(["mini", "some/file.safetensors"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# What is fetched of a repository

BASE = {
    "model_index.json": 1, "README.md": 1, "v1-5-pruned.safetensors": 9000, "safety_checker/config.json": 1,
    "safety_checker/model.safetensors": 1000, "scheduler/scheduler_config.json": 1, "tokenizer/vocab.json": 1,
    "tokenizer/merges.txt": 1, "unet/config.json": 1, "vae/config.json": 1, "text_encoder/config.json": 1,
    "unet/diffusion_pytorch_model.safetensors": 400, "unet/diffusion_pytorch_model.fp16.safetensors": 200,
    "unet/diffusion_pytorch_model.bin": 400, "unet/diffusion_pytorch_model.non_ema.safetensors": 400,
    "vae/diffusion_pytorch_model.safetensors": 40, "vae/diffusion_pytorch_model.bin": 40,
    "text_encoder/model.safetensors": 80, "text_encoder/pytorch_model.bin": 80, "text_encoder/model.onnx": 80,
}  # fmt: skip
SETTINGS = {name for name in BASE if name.endswith((".json", ".txt")) and not name.startswith("safety")}
UNET, VAE, TEXT = (f"{part}/{hub_networks.networks.STEMS[part]}" for part in ("unet", "vae", "text_encoder"))
SHARDS = {f"{UNET}-0000{i}-of-00002.safetensors": 210 for i in (1, 2)} | {f"{UNET}.safetensors.index.json": 1}


def without(*names: str) -> dict[str, int]:
    return {name: size for name, size in BASE.items() if name not in names}


def chosen(
    sizes: dict[str, int], kind: str, half: bool = False, folder: Path = Path("/nowhere"), name: str = "org/name"
) -> set[str]:
    wanted = hub.parse(name)
    assert wanted is not None
    settings, weights = hub.choose(wanted, hub.Listing("c", sizes, folder), kind, half)
    return {*settings, *weights}


@pytest.mark.parametrize(
    ("sizes", "half", "weights"),
    [
        (BASE, False, {f"{UNET}.safetensors"}),
        (BASE, True, {f"{UNET}.fp16.safetensors"}),
        (BASE | {f"{UNET}.fp16.safetensors": 400}, True, {f"{UNET}.safetensors"}),  # it saves nothing
        (without(f"{UNET}.safetensors"), False, {f"{UNET}.fp16.safetensors"}),  # better than a pickle
        (without(f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"), True, {f"{UNET}.bin"}),
        (without(f"{UNET}.safetensors") | SHARDS, False, set(SHARDS)),
        (without(f"{UNET}.safetensors") | {f"{UNET}-00001-of-00002.safetensors": 1}, False, {f"{UNET}.fp16.safetensors"}),
    ],
)
def test_of_a_base_one_set_of_weights_for_each_part_is_fetched(sizes: dict[str, int], half: bool, weights: set[str]) -> None:
    assert chosen(sizes, hub.BASE, half) == SETTINGS | weights | {f"{VAE}.safetensors", f"{TEXT}.safetensors"}


def test_weights_in_the_cache_are_not_fetched_in_half_precision_too(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / f"{UNET}.safetensors").write_bytes(b"x" * 400)
    assert f"{UNET}.safetensors" in chosen(BASE, hub.BASE, half=True, folder=tmp_path)
    (tmp_path / f"{UNET}.safetensors").unlink()
    (tmp_path / f"{UNET}.fp16.safetensors").write_bytes(b"x" * 200)
    assert f"{UNET}.safetensors" in chosen(BASE, hub.BASE, half=False, folder=tmp_path)  # but never the other way round


def test_less_is_fetched_where_less_is_needed() -> None:
    assert chosen(BASE, hub.NETWORK) == {"model_index.json", "unet/config.json", f"{UNET}.safetensors"}
    assert chosen(BASE, hub.SETTINGS) == SETTINGS
    assert chosen(BASE, hub.BASE, name="org/name:v1-5-pruned.safetensors") == {"v1-5-pruned.safetensors"}
    control = {"config.json": 1, "diffusion_pytorch_model.safetensors": 9, "diffusion_pytorch_model.bin": 9, "images/a.png": 5}
    assert chosen(control, hub.CONTROL) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert chosen({"README.md": 1, "one.safetensors": 9, "sub/two.safetensors": 9}, hub.FILE) == {"one.safetensors"}


# What can go wrong, all of it in one sentence


def test_each_failure_is_one_sentence_that_says_what_to_do(server: Hub, tmp_path: Path) -> None:
    said = {
        "org/one@fp17": "no revision fp17; the nearest: fp16",
        "org/one:b.safetensors": "holds no such file; the nearest: a.safetensors",
        "org/two": "name one as org/two:FILE (a.safetensors, b.safetensors)",
        "org/none": "holds no .safetensors file",
        "org/gated": f"gated: accept its terms at {server.endpoint}/org/gated, then set HF_TOKEN",
        "org/private": "no such file or folder here, and",
        "org/ome": "HF_TOKEN must be set; the nearest: org/one",
        "no/where": "has no such repository",
        "bad--/x..y": "the hub can have no repository of this name",
    }
    found = dict(zip(said, server.ask(tmp_path, *said), strict=True))
    for name, text in said.items():
        kind, _, sentence = found[name].partition(": ")
        assert kind in ("OSError", "ValueError", "FileNotFoundError")
        assert sentence.startswith(f"{name}: "), sentence
        assert text in sentence
        assert len(sentence) <= 400
    assert kept_bytes(tmp_path) == []


def test_a_token_opens_what_is_closed(server: Hub, tmp_path: Path) -> None:
    for path in server.ask(tmp_path, "org/gated", "org/private", HF_TOKEN="right"):
        assert Path(path).read_bytes() == SMALL
    (refused,) = server.ask(tmp_path, "org/two:b.safetensors", HF_TOKEN="expired")
    assert "status 401: the token in HF_TOKEN is not valid there" in refused


def test_a_connection_that_breaks_midway_is_taken_up_where_it_broke(server: Hub, tmp_path: Path) -> None:
    server.faults["large.safetensors"] = Fault("break", times=1)
    (path,) = server.ask(tmp_path, "org/large")
    assert Path(path).read_bytes() == TENS_OF_MEGABYTES
    assert [asked for method, _, asked in server.requests if method == "GET" and asked] == ["bytes=10485760-"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [("break", "the connection broke: run this again"), ("short", "another size than"), ("lie", "another size than")],
)
def test_half_a_file_is_never_used(kind: str, text: str, server: Hub, tmp_path: Path) -> None:
    server.faults["a.safetensors"] = Fault(kind)
    (refused,) = server.ask(tmp_path, "org/one")
    assert refused.startswith("OSError: org/one: ")
    assert text in refused
    assert kept_bytes(tmp_path) == []
    server.faults.clear()
    (path,) = server.ask(tmp_path, "org/one")
    assert Path(path).read_bytes() == SMALL


def test_a_file_of_the_cache_that_was_cut_short_is_fetched_again(server: Hub, tmp_path: Path) -> None:
    (path,) = server.ask(tmp_path, "org/one")
    Path(path).resolve().write_bytes(SMALL[:100])
    assert server.ask(tmp_path, "org/one") == [path]
    assert Path(path).read_bytes() == SMALL


def test_what_is_in_the_cache_does_without_the_hub(server: Hub, tmp_path: Path) -> None:
    before = server.ask(tmp_path, "org/one", "org/two:folder/c.safetensors")
    asked = len(server.requests)
    offline = server.ask(tmp_path, "org/one", "org/two:folder/c.safetensors", "org/two:b.safetensors", HF_HUB_OFFLINE="1")
    assert offline[:2] == before
    assert "the cache (the hub was not asked) holds no such file" in offline[2]
    (never,) = server.ask(tmp_path, "org/gated", HF_HUB_OFFLINE="1")
    assert "not in the cache of the model hub, and HF_HUB_OFFLINE forbids to fetch it" in never
    assert len(server.requests) == asked
    server.status = 503
    assert server.ask(tmp_path, "org/one")[0] == before[0]
    server.server.shutdown()
    server.server.server_close()
    unreachable = server.ask(tmp_path, "org/one", "org/large")
    assert unreachable[0] == before[0]
    assert "cannot be reached" in unreachable[1]


def test_files_are_fetched_once(server: Hub, tmp_path: Path) -> None:
    assert server.ask(tmp_path, "org/one") == server.ask(tmp_path, "org/one", "org/one@main:a.safetensors")[:1]
    assert server.downloads("a.safetensors") == 1


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**8))
    with pytest.raises(OSError, match=r"^org/x: 1\.50 GB have to be fetched .* 0\.10 GB left: make room, or set HF_HOME"):
        hub.check_room(tmp_path / "not" / "there" / "yet", 1_500_000_000, "org/x")
    hub.check_room(tmp_path, 0, "org/x")  # all of it is there
    full = "import collections, shutil; shutil.disk_usage = lambda _: collections.namedtuple('u', 'total used free')(9, 9, 0)\n"
    (refused,) = server.ask(tmp_path, "org/large", before=full)
    assert "0.02 GB have to be fetched" in refused
    assert server.downloads("large.safetensors") == 0
