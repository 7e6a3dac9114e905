"""Learned words in a real A1111 and a real Forge, at the size of Stable Diffusion 1.5's text encoder, random weights."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

KINDS = [kind for kind in ("a1111", "forge") if os.environ.get(f"{kind.upper()}_PATH")]
if not KINDS:
    pytest.skip("no A1111 or Forge: set A1111_PATH or FORGE_PATH to test learned words in them", allow_module_level=True)

from comfy_networks import random_word  # noqa: E402
from webui_models import Base, wide  # noqa: E402
from webui_server import WebUI, lay_out  # noqa: E402

from wadi_core.lorad import LoRaD  # noqa: E402
from wadi_core.mini.export import export  # noqa: E402

NAME = "wadi-left-of"  # of the file, by which these programs say the word
WORDS = "a fox {} a red apple"


@pytest.fixture(scope="module", params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WebUI, Base, Path]]:
    """A running program, its base, and a learned word in its folder of embeddings."""
    kind = request.param
    data = tmp_path_factory.mktemp(kind)
    models = lay_out(kind, data)
    base = wide(models, tmp_path_factory.mktemp("base"))
    style = LoRaD.load(base.adapters["style"])
    some = {key: factors for key, factors in style.factors.items() if "_down_blocks_" in key}  # as layers=[down_blocks]
    base.adapters["some-layers"] = base.adapters["style"].with_name("wide-some-layers.safetensors")
    LoRaD(some, style.metadata).save(base.adapters["some-layers"], torch.float32)
    if kind == "a1111":  # which needs the settings beside the checkpoint
        export(models / "Stable-diffusion", base=base.folder, name=base.name)
    # Forge keeps embeddings where A1111 does, unless told otherwise.
    word = data / "embeddings" / f"{NAME}.safetensors"
    word.parent.mkdir(exist_ok=True)
    random_word("<left-of>", 768, vectors=3).save(word)
    random_word("<other>", 1024).save(word.with_name("wadi-other.safetensors"))  # of another text encoder: left out
    server = WebUI(kind, data, options=("--embeddings-dir", str(word.parent))).start()
    server.choose(base.name)
    yield server, base, word
    server.stop()


def farthest(one: np.ndarray, other: np.ndarray) -> int:
    return int(abs(one - other).max())


def test_a_learned_word_gives_the_cores_picture(place: tuple[WebUI, Base, Path]) -> None:
    webui, base, word = place
    one_step = f" <lora:{base.adapters['one-step'].stem}:1>"
    (found,) = webui.draw(WORDS.format(NAME) + one_step).pictures
    base.pipe.set_embeddings(word)
    (expected,) = base.pictures(WORDS.format("<left-of>"), [3], base.adapters["one-step"])
    assert farthest(found, expected) <= 2
    (without,) = webui.draw(WORDS.format("and") + one_step).pictures
    assert farthest(found, without) > 2


@pytest.mark.parametrize("name", ["style", "some-layers"])
def test_rotations_add_up_in_any_order(place: tuple[WebUI, Base, Path], name: str) -> None:
    webui, base, _ = place
    one_step, other = base.adapters["one-step"], base.adapters[name]
    tags = [f" <lora:{one_step.stem}:1>", f" <lora:{other.stem}:0.3>"]
    (expected,) = base.pictures("a fox", [3], [one_step, (other, 0.3)])
    (alone,) = base.pictures("a fox", [3], one_step)
    assert farthest(expected, alone) > 2
    for order in itertools.permutations(tags):
        (found,) = webui.draw("a fox" + "".join(order)).pictures
        assert farthest(found, expected) <= 2
