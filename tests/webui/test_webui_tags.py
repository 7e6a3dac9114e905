"""Tags of a prompt and the check line of the panel in A1111 and Forge; the programs are stood in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from layout_networks import sdxl_shapes
from lorad_networks import SMALL, unet
from networks import random_lorad
from safetensors.torch import save_file
from test_webui_network import program
from webui_stand_ins import standing_in

from wadi_core import LoRaD
from wadi_core.lorad import Metadata


@dataclass
class Program:
    """A program that is stood in for: its modules, and a function that imports those of the extension."""

    modules: dict[str, ModuleType]
    extension: Callable[[str], Any]

    def prepared(self, *prompts: str, own: str = "") -> tuple[list[str], str]:
        """Prompts as the program is to read them, and all that is told."""
        told: list[str] = []
        return self.extension("tags").prepare(list(prompts), own, told.append), " | ".join(told)

    def line(self, name: str = "None", strength: float = 1.0, **page: Any) -> str:
        return self.extension("check").line(name, strength, **page)

    def becomes_sdxl(self) -> None:
        state = {name: torch.empty(shape, device="meta") for name, shape in sdxl_shapes().items()}
        network = self.modules["modules"].sd_models.model_data.sd_model.model.diffusion_model
        network.state_dict = lambda: state


@pytest.fixture(scope="module")
def made() -> LoRaD:
    """An adapter for the small network."""
    return random_lorad(unet(SMALL), seed=1)


@pytest.fixture
def host(tmp_path: Path, made: LoRaD) -> Iterator[Program]:
    """A program with a small network and adapters of several kinds."""
    meta = {**vars(made.metadata), "resolution": "64x64"}
    for name, changes in {
        "one-step": {},
        "other": {"alpha_T_squared": 0.02},
        "style": {"alpha_T_squared": None, "timestep": None},
        "foreign": {"architecture": "sd21"},
        "a&b": {},
    }.items():
        LoRaD(made.factors, Metadata(**{**meta, **changes})).save(tmp_path / f"{name}.safetensors")
    whole = (tmp_path / "one-step.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(1, 1)}
    save_file(lora, tmp_path / "ordinary.safetensors")
    (tmp_path / "Stable-diffusion").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "Stable-diffusion" / "base.safetensors")
    modules, _ = program(tmp_path)
    with standing_in(modules) as extension:
        yield Program(modules, extension)


def test_tags_are_read_as_the_programs_read_them(host: Program) -> None:
    tags = host.extension("tags")
    prompt = "a <lora:one> b <lorad:two:0.5> <lora:three:1:unet=-0.3> <lora:four:0.2:0.9> <lora:five:much> <hypernet:six:1>"
    assert [(tag.kind, tag.name, tag.strength) for tag in tags.read(prompt) if not tag.wrong] == [
        ("lora", "one", 1.0),
        ("lorad", "two", 0.5),
        ("lora", "three", -0.3),
        ("lora", "four", 0.9),
    ]
    assert tags.tag("one-step", 0.5) == "<lora:one-step:0.5>"
    with pytest.raises(ValueError, match="cannot hold"):
        tags.tag("one:step", 1)


def test_what_works_becomes_the_programs_own_tag(host: Program) -> None:
    prompts, told = host.prepared("a <lorad:one-step:0.5>", "b", own="<lora:style:1>")
    assert prompts == ["<lora:style:1>a <lora:one-step:0.5>", "b"] and told == ""
    assert host.prepared("nothing of the kind") == (["nothing of the kind"], "")
    assert host.prepared() == ([], "")


@pytest.mark.parametrize(
    ("tag", "sentence"),
    [
        ("<lora:cut:1>", "cut is left out: "),
        ("<lorad:foreign:1>", "foreign is left out: the LoRaD does not fit this network: it is made for sd21"),
        ("<lorad:nowhere:1>", "nowhere is left out: there is no adapter file of this name"),
    ],
)
def test_what_cannot_work_is_left_out_and_told(host: Program, tag: str, sentence: str) -> None:
    prompts, told = host.prepared(f"a {tag}<lora:ordinary:1>")
    assert prompts == ["a <lora:ordinary:1>"] and sentence in told and "\n" not in told


def test_lorads_that_disagree_are_left_out_unless_one_is_off(host: Program) -> None:
    prompts, told = host.prepared("a<lora:one-step:1><lora:other:1>")
    assert prompts == ["a"] and "all LoRaDs are left out" in told
    prompts, told = host.prepared("a<lora:one-step:1><lora:other:0>")
    assert prompts == ["a<lora:one-step:1><lora:other:0>"] and told == ""


@pytest.mark.parametrize(
    ("own", "prompt", "left"),
    [
        ("<lora:one-step:1>", "a<lorad:one-step:0.5><lora:style:1>", "<lora:one-step:1>a<lora:style:1>"),
        ("", "a<lora:one-step:1><lora:one-step:1>", "a<lora:one-step:1>"),
        ("", "a<lora:one-step:1><lorad:linked:0.5>", "a<lora:one-step:1>"),
    ],
)
def test_the_same_lorad_twice_is_applied_once(host: Program, tmp_path: Path, own: str, prompt: str, left: str) -> None:
    (tmp_path / "LoRaD").mkdir()
    (tmp_path / "LoRaD" / "linked.safetensors").symlink_to(tmp_path / "one-step.safetensors")
    prompts, told = host.prepared(prompt, own=own)
    assert prompts == [left] and "is asked for twice: the second is not applied" in told
    assert "is asked for twice" in host.line("one-step", prompt="<lorad:one-step:1>")


def test_of_two_the_one_that_is_off_gives_way(host: Program) -> None:
    assert host.prepared("a<lora:one-step:0><lora:one-step:1>") == (["a<lora:one-step:1>"], "")
    assert host.prepared("a<lora:one-step:1><lora:one-step:0>") == (["a<lora:one-step:1>"], "")


def test_strengths_of_lorads_are_scaled_and_nothing_else(host: Program) -> None:
    prompt = "a <lorad:one-step:0.8> <lora:style:1:te=0.5:lbw=OUTD> <lora:ordinary:0.5> <lorad:cut:1> <lorad:one-step:0,8>"
    scaled = "a <lorad:one-step:0.4> <lora:style:0.25:lbw=OUTD> <lora:ordinary:0.5> <lorad:cut:1> <lorad:one-step:0,8>"
    assert host.extension("tags").scaled(prompt, 0.5) == scaled


def test_a_lora_in_front_is_told(host: Program) -> None:
    assert "rotation first" in host.prepared("<lora:ordinary:1><lora:one-step:1>")[1]
    assert host.prepared("<lora:one-step:1><lora:ordinary:1>")[1] == ""


def test_a_name_that_no_lorad_has_is_the_programs_business(host: Program) -> None:
    assert host.prepared("a <lora:nowhere:1>") == (["a <lora:nowhere:1>"], "")


def test_stable_diffusion_xl_is_named(host: Program) -> None:
    host.becomes_sdxl()
    prompts, told = host.prepared("a<lora:one-step:1>")
    assert prompts == ["a"] and "Stable Diffusion XL" in told
    assert "Stable Diffusion XL" in host.line() and "Stable Diffusion XL" in host.line("one-step")


def test_the_check_line_of_one_that_fits(host: Program) -> None:
    layers = len(LoRaD.load(host.extension("catalog").file_of("one-step")).factors)
    line = host.line("one-step", 1.0, sampler="WaDi one-step", width=64, height=64)
    assert f"one-step: {layers} of {layers} layers, rank 4" in line and "on base.safetensors" in line and "⚠" not in line
    assert "an ordinary adapter" in host.line("style", 0.5) and "angles times 0.5" in host.line("style", 0.5)
    assert "a&amp;b: " in host.line("a&b")


def test_the_check_line_warns(host: Program) -> None:
    assert "no one-step weights" in host.line(sampler="WaDi one-step") and "⚠" not in host.line(sampler="Euler")
    assert "choose the sampler WaDi one-step instead of Euler" in host.line("one-step", sampler="Euler")
    assert "was trained at 64x64" in host.line("one-step", sampler="WaDi one-step", width=128, height=64)
    assert "⚠ foreign" not in host.line("foreign") and "⚠ it is made for sd21" in host.line("foreign")
    assert "⚠ ordinary: this is no LoRaD" in host.line("ordinary")
    assert "⚠ nowhere: there is no adapter file of this name" in host.line("nowhere")
    assert "⚠ cut: " in host.line("cut")


def test_the_check_line_reads_the_prompt(host: Program) -> None:
    line = host.line(sampler="WaDi one-step", prompt="a cat <lorad:one-step:0.5> <lora:ordinary:1>")
    assert "angles times 0.5" in line and "⚠" not in line
    assert "schedules differ" in host.line("other", sampler="WaDi one-step", prompt="<lorad:one-step:1>")


WRONG = {
    "<lorad:one-step:0,8>": "'0,8' is no decimal number: the decimal sign is a point",
    "<lorad:one-step:0. 6>": "'0. 6' is no decimal number",
    "<lorad:one-step:.5.>": "'.5.' is no decimal number",
    "<lorad:one-step:>": "a number is missing",
    "<lorad:my:name:1>": "'name' is no decimal number",
    "<lorad:one-step:ALL0.5>": "'ALL0.5' is no decimal number",
    "<lorad:one-step:nan>": "'nan' is no decimal number",
    "<lorad:one-step:inf>": "'inf' is no decimal number",
    "<lorad:one-step:1e9>": "the strength has to lie from -100 to 100, not 1e+09",
    "<lorad:one-step:80%>": "'80%' is no decimal number",
    "<lorad:one-step:０．８>": "is no decimal number",
    "<lorad:one-step:1@0.5>": "'1@0.5' is no decimal number",
    "<lorad:one-step:1 y, <hypernet:six:1>": "'1 y, <hypernet' is no decimal number",
    "<lorad:one-step:1:much>": "'much' is no decimal number",
    "<lorad:one-step:1:1:x>": "'x' is no decimal number",
    "<lorad:one-step:1:1:2.5>": "'2.5' is no whole number",
    "<lorad:one-step:unet=>": "a number is missing",
    "<lorad:one-step:1:te=a>": "'a' is no decimal number",
    "<lorad:one-step:1:dyn=a>": "'a' is no decimal number",
    "<lorad:one-step:1:unet=0=5>": "'unet=0=5' is no decimal number",
    "<lorad::1>": "it names no adapter",
    "<lorad:>": "it names no adapter",
    "<lora:one-step:0,8>": "'0,8' is no decimal number: the decimal sign is a point",
}


@pytest.mark.parametrize(("tag", "why"), WRONG.items(), ids=WRONG)
def test_a_tag_that_is_written_wrong_is_left_out_and_the_others_stay(host: Program, tag: str, why: str) -> None:
    prompts, told = host.prepared(f"a {tag} b <lorad:style:0.5> <lora:ordinary:1>")
    assert prompts == ["a  b <lora:style:0.5> <lora:ordinary:1>"]
    assert told == f"{tag} is left out: {told.partition(' is left out: ')[2]}" and why in told
    assert [found.tag.name for found in host.extension("tags").lorads(prompts[0])] == ["style"]
    line = host.line(prompt=f"a {tag} <lorad:one-step:1>", sampler="WaDi one-step", width=64, height=64)
    assert escape(why) in line and "one-step: " in line


GOOD = {
    "<lorad:one-step>": ("<lora:one-step>", 1.0),
    "<lorad:one-step: 0.8 >": ("<lora:one-step: 0.8 >", 0.8),
    "<lorad:one-step:+0.8>": ("<lora:one-step:+0.8>", 0.8),
    "<lorad:one-step:-0.8>": ("<lora:one-step:-0.8>", -0.8),
    "<lorad:one-step:.5>": ("<lora:one-step:.5>", 0.5),
    "<lorad:one-step:0.5:0.8>": ("<lora:one-step:0.5:0.8>", 0.8),
    "<lorad:one-step:1:0.5:8>": ("<lora:one-step:1:0.5:8>", 0.5),
    "<lorad:one-step:1:te=0.5>": ("<lora:one-step:1:te=0.5>", 0.5),
    "<lorad:one-step:1:lbw=OUTD>": ("<lora:one-step:1:lbw=OUTD>", 1.0),
    "<LoRaD:one-step:1>": ("<lora:one-step:1>", 1.0),
    "(<lorad:one-step:1>:1.2)": ("(<lora:one-step:1>:1.2)", 1.0),
}


@pytest.mark.parametrize(("written", "becomes"), GOOD.items(), ids=GOOD)
def test_tags_as_people_write_them(host: Program, written: str, becomes: tuple[str, float]) -> None:
    prompts, told = host.prepared(f"a {written}")
    assert (prompts, told) == ([f"a {becomes[0]}"], "")
    assert [found.tag.strength for found in host.extension("tags").lorads(prompts[0])] == [becomes[1]]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("one-stp", "'one-step'"),
        ("One-Step", "'one-step'"),
        (" one-step", "'one-step'"),
        ("one-step.safetensors", "'one-step'"),
        ("sub/one-step", "'one-step'"),
        ("sub\\one-step.safetensors", "'one-step'"),
        ("one\\-step", "'one-step'"),
        ("quite another", None),
    ],
)
def test_the_names_nearest_to_an_unknown_one_are_told(host: Program, name: str, near: str | None) -> None:
    prompts, told = host.prepared(f"a <lorad:{name}:1><lorad:style:1>")
    assert prompts == ["a <lora:style:1>"]
    assert told.startswith(f"{name} is left out: there is no adapter file of this name")
    assert (f"; did you mean {near}" in told) if near else "did you mean" not in told


def test_tags_of_others_are_the_programs_business(host: Program) -> None:
    for prompt in ("a <lora:ordinary:0,8>", "a <lora:nowhere:ALL>", "a <lora:>", "a <hypernet:x:y>"):
        assert host.prepared(prompt) == ([prompt], "")


def test_files_in_linked_subfolders_are_found(host: Program, tmp_path: Path) -> None:
    folder, other = tmp_path / "LoRaD", tmp_path.parent / f"{tmp_path.name}-other"
    (folder / "sub").mkdir(parents=True)
    other.mkdir()
    content = (tmp_path / "one-step.safetensors").read_bytes()
    for path in (folder / "sub" / "deep.safetensors", folder / "LOUD.SAFETENSORS", other / "linked.safetensors"):
        path.write_bytes(content)
    (folder / "styles").symlink_to(other, target_is_directory=True)
    (other / "circle").symlink_to(folder, target_is_directory=True)
    catalog = host.extension("catalog")
    assert catalog.file_of("deep") == folder / "sub" / "deep.safetensors"
    assert catalog.file_of("linked") == folder / "styles" / "linked.safetensors"
    assert catalog.file_of("LOUD") == folder / "LOUD.SAFETENSORS"
    assert {"deep", "linked", "LOUD"} <= set(catalog.names())
    assert host.prepared("a <lorad:linked:0.5>") == (["a <lora:linked:0.5>"], "")
