"""Prompts on the command line: from files of every kind, from arguments of any bytes, and what is said of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline_kit import Kit

from trainer.data.prompts import PromptList
from wadi_core import cli, pictures

ROOT = Path(__file__).resolve().parents[2]
Generate = Callable[..., tuple[int, str]]


@pytest.fixture
def generate(sd15: Kit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Generate:
    """Runs ``generate`` with a small base; returns the status and what was said of errors."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(*words: object, base: Path = sd15.folder, lorad: Path = sd15.lorad) -> tuple[int, str]:
        with warnings.catch_warnings():
            try:
                status = cli.main(["generate", *map(str, words), "--base", str(base), "--lorad", str(lorad)])
            except SystemExit as end:
                status = int(end.code or 0)
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("a.txt", "a red apple\u2028on a table\na cat\x85sleeping\na dog\x0crunning\n".encode(), None),
        ("a.csv", b"\xef\xbb\xbfid;Prompt\r\n1;a red apple on a table\r\n2;a cat sleeping\r\n3;a dog running\r\n", None),
        ("a.jsonl", b'{"x": "a red apple on a table"}\n{"x": "a cat sleeping"}\n{"x": "a dog running"}\n', "x"),
        ("a.json", b'["a red apple on a table", "a cat sleeping", "a dog running"]', None),
    ],
    ids=["line-separators", "csv", "jsonl-field", "json"],
)
def test_a_file_has_the_prompts_that_the_trainer_reads(
    generate: Generate, tmp_path: Path, name: str, content: bytes, field: str | None
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    more = ["--prompt-field", field] if field else []
    status, _ = generate("--prompts", path, *more, "-o", tmp_path / "p.png", "--batch", 3)
    assert status == 0
    said = [pictures.read_settings(made).prompt for made in sorted(tmp_path.glob("p-*.png"))]
    assert said == ["a red apple on a table", "a cat sleeping", "a dog running"] == list(PromptList.read(path, field))


def test_what_a_prompt_file_leaves_out_is_told(generate: Generate, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"caption": "a cat"}\n{"caption": null}\n')
    told = f"wadi: warning: {path}: 1 of its entries hold no text and are left out: line 2\n"
    assert generate("--prompts", path, "-o", tmp_path / "p.png") == (0, told)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "{folder}/a.csv"], "a.csv: line 2 has 3 cells, and the first row has 2: a prompt that holds ','"),
        (["--prompts", "{folder}/a.csv", "--prompt-field", "x"], "there is no column 'x'; there are: id, prompt"),
        (["--prompts", "{folder}/latin.txt"], "latin.txt: line 1 is no UTF-8 text: save the file as UTF-8"),
        (["--prompts", "{folder}/none.txt"], "none.txt: there is no such file"),
        (["--prompts", "{folder}/empty"], "there is no prompt in this folder"),
        (["a cat", "caf\udce9"], "prompt is no valid text: 'caf\\udce9' holds a byte or sign"),
        (["\ud83d"], "prompt is no valid text"),
    ],
)
def test_what_is_wrong_is_one_line(generate: Generate, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "a.csv").write_text("id,prompt\n1,a cat, asleep\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty").mkdir()
    status, error = generate(*(word.format(folder=tmp_path) for word in words), "-o", tmp_path / "p.png")
    assert status == 1 and error.startswith("wadi: error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_a_field_without_a_file_is_bad_usage(generate: Generate, tmp_path: Path) -> None:
    status, error = generate("a cat", "--prompt-field", "x", "-o", tmp_path / "p.png")
    assert status == 2 and "--prompt-field belongs to --prompts" in error and error.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="arguments are Unicode there")
def test_an_argument_of_bytes_that_are_no_text_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wadi_core", "generate", b"caf\xe9", "-o", str(tmp_path / "x.png")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.startswith("wadi: error: prompt is no valid text") and not ended.stdout
    assert ended.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
def test_names_of_bytes_that_are_no_text_are_files_like_others(generate: Generate, sd15: Kit, tmp_path: Path) -> None:
    base, lorad = tmp_path / "caf\udce9", tmp_path / "caf\udce9.safetensors"
    shutil.copytree(sd15.folder, base)
    lorad.write_bytes(sd15.lorad.read_bytes())
    status, _ = generate("a cat", "-o", tmp_path / "p\udce9.png", base=base, lorad=lorad)
    assert status == 0
    said = pictures.read_settings(tmp_path / "p\udce9.png")
    assert (said.prompt, said.base, said.lorad[0].file) == ("a cat", "caf\\udce9", "caf\\udce9.safetensors")
