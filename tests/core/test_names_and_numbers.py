"""Names of files and strengths as people write them: taken, or refused in one line before any work begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lorad_networks import SMALL, unet
from networks import random_lorad

from trainer.settings import fields as settings
from trainer.settings.distillation import TrainConfig
from trainer.settings.finetuning import InvertConfig, PersonalizeConfig
from wadi_core import LoRaD, cli, cli_tools, entries
from wadi_core.files import check_writable, files_below
from wadi_core.lorad.adapter import fuse
from wadi_core.lorad.merge import factors_by_layer
from wadi_core.lorad.weights import check_output
from wadi_core.stack import load_adapters

Main = Callable[..., tuple[int, str]]


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """A command of the core's command line in an empty folder: its status and its complaint of one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        before = sorted(tmp_path.rglob("*"))
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(str(end.code))
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "Traceback" not in told and sorted(tmp_path.rglob("*")) == before
        return status, told

    return run


# Names of a run

NAMES = {
    "300 letters": ("x" * 300, "has 312 bytes with .safetensors, and a file name at most 255"),
    "90 Japanese letters": ("名" * 90, "has 282 bytes with .safetensors"),
    "one letter too many": ("x" * 244, "has 256 bytes with .safetensors"),
    "a folder": ("a/b", "a file name without folders is expected, not 'a/b': '/' cannot stand in one"),
    "a folder of Windows": ("a\\b", "cannot stand in one"),
    "a colon": ("a:b", "':' cannot stand in one"),
    "a star": ("a*", "'*' cannot stand in one"),
    "a question mark": ("what?", "'?' cannot stand in one"),
    "quotes": ('"a"', "cannot stand in one"),
    "brackets": ("<a>", "a file name without folders"),
    "a bar": ("a|b", "'|' cannot stand in one"),
    "no Unicode": ("caf\udce9", "cannot stand in one"),
    "nothing": ("", "a file name without folders is expected, not ''"),
    "points": ("..", "a file name without folders is expected, not '..'"),
    "a point at the end": ("v1.", "a file name that ends in a point or a space is none on Windows"),
    "a device": ("CON", "Windows keeps the name 'CON' for a device"),
    "a device, small": ("nul", "Windows keeps the name 'nul' for a device"),
    "a device with an ending": ("com1.final", "Windows keeps the name 'com1.final' for a device"),
    "a device with a raised digit": ("LPT²", "for a device"),
}


@pytest.mark.parametrize("schema", [TrainConfig, InvertConfig, PersonalizeConfig])
@pytest.mark.parametrize(("name", "message"), NAMES.values(), ids=NAMES)
def test_a_name_that_no_file_can_have_is_refused_before_the_run(schema: type, name: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        settings.load(schema, None, [f"name={name}"])
    assert str(caught.value).startswith("name: ") and "\n" not in str(caught.value)
    assert message in str(caught.value) or "a file name without folders, spaces and brackets" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["x" * 243, "名" * 81, "v1.5", "console", "con-1", ".hidden", "-", "👨‍👩‍👧", "com0", "a;b", "100%"]
)
def test_names_that_every_file_system_takes(name: str, tmp_path: Path) -> None:
    assert settings.load(TrainConfig, None, [f"name={name}"]).name == name
    (tmp_path / f"{name}.safetensors").write_bytes(b"")  # here at least


def test_a_run_that_writes_several_files_counts_what_it_adds_to_the_name() -> None:
    words_ = ["tokens=[<one>, <two-times>]", "initial=[and]"]
    fitting = settings.load(InvertConfig, None, [*words_, f"name={'x' * 233}"])
    assert [len(file) for file in fitting.files()] == [237, 243]
    with pytest.raises(ValueError, match="^name: .* has 256 bytes with .safetensors"):
        settings.load(InvertConfig, None, [*words_, f"name={'x' * 234}"])
    assert settings.load(InvertConfig, None, ["tokens=[<x>]", "name=left"]).files() == ["left"]


@pytest.mark.parametrize("tokens", ["[<R>, '[R]']", "[<r>, <R>]", "[a-b, a+b]"])
def test_words_that_would_be_written_to_one_file_are_refused(tokens: str) -> None:
    with pytest.raises(ValueError, match="^tokens: .* would be written to one file"):
        settings.load(InvertConfig, None, [f"tokens={tokens}"])


@pytest.mark.parametrize("schema", [TrainConfig, InvertConfig, PersonalizeConfig])
@pytest.mark.parametrize("output", ["", " "])
def test_a_run_needs_a_folder(schema: type, output: str) -> None:
    with pytest.raises(ValueError, match="^output: name the folder that the run writes to$"):
        settings.load(schema, None, [f"output={output}"])


# Strengths

STRENGTHS = {
    "0,8": "'0,8' is no decimal number: the decimal sign is a point",
    "0. 6": "'0. 6' is no decimal number",
    ".5.": "'.5.' is no decimal number",
    "": "a number is missing",
    " ": "a number is missing",
    "ALL0.5": "'ALL0.5' is no decimal number",
    "nan": "finite number such as 0.8: 'nan' is no",
    "inf": "finite number such as 0.8: 'inf' is no",
    "-Infinity": "'-Infinity' is no decimal number",
    "1e30": "from -100 to 100, not 1e+30",
    "-1e9": "from -100 to 100, not -1e+09",
    "1e999": "'1e999' is too large",
    "80%": "'80%' is no decimal number",
    "０.８": "is no decimal number",
    "0x1": "'0x1' is no decimal number",
    "on": "'on' is no decimal number",
}


@pytest.mark.parametrize(("text", "message"), STRENGTHS.items(), ids=[text or "empty" for text in STRENGTHS])
def test_a_strength_that_is_none_gets_a_sentence_everywhere(text: str, message: str, main: Main) -> None:
    with pytest.raises(ValueError, match="the strength has to"):
        entries.strength(text)
    status, told = main("generate", "a cat", "-o", "p.png", "--lorad", f"mini:{text}")
    assert status == 1 and f"mini:{text}: " in told and message in told
    status, told = main("merge", "--base", "mini", "--lorad", f"no.safetensors:{text}", "-o", "m.safetensors")
    assert status == 1 and message in told
    status, told = main("convert", "a", "-o", "b", "--to", "lora", "--base", "mini", "--rank", 2, f"--strength={text}")
    assert status == 2 and message in told


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("C:\\x.safetensors", ("C:\\x.safetensors", 1.0)),
        ("C:/x.safetensors", ("C:/x.safetensors", 1.0)),
        ("C:\\x.safetensors:0.5", ("C:\\x.safetensors", 0.5)),
        ("a:b.safetensors", ("a:b.safetensors", 1.0)),
        ("style: blue.safetensors", ("style: blue.safetensors", 1.0)),
        ("a:b.safetensors: 0.8 ", ("a:b.safetensors", 0.8)),
        ("x.safetensors:+.8", ("x.safetensors", 0.8)),
        ("x.safetensors:1e0", ("x.safetensors", 1.0)),
        ("x.safetensors:-100", ("x.safetensors", -100.0)),
        ("folder:name", ("folder:name", 1.0)),
    ],
)
def test_colons_of_paths_and_names_stay(entry: str, expected: tuple[str, float]) -> None:
    assert cli_tools.split_strength(entry) == expected


@pytest.mark.parametrize("entry", ["x.safetensors:0,8", "x.pth:", "C:\\x.SAFETENSORS:nan", "mini:a", "none:-", "there:1e30"])
def test_what_follows_a_file_has_to_be_a_strength(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    with pytest.raises(ValueError) as caught:
        cli_tools.split_strength(entry)
    assert str(caught.value).startswith(f"{entry}: the strength has to")


@pytest.fixture(scope="module")
def made() -> LoRaD:
    return random_lorad(unet(SMALL), seed=1)


@pytest.mark.parametrize(
    "strength",
    [math.nan, math.inf, -math.inf, 1e30, 10**400, 101, "0,8", "", True, None, [1.0]],
    ids=lambda value: repr(value)[:20],
)
def test_python_callers_are_told_too(strength: Any, made: LoRaD) -> None:
    network: Any = unet(SMALL)
    for use in (
        lambda: fuse(network, [(made, strength)]),
        lambda: made.apply_to(network, strength),
        lambda: load_adapters(made, strength),
        lambda: factors_by_layer(network, [(made, strength)]),
    ):
        with pytest.raises(ValueError, match="the strength has to"):
            use()


@pytest.mark.parametrize("strength", [0.5, 1, -2, np.float32(0.5), np.float64(0.5), np.int64(2), "0.5", 100])
def test_numbers_of_all_kinds_are_strengths(strength: Any, made: LoRaD) -> None:
    number = entries.strength(strength)
    assert number == float(strength) and type(number) is float
    assert load_adapters(made, strength)[0][1].strength == number
    if not isinstance(strength, str):
        assert load_adapters((made, strength))[0][1].strength == number


# Other numbers, and where things are written

LONG = "x" * 300
REFUSED = {
    "seed below": (["--seed", -1], 1, "seed must lie from 0 to"),
    "seed above": (["--seed", 2**64], 1, "seed must lie from 0 to"),
    "seed no number": (["--seed", "x"], 2, "--seed: 'x' is no decimal number"),
    "seed with a fraction": (["--seed", "1.5"], 2, "--seed: '1.5' is no whole number"),
    "seed endless": (["--seed", "9" * 5000], 2, "is no decimal number"),
    "width 0": (["--width", 0], 1, "width must lie from 64 to 8192, not 0"),
    "width below 0": (["--width", -8], 1, "width must lie from 64 to 8192, not -8"),
    "width odd": (["--width", 100], 1, "width must be divisible by 8, not 100: try 96 or 104"),
    "height absurd": (["--height", "1e9"], 1, "height must lie from 64 to 8192"),
    "batch 0": (["--batch", 0], 1, "batch must be at least 1, not 0"),
    "batch nan": (["--batch", "nan"], 2, "--batch: 'nan' is no decimal number"),
    "alpha 0": (["--alpha-T-squared", 0], 1, "alpha_T_squared must lie from 1e-08 to below 1, not 0"),
    "alpha 1": (["--alpha-T-squared", 1], 1, "alpha_T_squared must lie from 1e-08 to below 1, not 1"),
    "alpha tiny": (["--alpha-T-squared", "1e-12"], 1, "alpha_T_squared must lie from 1e-08 to below 1, not 1e-12"),
    "alpha nan": (["--alpha-T-squared", "nan"], 2, "--alpha-T-squared: 'nan' is no decimal number"),
    "control scale inf": (["--control", "c", "--control-image", "i", "--control-scale", "inf"], 2, "'inf' is no decimal"),
    "control scale 99": (["--control", "c", "--control-image", "i", "--control-scale", 99], 1, "must lie from 0 to 4, not 99"),
    "output of 300 letters": (["-o", f"{LONG}.png"], 1, "cannot be written: a name of more than 255 bytes"),
    "output in a folder of 300 letters": (["-o", f"new/{LONG}/p.png"], 1, "a name of more than 255 bytes"),
    "output a folder": (["-o", "folder.png"], 1, "this is a folder"),
    "output below a file": (["-o", "file/p.png"], 1, "is not a folder"),
    "sheet of 300 letters": (["--sheet", f"{LONG}.png"], 1, "a name of more than 255 bytes"),
    "numbered output one letter too long": (["another", "-o", f"{'x' * 247}.png"], 1, "a name of more than 255 bytes"),
}


@pytest.mark.parametrize(("options", "status", "message"), REFUSED.values(), ids=REFUSED)
def test_options_of_generate_that_make_no_sense(options: list, status: int, message: str, main: Main) -> None:
    Path("folder.png").mkdir()
    Path("file").touch()
    assert (found := main("generate", "a cat", *options, *(() if "-o" in options else ("-o", "p.png"))))[
        0
    ] == status and message in found[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "--base", "mini", "--lorad", "mini", "-o", f"{LONG}.safetensors"], "File name too long"),
        (["merge", "--base", "mini", "--lorad", "mini", "-o", "no/m.safetensors"], "the folder does not exist"),
        (["convert", "none", "-o", LONG, "--to", "factors"], "File name too long"),
        (["preprocess", "none.png", "-o", f"{LONG}.png", "--kind", "canny"], "a name of more than 255 bytes"),
        (["extract", "--base", "a", "--student", "b", "-o", "c", "--energy", "nan"], "'nan' is no decimal number"),
        (["inspect", LONG], "File name too long"),
        (["inspect", ""], "this is a folder, a file is needed"),
    ],
    ids=[
        "merge, long",
        "merge, no folder",
        "convert, long",
        "preprocess, long",
        "energy nan",
        "inspect, long",
        "inspect, none",
    ],
)
def test_other_commands_refuse_as_early(arguments: list[str], message: str, main: Main) -> None:
    status, told = main(*arguments)
    assert status in (1, 2) and message in told


def test_where_a_file_cannot_be_written_is_found_out_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a.png")
    check_output(tmp_path / "a.safetensors", [])
    check_writable(tmp_path / "new" / "a.png", makes_folders=True)
    with pytest.raises(OSError, match="the folder does not exist"):
        check_writable(tmp_path / "new" / "a.png")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", read_only)
    for check in (check_writable, lambda path: check_output(path, [])):
        with pytest.raises(OSError, match="cannot be written: Read-only file system"):
            check(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_linked_folders_are_followed_each_once(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    (root / "sub").mkdir(parents=True)
    for file in (root / "b.safetensors", root / "sub" / "A.SAFETENSORS", other / "deep" / "c.safetensors", root / "d.txt"):
        file.touch()
    (root / "linked").symlink_to(other, target_is_directory=True)
    (other / "back").symlink_to(root, target_is_directory=True)  # a circle
    (root / "broken").symlink_to(tmp_path / "nowhere", target_is_directory=True)
    found = [path.relative_to(root).as_posix() for path in files_below(root, ".safetensors")]
    assert found == ["b.safetensors", "linked/deep/c.safetensors", "sub/A.SAFETENSORS"]
    assert files_below(tmp_path / "nowhere", ".safetensors") == []
