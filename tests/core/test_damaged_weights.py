"""NaN, Inf and codes without their scale: in adapters, embeddings and ControlNets, and in every command that reads a base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipeline_kit import Kit
from torch import Tensor

from wadi_core import LoRaD, OneStepPipeline
from wadi_core.cli import main
from wadi_core.embeddings import Embedding
from wadi_core.lorad.checkpoint import read_header, read_tensors, write_safetensors
from wadi_core.lorad.stored import is_finite

pytestmark = pytest.mark.usefixtures("no_network")

DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == t.numel() // 2, torch.nan, t),
    "Inf": lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 0, torch.inf, t),
    "half NaN": lambda t: DAMAGE["NaN"](t).half(),
    "int8": lambda t: t.mul(100).to(torch.int8),
    "uint8": lambda t: t.abs().mul(100).to(torch.uint8),
    "float8 codes": lambda t: (t / t.abs().max().clamp_min(1e-9) * 448).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@given(place=st.integers(0, 299), value=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_one_bad_number_is_found_wherever_it_stands(dtype: torch.dtype, place: int, value: float) -> None:
    tensor = torch.randn(3, 100, dtype=torch.float32).to(dtype)
    assert is_finite(tensor) and is_finite(tensor[:, ::2]) and is_finite(tensor[:0])
    if dtype == torch.float8_e4m3fn:  # which has no infinities
        value = torch.nan
    tensor.view(-1)[place] = torch.tensor(value).to(dtype)
    assert not is_finite(tensor)


def test_whole_numbers_are_finite() -> None:
    assert is_finite(torch.arange(3)) and is_finite(torch.tensor([True]))


@pytest.mark.parametrize("damage", ["NaN", "Inf", "half NaN", "int8", "uint8"])
def test_an_adapter_with_damaged_factors_is_refused(damage: str, sd15: Kit, tmp_path: Path) -> None:
    header = read_header(sd15.lorad)
    state, metadata = read_tensors(header), {k: v for k, v in header.metadata.items() if k != "wadi.sha256"}
    name = next(name for name in state if name.endswith(".lorad_a"))
    write_safetensors(tmp_path / "adapter.safetensors", {**state, name: DAMAGE[damage](state[name].float())}, metadata)
    with pytest.raises(ValueError, match=r"adapter.safetensors: .*(NaN, Inf or absurdly large|float)") as caught:
        LoRaD.load(tmp_path / "adapter.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_embedding_of_damaged_vectors_is_refused(damage: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "word.safetensors", {"<word>": DAMAGE[damage](torch.randn(2, 32))})
    with pytest.raises(ValueError, match=r"word.safetensors: .*(NaN or Inf|are no embedding)"):
        Embedding.load(tmp_path / "word.safetensors")


@pytest.fixture(scope="module")
def controlnet(sd15: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import ControlNetModel

    folder = tmp_path_factory.mktemp("control")
    ControlNetModel.from_unet(sd15.load(lorad=[]).base.unet).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", [*DAMAGE, "a tensor too many"])
def test_a_damaged_controlnet_is_refused(damage: str, sd15: Kit, controlnet: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(controlnet, tmp_path / "control"))
    file = folder / "diffusion_pytorch_model.safetensors"
    state = read_tensors(read_header(file))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    new = {"gate.weight": torch.zeros(2)} if damage == "a tensor too many" else {name: DAMAGE[damage](state[name])}
    write_safetensors(file, {**state, **new})
    with pytest.raises(ValueError, match="holds NaN or Inf|is stored as|codes without their scale|has no place"):
        sd15.load(control=folder)


# Every command that reads a base


@pytest.fixture(scope="module", params=[*DAMAGE, "LCM", "zero terminal SNR"])
def damaged(request: pytest.FixtureRequest, sd15: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with damage in one layer."""
    state = read_tensors(read_header(sd15.single_file))
    prefix = "model.diffusion_model."
    name = prefix + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    strange = {"LCM": prefix + "time_embed.cond_proj.weight", "zero terminal SNR": "ztsnr"}
    if request.param in strange:
        new = {strange[request.param]: torch.zeros(2)}
    else:
        new = {name: DAMAGE[request.param](state[name])}
    file = tmp_path_factory.mktemp("damaged") / "damaged.safetensors"
    write_safetensors(file, {**state, **new})
    return file


@pytest.mark.parametrize(
    "command",
    [
        "merge --base {damaged} --lorad {lorad} -o {out}",
        "inspect {lorad} --base {damaged}",
        "extract --base {base} --student {damaged} -o {out}",
        "extract --base {damaged} --student {base} -o {out}",
        "convert {lorad} --to lora --base {damaged} --rank 2 -o {out}",
        "analyze --base {base} --student {damaged}",
    ],
    ids=lambda command: " ".join(word for word in command.split() if word.isalpha() or word == "{damaged}"),
)
def test_no_command_takes_a_damaged_base(
    command: str, damaged: Path, sd15: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    places = {"damaged": damaged, "lorad": sd15.lorad, "base": sd15.single_file, "out": out}
    assert main(command.format(**places).split()) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "damaged.safetensors" in said
    assert any(word in said for word in ("NaN or Inf", "is stored as", "codes without", "LCM", "zero terminal SNR"))
    assert not list(tmp_path.iterdir())


def test_a_sound_base_passes_the_same_look(sd15: Kit, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(sd15.lorad), "--base", str(sd15.single_file)]) == 0
    assert "layers match" in capsys.readouterr().out
    assert OneStepPipeline.from_pretrained(sd15.folder, sd15.lorad, device="cpu", precision="exact").adapters
