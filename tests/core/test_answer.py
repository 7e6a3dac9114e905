"""A base that does not say what it predicts: found out by its answer to noise, or left as what is usual."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from answering import SETTINGS, answer_as
from torch import nn

from wadi_core import LoRaD, OneStepPipeline, cli, configs, mini
from wadi_core import base as bases
from wadi_core.answer import answer_to_noise

pytestmark = pytest.mark.usefixtures("no_network")

CPU = torch.device("cpu")
BY_ANSWER = "predicts v_prediction by its answer to noise"
SHAPES = {"small": {**networks.SMALL["unet"], **SETTINGS}, "full width": networks.FULL_WIDTH["unet"]}


def unet(shape: str) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    settings = configs.read(configs.folder("sd15") / "unet" / "config.json")
    return UNet2DConditionModel.from_config({**settings, **SHAPES[shape]}).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A single file of wadi-mini's shape for each answer, without a word of it in the file."""
    place, folder, found = tmp_path_factory.mktemp("answers"), configs.folder("wadi-mini"), {}
    made = networks.make_networks(folder)
    for kind in ("random", "epsilon", "v_prediction"):
        if kind != "random":
            answer_as(made["unet"], kind)
        found[kind] = networks.write_single_file(place / f"{kind}.safetensors", networks.states(made), folder)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_are_told_apart(shape: str, dtype: torch.dtype) -> None:
    network = unet(shape)
    assert answer_to_noise(network.to(dtype)) is None  # random weights are like neither
    for kind in ("epsilon", "v_prediction"):
        answer_as(network.float(), kind)
        assert answer_to_noise(network.to(dtype)) == kind


def test_trained_networks_are_known_with_and_without_their_text_encoder() -> None:
    pipe = OneStepPipeline.from_pretrained("mini", [], device="cpu")
    for lorad in ([], mini.lorad_path()):
        pipe.set_lorad(lorad)
        assert answer_to_noise(pipe.unet) == answer_to_noise(pipe.unet, pipe.tokenizer, pipe.text_encoder) == "epsilon"


def test_networks_that_have_to_be_told_more_are_not_asked() -> None:
    network = unet("small")
    answer_as(network, "epsilon")
    network.register_to_config(encoder_hid_dim_type="ip_image_proj")  # as an IP-Adapter does
    assert answer_to_noise(network) is None
    assert answer_to_noise(unet("small").to("meta")) is None


def test_a_file_that_does_not_say_is_asked(files: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "wadi"):
        for kind, said in (("random", ("epsilon", "")), ("epsilon", ("epsilon", "by its answer to noise"))):
            base = bases.load(files[kind], CPU, torch.float32)
            assert (base.prediction_type, base.prediction_by) == said
        assert not caplog.messages
        bare = OneStepPipeline.from_pretrained(files["v_prediction"], [], device="cpu", alpha_T_squared=0.0047)
    assert bare.one_step.prediction_type == "v_prediction"
    assert f"v_prediction.safetensors: this base {BY_ANSWER}; it does not say so itself" in caplog.messages
    with pytest.raises(ValueError, match=f"{BY_ANSWER}, and the one-step weights are for epsilon"):
        OneStepPipeline.from_pretrained(files["v_prediction"], mini.lorad_path(), device="cpu")


def test_the_evaluation_follows_it_too(files: dict[str, Path]) -> None:
    from trainer.models.generators import load_generator

    with pytest.raises(ValueError, match=f"{BY_ANSWER}, and the one-step weights are for epsilon"):
        load_generator(str(files["v_prediction"]), mini.lorad_path(), "cpu")
    made = load_generator(str(files["v_prediction"]), None, "cpu", alpha_T_squared=0.0047)
    assert made.one_step.prediction_type == "v_prediction"


def test_what_a_base_says_itself_is_trusted(files: dict[str, Path], tmp_path: Path) -> None:
    folder = networks.write_settings(tmp_path / "base", "wadi-mini")
    made = networks.make_networks(folder)
    answer_as(made["unet"], "v_prediction")
    networks.write_folder(folder, networks.states(made))
    assert bases.load(folder, CPU, torch.float32).prediction_type == "epsilon"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = configs.read(scheduler)
    del settings["prediction_type"]
    scheduler.write_text(json.dumps(settings))
    assert bases.load(folder, CPU, torch.float32).prediction_by == "by its answer to noise"
    marked = tmp_path / "marked.safetensors"
    networks.write_single_file(marked, networks.states(made), folder, {"modelspec.prediction_type": "epsilon"})
    assert bases.load(marked, CPU, torch.float32).prediction_type == "epsilon"


def test_the_commands_refuse_it_in_one_line(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lorad, output = str(mini.lorad_path()), tmp_path / "merged.safetensors"
    base = str(files["v_prediction"])
    assert cli.main(["generate", "a dog", "--base", base, "--lorad", lorad, "-o", str(tmp_path / "a.png")]) == 1
    assert BY_ANSWER in capsys.readouterr().err
    assert cli.main(["merge", "--base", base, "--lorad", lorad, "-o", str(output)]) == 1
    assert "predicts v_prediction, and the LoRaD is for epsilon" in capsys.readouterr().err
    assert not output.exists()
    assert cli.main(["merge", "--base", str(files["epsilon"]), "--lorad", lorad, "-o", str(output)]) == 0


def test_a_stock_pipeline_with_such_a_network_is_refused(files: dict[str, Path]) -> None:
    from wadi_core.scheduler import load_lorad

    class Pipe:
        """The parts of a pipeline that a LoRaD touches."""

        def __init__(self, network: nn.Module) -> None:
            from diffusers import DDIMScheduler

            self.unet, self.scheduler = network, DDIMScheduler()

    network = bases.load(files["random"], CPU, torch.float32).unet
    for kind, refused in (("v_prediction", True), ("epsilon", False)):
        answer_as(network, kind)
        pipe, lorad = Pipe(network), LoRaD.load(mini.lorad_path())
        if refused:
            with pytest.raises(ValueError, match=f"this network {BY_ANSWER}, and the one-step weights are for epsilon"):
                load_lorad(pipe, lorad)
            assert type(pipe.scheduler).__name__ == "DDIMScheduler"
        else:
            assert not load_lorad(pipe, lorad).problems
