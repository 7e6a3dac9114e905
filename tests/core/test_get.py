"""`wadi get` against a hub on the loopback device: from nothing to a picture, interruptions, hosts, and refusals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hub_networks
import hub_server
import pytest
import torch
from hub_networks import AUTHORS, BASE, NETWORK
from hub_server import Fault, Hub, Repository
from PIL import Image
from pixart import write_pixart

from wadi_core import LoRaD, catalog, images, pictures
from wadi_core.lorad.weights import Weights

NAME = "wadi-sd15-one-step.safetensors"
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Repository]:
    """What the real hub holds, narrow: a base with all that lies beside it, and the authors' networks."""
    place = tmp_path_factory.mktemp("published")
    base = hub_networks.base_repository(place / "base")
    network = hub_networks.released_network(place / "base", place / "networks" / NETWORK)
    return {BASE: base, AUTHORS: Repository({NETWORK: network, "README.md": b"# WaDi"})}


@pytest.fixture
def server(repositories: dict[str, Repository]) -> Iterator[Hub]:
    with hub_server.running(repositories) as running:
        yield running


def models(home: Path) -> Path:
    return home / ".local" / "share" / "wadi" / "lorad"


def left_of_network(home: Path) -> list[str]:
    """What of the authors' repository lies in the cache, but for lists and references."""
    store = home / "hf" / "hub" / f"models--{AUTHORS.replace('/', '--')}"
    return [str(path) for folder in ("blobs", "snapshots") for path in (store / folder).rglob("*") if not path.is_dir()]


def assert_the_lorad_is_the_network(path: Path, repositories: dict[str, Repository], network: str = NETWORK) -> None:
    """Base and LoRaD give the released network's weights."""
    from diffusers import UNet2DConditionModel

    folder = Path(str(repositories[BASE].files["model_index.json"])).parent
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
    LoRaD.load(path).fuse_into(unet)
    released = Weights.open(str(repositories[AUTHORS].files[network]))
    for name, tensor in unet.state_dict().items():
        torch.testing.assert_close(tensor, released.tensor(name), rtol=0, atol=1e-6)


def test_from_nothing_to_a_picture(server: Hub, repositories: dict[str, Repository], tmp_path: Path) -> None:
    got = server.wadi(tmp_path, "get", "sd15", "--yes")
    assert got.returncode == 0, got.stderr
    path = models(tmp_path) / NAME
    assert_the_lorad_is_the_network(path, repositories)
    assert {one.name for one in models(tmp_path).iterdir()} == {NAME, "wadi-sd15-one-step-compared.png"}

    told = got.stdout
    assert "carries no licence" in told and "CreativeML Open RAIL-M" in told
    assert "0.00 grey levels of 255 on average, 0 at most" in told
    pair = images.read(models(tmp_path) / "wadi-sd15-one-step-compared.png")
    assert pair.size == (128, 64)
    assert pair.crop((0, 0, 64, 64)).tobytes() == pair.crop((64, 0, 128, 64)).tobytes()
    metadata = LoRaD.load(path).metadata
    assert (metadata.alpha_T_squared, metadata.timestep, metadata.prediction_type) == (0.0047, 999, "epsilon")
    assert metadata.license == "none stated by the authors of the network"
    assert metadata.extra["wadi.origin"] == f"{AUTHORS}@{repositories[AUTHORS].commit}:{NETWORK}"
    assert metadata.extra["wadi.base"] == f"{BASE}@{repositories[BASE].commit}"

    # Only what is needed was fetched, nothing was told to anybody, and the network is gone from the cache again.
    resolved = [path for _, path, _ in server.requests if f"{BASE}/resolve/" in path]
    fetched = {path.partition("/resolve/main/")[2] for path in resolved}
    assert {name for name in fetched if name.endswith(".safetensors")} == {UNET, VAE, TEXT}
    assert not any(name in fetched for name in hub_networks.STRANGERS)
    assert all(BASE in path or AUTHORS in path for _, path, _ in server.requests)
    assert left_of_network(tmp_path) == []

    # The command that was printed, typed as it is.
    command = shlex.split(told.rpartition("Next:\n")[2])
    asked = len(server.requests)
    drawn = subprocess.run(command, cwd=tmp_path, env=server.environment(tmp_path), capture_output=True, text=True, check=False)
    assert drawn.returncode == 0, drawn.stderr
    settings = pictures.read_settings(tmp_path / "lighthouse.png")
    assert settings.base == BASE
    assert settings.lorad[0].file == NAME
    assert {path for _, path, _ in server.requests[asked:]} == {f"/api/models/{BASE}/revision/main"}
    offline = subprocess.run(
        [*command[:-1], "offline.png"], cwd=tmp_path, env=server.environment(tmp_path, HF_HUB_OFFLINE="1"), check=False
    )
    assert offline.returncode == 0
    assert Image.open(tmp_path / "offline.png").tobytes() == Image.open(tmp_path / "lighthouse.png").tobytes()

    asked = len(server.requests)
    again = server.wadi(tmp_path, "get", "sd15")
    assert again.returncode == 0 and "is there already" in again.stdout
    assert len(server.requests) == asked


def test_without_diffusers_no_picture_is_compared(server: Hub, repositories: dict[str, Repository], tmp_path: Path) -> None:
    """As under A1111's Python."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "diffusers.py").write_text("raise ModuleNotFoundError(name='diffusers')\n")
    paths = f"{tmp_path / 'hidden'}{os.pathsep}{hub_server.ROOT}"
    ended = server.wadi(tmp_path, "get", "sd15", "--yes", "-o", tmp_path / NAME, PYTHONPATH=paths)
    assert ended.returncode == 0 and "no picture is compared" in ended.stdout
    assert_the_lorad_is_the_network(tmp_path / NAME, repositories)


def test_killed_at_any_moment_it_goes_on(server: Hub, repositories: dict[str, Repository], tmp_path: Path) -> None:
    output = models(tmp_path) / NAME

    def assert_nothing_half() -> None:
        assert not output.exists()

    for name, how in ((UNET, signal.SIGINT), (NETWORK, signal.SIGKILL)):  # halfway through a download
        fault = server.faults[name] = Fault("hold", times=1)
        process = server.start(tmp_path, "get", "sd15", "--yes")
        assert fault.reached.wait(120)
        process.send_signal(how)
        process.wait(60)  # Ctrl-C does not wait for what is being fetched
        fault.let_go.set()
        assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
        assert_nothing_half()
    for line in ("extracting the LoRaD", "one picture"):  # in the work, and before the result is written
        process = server.start(tmp_path, "get", "sd15", "--yes")
        assert process.stdout is not None
        assert any(said.startswith(line) for said in process.stdout)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if output.exists():  # it was written between the line and the signal: then it is whole
            assert_the_lorad_is_the_network(output, repositories)
            output.unlink()
    got = server.wadi(tmp_path, "get", "sd15", "--yes")
    assert got.returncode == 0, got.stderr
    assert_the_lorad_is_the_network(output, repositories)
    assert (server.downloads(UNET), server.downloads(TEXT)) == (2, 1)  # whole files are kept
    assert server.downloads(NETWORK) == 2  # the attempt that was killed, and one more
    assert left_of_network(tmp_path) == []  # though an earlier run had fetched it
    assert not [*tmp_path.rglob("*.incomplete"), *models(tmp_path).glob(".*")]


def test_for_comfyui_and_the_network_of_a_user_stays(server: Hub, repositories: dict[str, Repository], tmp_path: Path) -> None:
    comfyui = tmp_path / "portable" / "ComfyUI"
    (comfyui / "models").mkdir(parents=True)
    (comfyui / "main.py").touch()
    (network,) = server.ask(tmp_path, f"{AUTHORS}:{NETWORK}")
    got = server.wadi(tmp_path, "get", "sd15", "--comfyui", "portable", answer="y\n")
    assert got.returncode == 0, got.stderr
    assert "Go on? [y/N]" in got.stdout
    assert_the_lorad_is_the_network(comfyui / "models" / "lorad" / NAME, repositories)
    assert Path(network).is_file()  # the user had fetched it before
    assert "Load LoRaD (wadi-sd15-one-step.safetensors)" in got.stdout

    # ComfyUI had no checkpoint: the base is written as one, and found the second time, when nobody is asked.
    checkpoint = comfyui / "models" / "checkpoints" / "stable-diffusion-v1-5.safetensors"
    assert (
        f"writing {checkpoint.relative_to(tmp_path)}, 0.0" in got.stdout
        and "Load Checkpoint (stable-diffusion-v1-5.safetensors)" in got.stdout
    )
    assert Weights.open(checkpoint).layout.name == "ldm"
    asked = len(server.requests)
    again = server.wadi(tmp_path, "get", "sd15", "--comfyui", "portable")
    assert again.returncode == 0 and f"has a checkpoint for it: {checkpoint.relative_to(tmp_path)}" in again.stdout
    assert len(server.requests) == asked


def test_the_next_repository_is_tried_and_keep_keeps(repositories: dict[str, Repository], tmp_path: Path) -> None:
    webui = tmp_path / "webui"
    (webui / "models").mkdir(parents=True)
    (webui / "webui.py").touch()
    renamed = {"Manojb/stable-diffusion-2-1-base": repositories[BASE]}
    network = {hub_networks.NETWORK_21: repositories[AUTHORS].files[NETWORK]}
    with hub_server.running({**renamed, AUTHORS: Repository(network)}) as server:
        got = server.wadi(tmp_path, "get", "sd21", "--webui", webui, "--yes", "--keep", "--no-base")
        assert got.returncode == 0, got.stderr
        assert "trying the next repository" in got.stdout
        assert "<lorad:wadi-sd21-one-step:1>" in got.stdout
        path = webui / "models" / "LoRaD" / "wadi-sd21-one-step.safetensors"
        assert LoRaD.load(path).metadata.extra["wadi.base"].startswith("Manojb/stable-diffusion-2-1-base@")
        assert len(left_of_network(tmp_path)) == 2
        assert "the web UI has no .safetensors checkpoint of it (Stable Diffusion 2.1-base, 512 px) in " in got.stdout
        assert not (webui / "models" / "Stable-diffusion").exists()


def test_of_pixart_the_outputs_are_compared(tmp_path: Path) -> None:
    folder = write_pixart(tmp_path / "pixart")
    network = hub_networks.released_network(folder, tmp_path / hub_networks.NETWORK_PIXART, "transformer")
    held = {
        hub_networks.PIXART: Repository(hub_server.folder_files(folder)),
        AUTHORS: Repository({hub_networks.NETWORK_PIXART: network}),
    }
    with hub_server.running(held) as server:
        got = server.wadi(tmp_path, "get", "pixart", "--yes", "-o", "out/pixart.safetensors")
        assert got.returncode == 0, got.stderr
        error = float(got.stdout.partition("the two differ by ")[2].split()[0])
        assert 0 <= error < 1e-4
        assert "no picture of PixArt can be drawn here" in got.stdout
        assert "only ComfyUI draws PixArt" in got.stdout
        assert LoRaD.load(tmp_path / "out" / "pixart.safetensors").metadata.architecture == "pixart-alpha"
        assert not any("text_encoder" in path or "/vae/" in path for _, path, _ in server.requests)


@pytest.mark.parametrize(
    ("arguments", "answer", "status", "said"),
    [
        (["get", "sd15"], "", 1, "nothing was fetched: answer y, or say --yes"),
        (["get", "sd15"], "n\n", 1, "nothing was fetched"),
        (["get", "pixar"], "", 1, "pixar: there is no such entry (did you mean pixart?); there are sd15, sd21, pixart, taesd"),
        (["get"], "", 2, "a NAME is needed: sd15, sd21, pixart"),
        (["get", "sd15", "--yes", "--comfyui", "."], "", 1, "is no folder of ComfyUI: there is no main.py"),
        (["get", "sd15", "--yes", "--webui", "nowhere"], "", 1, "is no folder of A1111, Forge or Forge Neo"),
        (["get", "sd15", "--yes", "-o", "x.ckpt"], "", 1, "x.ckpt: the name must end in .safetensors"),
        (["get", "sd15", "--yes", "-o", "other.safetensors"], "", 1, "another file is there under this name"),
    ],
)
def test_refusals_are_one_line_and_nothing_is_asked_of_the_hub(
    arguments: list[str], answer: str, status: int, said: str, server: Hub, tmp_path: Path
) -> None:
    LoRaD({"a": (torch.ones(2, 1), torch.ones(1, 2))}).save(tmp_path / "other.safetensors")
    ended = server.wadi(tmp_path, *arguments, answer=answer)
    assert ended.returncode == status
    assert ended.stderr.count("\n") == 1 and said in ended.stderr
    assert server.requests == []


def test_list_shows_names_sizes_and_places(server: Hub, tmp_path: Path) -> None:
    own = {"mine": {"base": BASE, "network": "me/networks:mine.safetensors", "licence": "MIT", "network_bytes": 5_000_000_000}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    models(tmp_path).mkdir(parents=True)
    (models(tmp_path) / "wadi-mine-one-step.safetensors").touch()
    ended = server.wadi(tmp_path, "get", "--list", WADI_CATALOG=str(tmp_path / "own.json"))
    assert ended.returncode == 0, ended.stderr
    for said in ("sd15: ", "sd21: ", "pixart: ", "4.3 GB", "no licence stated", "5.0 GB, MIT", str(models(tmp_path))):
        assert said in ended.stdout
    assert ended.stdout.count("there already") == 1
    assert server.requests == []


# The catalogue


def test_the_users_own_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(catalog.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("APPDATA", str(tmp_path))
    assert list(catalog.entries()) == ["sd15", "sd21", "pixart"]
    (tmp_path / "wadi").mkdir()
    own = {"base": ["a/b", "c/d"], "network": "e/f@v2:g.safetensors", "alpha_T_squared": 0.005, "output": "g.safetensors"}
    (tmp_path / "wadi" / "catalog.json").write_text(json.dumps({"sd15": own}))
    entry = catalog.find("sd15")
    assert (entry.base, entry.one_step.alpha_T_squared, entry.file_name) == (("a/b", "c/d"), 0.005, "g.safetensors")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "this is no JSON"),
        ("[]", "a JSON object is expected"),
        ('{"x": 3}', "the entry 'x' must be a JSON object"),
        ('{"x": {"base": "a/b"}}', "the entry 'x' lacks network"),
        ('{"x": {"base": "a/b", "network": "c/d:e", "url": "z"}}', "unknown field 'url'"),
        ('{"x": {"base": [], "network": "c/d:e"}}', "base must be a repository, or a list of them"),
        ('{"x": {"base": "a/b", "network": "https://c/d"}}', "'https://c/d' is no name of the hub"),
        ('{"x": {"base": "a/b", "network": "c/d:e", "timestep": "999"}}', "timestep must be a whole number, not '999'"),
        ('{"x": {"base": "a/b", "network": "c/d:e", "alpha_T_squared": 2}}', "alpha_T^2 must lie between 0 and 1"),
        ('{"x": {"base": "a/b", "network": "c/d:e", "output": "../x"}}', "'../x' is no file name"),
    ],
)
def test_a_catalogue_that_makes_no_sense_is_one_line(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    monkeypatch.setenv(catalog.VARIABLE, str(path))
    with pytest.raises(ValueError) as refused:
        catalog.entries()
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(path))


def test_a_user_without_a_home_gets_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (catalog.VARIABLE, "WADI_MODELS", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "APPDATA", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert list(catalog.entries()) == ["sd15", "sd21", "pixart"]
    assert catalog.models_folder() is None


@pytest.mark.full
def test_at_full_width(tmp_path: Path) -> None:
    """The whole way with Stable Diffusion 1.5's own U-Net and text encoder, random weights, 128 px."""
    small_pictures = {"unet": {"sample_size": 16}, "vae": {"block_out_channels": [32, 32, 32, 64]}}
    base = hub_networks.base_repository(tmp_path / "base", changes=small_pictures)
    network = hub_networks.released_network(tmp_path / "base", tmp_path / NETWORK, spread=0.02)
    with hub_server.running({BASE: base, AUTHORS: Repository({NETWORK: network})}) as server:
        got = server.wadi(tmp_path, "get", "sd15", "--yes", "--device", "cpu")
        assert got.returncode == 0, got.stderr
        lorad = LoRaD.load(models(tmp_path) / NAME)
        assert lorad.metadata.architecture == "sd15" and len(lorad.factors) == 182
        assert float(got.stdout.partition("they differ by ")[2].split()[0]) < 0.5
