"""The command line: what it writes, what it prints, and that whatever is wrong is one line and a status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import networks
import pytest
import torch
from PIL import Image

from wadi_core import LoRaD, cli, cli_tools, mini, pictures, sheets
from wadi_core.lorad import Metadata
from wadi_core.lorad.checkpoint import write_safetensors

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """How a command ended and what it said."""

    status: int
    out: str
    error: str


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as a folder, and adapters: a one-step student, a style, one for another network."""
    place = tmp_path_factory.mktemp("place")
    _, made = networks.write_base(place / "base")
    networks.random_lorad(made["unet"]).save(place / "one-step.safetensors")
    networks.random_lorad(made["unet"], rank=2, seed=4, one_step=False).save(place / "style.safetensors")
    other = LoRaD(LoRaD.load(place / "one-step.safetensors").factors, Metadata(architecture="sd21"))
    other.save(place / "other.safetensors")
    return place


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process, and puts back what a command may change in it."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run_command(*arguments: object) -> Result:
        capsys.readouterr()
        with warnings.catch_warnings():
            try:
                status = cli.main([str(argument) for argument in arguments])
            except SystemExit as end:
                status = end.code
        return Result(status, *capsys.readouterr())

    return run_command


def in_a_process(*arguments: object, **options: object) -> Result:
    command = [sys.executable, "-m", "wadi_core", *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)
    return Result(ended.returncode, ended.stdout, ended.stderr)


# generate


def test_one_picture_in_a_process_of_its_own(place: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "folder" / "apple.png"
    result = in_a_process(
        *("generate", "a red apple", "-o", picture, "--base", place / "base"),
        *("--lorad", f"{place / 'one-step.safetensors'}:0.5", "--seed", 3, "--device", "cpu"),
    )
    assert (result.status, result.error) == (0, "")
    path, network_call = result.out.splitlines()
    assert path == str(picture) and re.fullmatch(r"1 network call: \d+\.\d{3} s, \w+ precision", network_call)
    said = pictures.read_settings(picture)
    assert (said.prompt, said.seed, said.width, said.lorad[0].strength) == ("a red apple", 3, 64, 0.5)


def test_many_prompts_from_arguments_and_a_file(run: Run, place: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeff\na cat\r\n\r\n   \n  zwei Eulen – 日本 \n".encode())
    result = run(
        *("generate", "a dog", "--prompts", prompts, "-o", tmp_path / "p.png", "--sheet", tmp_path / "all" / "sheet.png"),
        *("--base", place / "base", "--lorad", place / "one-step.safetensors", "--batch", 2, "--seed", 10, "--width", 72),
    )
    assert result.status == 0
    paths = [tmp_path / f"p-{index:04d}.png" for index in (1, 2, 3)]
    *printed, last = result.out.splitlines()
    assert printed == [*map(str, paths), str(tmp_path / "all" / "sheet.png")]
    assert re.fullmatch(r"2 network calls: \d+\.\d{3} s \(\d+\.\d{3} s a picture\), \w+ precision", last)
    said = [pictures.read_settings(path) for path in paths]
    assert [(one.prompt, one.seed) for one in said] == [("a dog", 10), ("a cat", 11), ("zwei Eulen – 日本", 12)]
    with Image.open(printed[-1]) as sheet:
        assert sheet.size == (4 + 2 * 76, 4 + 2 * (76 + sheets.LINE))
    assert "3/3" in result.error  # the progress bar
    assert sorted(one.name for one in tmp_path.iterdir()) == ["all", *(path.name for path in paths), "prompts.txt"]


def test_a_single_prompt_is_drawn_as_often_as_the_batch_says(run: Run, place: Path, tmp_path: Path) -> None:
    common = ("--base", place / "base", "--lorad", place / "one-step.safetensors")
    assert run("generate", "a cat", "-o", tmp_path / "p.png", "--batch", 3, "--seed", 5, *common).status == 0
    assert [pictures.read_settings(tmp_path / f"p-000{i}.png").seed for i in (1, 2, 3)] == [5, 6, 7]
    assert run("generate", "a cat", "-o", tmp_path / "one.png", "--batch", 1, *common).status == 0
    assert (tmp_path / "one.png").is_file()


def test_adapters_and_their_strengths(run: Run, place: Path, tmp_path: Path) -> None:
    style = place / "style.safetensors"
    result = run(
        *("generate", "a cat", "-o", tmp_path / "p.png", "--base", place / "base"),
        *("--lorad", place / "one-step.safetensors", "--lorad", f"{style}:-0.25"),
    )
    assert (result.status, result.error) == (0, "")
    said = pictures.read_settings(tmp_path / "p.png")
    assert [(one.file, one.strength) for one in said.lorad] == [("one-step.safetensors", 1.0), (style.name, -0.25)]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a:b.safetensors:-2", ("a:b.safetensors", -2.0)),
        ("C:\\a.safetensors", ("C:\\a.safetensors", 1.0)),
        ("C:\\a.safetensors:1e-1", ("C:\\a.safetensors", 0.1)),
        ("mini:0.7", ("mini", 0.7)),
        (":1", (":1", 1.0)),
    ],
)
def test_a_strength_behind_a_colon(entry: str, expected: tuple[str, float]) -> None:
    assert cli_tools.split_strength(entry) == expected


def test_a_file_whose_name_ends_like_a_strength(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:2").write_text("")
    assert cli_tools.split_strength("a:2") == ("a:2", 1.0)


def test_without_one_step_weights_it_draws_and_warns_in_one_line(run: Run, place: Path, tmp_path: Path) -> None:
    common = ("generate", "a cat", "-o", tmp_path / "p.png", "--base", place / "base")
    for adapters in ((), ("--lorad", "none"), ("--lorad", place / "style.safetensors")):
        result = run(*common, *adapters)
        assert result.status == 0 and (tmp_path / "p.png").is_file()
        assert result.error.startswith("wadi: warning: no one-step weights") and result.error.count("\n") == 1
    result = run(*common, "--alpha-T-squared", 0.01)
    assert (result.status, result.error) == (0, "")
    assert pictures.read_settings(tmp_path / "p.png").alpha_T_squared == 0.01


def test_a_long_prompt_is_cut_with_one_line(run: Run, place: Path, tmp_path: Path) -> None:
    result = run(
        *("generate", "apple " * 80, "-o", tmp_path / "p.png", "--base", place / "base"),
        *("--lorad", place / "one-step.safetensors"),
    )
    assert result.status == 0 and result.error.count("\n") == 1
    assert "left out is: apple apple apple apple apple" in result.error


def test_number_formats(run: Run, place: Path, tmp_path: Path) -> None:
    for dtype, name in (("bf16", "bfloat16"), ("float32", "float32")):
        common = ("--base", place / "base", "--lorad", place / "one-step.safetensors", "--dtype", dtype)
        assert run("generate", "a cat", "-o", tmp_path / "p.png", *common).status == 0
        assert pictures.read_settings(tmp_path / "p.png").dtype == name


# What is wrong is said in one line


def test_bad_usage_is_status_2_and_one_line(run: Run, tmp_path: Path) -> None:
    for arguments in (
        (),
        ("paint",),
        ("generate",),
        ("generate", "a cat"),
        ("generate", "-o", tmp_path / "p.png"),
        ("generate", "a cat", "-o", tmp_path / "p.png", "--seed", "one"),
        ("generate", "a cat", "-o", tmp_path / "p.png", "--wid", "64"),
        ("generate", "a cat", "-o", tmp_path / "p.png", "--control", "x"),
        ("generate", "a cat", "-o", tmp_path / "p.png", "--hires-method", "x"),
        ("inspect",),
        ("inspect", "a", "b"),
    ):
        result = run(*arguments)
        assert result.status == 2, arguments
        assert result.error.count("\n") == 1 and "--help" in result.error and result.out == ""
    assert list(tmp_path.iterdir()) == []


def test_every_other_failure_is_status_1_one_line_and_no_file(run: Run, place: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "empty.txt").write_text("\n  \n\n")
    (inputs / "latin.txt").write_bytes(b"caf\xe9\n")
    (inputs / "cut.safetensors").write_bytes((place / "one-step.safetensors").read_bytes()[:-20])
    (inputs / "text.safetensors").write_text("no adapter at all, only text")
    damaged = bytearray((place / "one-step.safetensors").read_bytes())
    damaged[-5] ^= 1
    (inputs / "damaged.safetensors").write_bytes(damaged)
    write_safetensors(inputs / "lora.safetensors", {"lora_unet_x.lora_down.weight": torch.zeros(1, 1)})
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    picture, base, lorad = outputs / "p.png", place / "base", place / "one-step.safetensors"

    def changed(**changes: object) -> list[object]:
        options = {"-o": picture, "--base": base, "--lorad": lorad, **changes}
        return ["generate", "a cat", *(part for pair in options.items() for part in pair)]

    cases = [
        (changed(**{"--width": 65}), "width must be divisible by 8, not 65: try 64 or 72"),
        (changed(**{"--height": 8}), "height must lie from 64"),
        (changed(**{"--seed": -1}), "seed must lie from 0"),
        (changed(**{"--batch": 0}), "batch must be at least 1"),
        (changed(**{"--alpha-T-squared": 2}), "alpha_T_squared must lie from"),
        (changed(**{"--alpha-T-squared": 0.01}), "one-step network already"),
        (changed(**{"--prompts": inputs / "empty.txt"}), "there is no prompt in this file"),
        (changed(**{"--prompts": inputs / "latin.txt"}), "latin.txt: line 1 is no UTF-8 text"),
        (changed(**{"--prompts": inputs / "missing.txt"}), "there is no such file"),
        (changed(**{"--prompts": outputs}), "there is no prompt in this folder"),
        (changed(**{"-o": outputs}), "must end in .png"),
        (changed(**{"-o": outputs / "p.jpeg"}), "must end in .png"),
        (changed(**{"-o": inputs / "empty.txt" / "p.png"}), "is not a folder"),
        (changed(**{"--sheet": inputs / "empty.txt" / "p.png"}), "is not a folder"),
        (changed(**{"--sheet": picture}), "would overwrite a picture"),
        (changed(**{"--base": tmp_path / "nowhere"}), "no such file or folder"),
        (changed(**{"--base": lorad}), "an adapter, not a base network"),
        (changed(**{"--base": tmp_path}), "no Stable Diffusion in diffusers layout"),
        (changed(**{"--lorad": inputs / "missing.safetensors"}), "no such file"),
        (changed(**{"--lorad": inputs / "cut.safetensors"}), "cut short"),
        (changed(**{"--lorad": inputs / "damaged.safetensors"}), "checksum"),
        (changed(**{"--lorad": inputs / "text.safetensors"}), "no .safetensors file"),
        (changed(**{"--lorad": inputs / "lora.safetensors"}), "ordinary LoRA"),
        (changed(**{"--lorad": place / "other.safetensors"}), "made for sd21"),
        (changed(**{"--lorad": f"{lorad}:nan"}), "finite"),
        (changed(**{"--device": "toaster"}), "toaster"),
        (changed(**{"--dtype": "int8"}), "not in int8"),
        ([*changed(), "--lorad", "none"], "does not go with other adapters"),
        (["inspect", inputs / "missing.safetensors"], "no such file"),
        (["inspect", inputs / "cut.safetensors"], "cut short"),
        (["inspect", lorad, "--base", tmp_path / "nowhere"], "no such file"),
    ]
    for arguments, message in cases:
        result = run(*arguments)
        assert result.status == 1, arguments
        assert message in result.error and result.error.count("\n") == 1, result.error
        assert result.error.startswith("wadi: error: ") and "Traceback" not in result.error and result.out == ""
        assert list(outputs.iterdir()) == [], arguments


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = run("generate", "a cat", "-o", tmp_path / "p.png", "--base", tmp_path / "never looked at")
    assert result.status == 1 and "Permission denied" in result.error and result.error.count("\n") == 1


def test_an_unwritable_output_is_refused_before_any_work(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", read_only)
    result = run("generate", "a cat", "-o", tmp_path / "p.png", "--base", tmp_path / "never looked at")
    assert result.status == 1 and "Read-only file system" in result.error and result.error.count("\n") == 1


def test_a_disk_that_fills_up_leaves_whole_pictures_only(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saved = os.fsync, []

    def full_disk(handle: int) -> None:
        saved.append(handle)
        if len(saved) > 4:  # each picture and its folder
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full_disk)
    common = ("--base", place / "base", "--lorad", place / "one-step.safetensors", "--batch", 2)
    result = run("generate", "a", "b", "c", "d", "-o", tmp_path / "p.png", *common)
    assert result.status == 1 and "No space left on device" in result.error
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["p-0001.png", "p-0002.png"]
    assert pictures.read_settings(tmp_path / "p-0002.png").prompt == "b"


def test_what_was_not_foreseen_is_one_line_too_and_debug_shows_more(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("wadi_core.pipeline.OneStepPipeline.from_pretrained", break_down)
    result = run("generate", "a cat", "-o", tmp_path / "p.png")
    assert (result.status, result.error) == (1, "wadi: error: RuntimeError: first line second line\n")
    result = run("generate", "a cat", "-o", tmp_path / "p.png", "--debug")
    assert result.status == 1 and "Traceback" in result.error

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wadi_core.pipeline.OneStepPipeline.from_pretrained", interrupt)
    result = run("generate", "a cat", "-o", tmp_path / "p.png")
    assert (result.status, result.error) == (130, "wadi: interrupted\n")


def test_a_missing_package_is_named_with_the_way_to_get_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    result = run("generate", "a cat", "-o", tmp_path / "p.png")
    assert result.status == 1 and 'pip install -e ".[generate]" in the folder' in result.error and result.error.count("\n") == 1


def test_a_missing_wadi_mini_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini, "FOLDER", tmp_path / "none")
    result = run("generate", "a cat", "-o", tmp_path / "p.png")
    assert result.status == 1 and "wadi-mini is missing" in result.error and result.error.count("\n") == 1


# inspect


def test_inspect_for_people(run: Run, place: Path) -> None:
    result = run("inspect", place / "one-step.safetensors", "--base", place / "base")
    assert (result.status, result.error) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines() if not line.startswith(("made", "one")))
    assert lines["layers"] == "48: 48 of rank 4" and lines["parameters"] == "18,624"
    assert lines["base"].endswith("(unet-custom): 48 of 48 layers match")
    assert "alpha_T^2 0.0047, timestep 999, epsilon" in result.out
    result = run("inspect", place / "style.safetensors")
    assert "an ordinary adapter" in result.out and "base " not in result.out


def test_inspect_for_programs(run: Run, place: Path) -> None:
    file = place / "other.safetensors"
    report = json.loads(run("inspect", file, "--base", place / "base", "--json").out)
    lorad = LoRaD.load(file)
    assert report["bytes"] == file.stat().st_size and report["dtypes"] == ["float16"]
    assert (report["rank"], report["parameters"]) == (lorad.rank, lorad.parameters_count)
    assert report["one_step"] is None and report["metadata"]["architecture"] == "sd21"
    assert report["layers"].keys() == lorad.factors.keys()
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"
    assert report["layers"][key] == {"out": 256, "in": 32, "rank": 4}
    assert report["base"]["problems"] == ["it is made for sd21, this is unet-custom"]
    assert report["base"]["layers"] == 48


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end in another way there")
def test_a_reader_that_has_enough_gets_no_complaint(place: Path) -> None:
    command = [sys.executable, "-m", "wadi_core", "inspect", str(place / "one-step.safetensors"), "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


# Start-up


def test_help_and_version_are_at_once(run: Run) -> None:
    code = (
        "import sys; from wadi_core import cli\n"
        "try: cli.main(['generate', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'diffusers', 'transformers', 'PIL', 'numpy'} & sys.modules.keys()))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
    for option in (
        "--prompts",
        "--prompt-field",
        "--base",
        "--lorad",
        "--seed",
        "--width",
        "--height",
        "--batch",
        "--sheet",
        "--device",
        "--dtype",
    ):
        assert option in ended.stdout
    assert run("--version").out.startswith("wadi ")


def test_inspecting_an_adapter_needs_no_diffusers(place: Path) -> None:
    code = (
        "import sys; from wadi_core import cli\n"
        f"cli.main(['inspect', {str(place / 'one-step.safetensors')!r}, '--json'])\n"
        "assert not {'diffusers', 'transformers', 'PIL'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
