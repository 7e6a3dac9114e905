"""Figures while a run trains: what they are, the best so far, when they end a run, and that they change nothing of it."""

from __future__ import annotations

import csv
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finetuning_runs import write_pictures
from PIL import Image
from training import tiny

from trainer import export as export_script
from trainer.data import picture_files
from trainer.distill.distillation import Distillation
from trainer.distill.roles import STUDENT
from trainer.distill.session import DistillationSession, train
from trainer.distill.validation import FIRST_SEED, Validation
from trainer.engine.checkpoints import read_checkpoint
from trainer.evaluation.extractors import find
from trainer.evaluation.metrics import frechet, kid
from trainer.mini import scenes
from trainer.mini.reference import MINI_PROMPTS, MINI_SINGLE
from wadi_core import LoRaD

EXTRACTOR = "test_validation:corners"
MEASURED = {"evaluate_every": 2, "evaluate_count": 4, "extractor": EXTRACTOR, "prompt_field": ""}


def corners() -> object:
    """An extractor whose features are the means of a picture's channels and its upper half."""
    return lambda pictures: torch.cat([pictures.mean(dim=(2, 3)), pictures[:, :, :32].mean(dim=(2, 3))], 1)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("real") / "pictures", count=6)


def rows(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_a_run_is_measured_and_trains_the_same(base: Path, prompts: Path, real: Path, tmp_path: Path) -> None:
    plain = tiny(base, prompts, tmp_path / "plain", steps=4)
    measured = tiny(base, prompts, tmp_path / "measured", steps=4, reference=str(real), sheet_teacher_steps=2, **MEASURED)
    for config in (plain, measured):
        train(config)
    one, other = (read_checkpoint(tmp_path / name / "step-00000004.pt") for name in ("plain", "measured"))
    assert all(torch.equal(one[part][name], other[part][name]) for part in (STUDENT, "average") for name in one[part])
    table = rows(tmp_path / "measured" / "metrics.csv")
    assert [row["step"] for row in table] == [2, 4]

    run = Distillation(measured)
    run.load_state(other)
    made = run.pictures([run.prompts.prompts[row] for row in range(4)], range(FIRST_SEED, FIRST_SEED + 4))
    look = find(EXTRACTOR, torch.device("cpu")).look
    features = look(picture_files.to_bytes(made), range(4)).numpy()
    known = look(picture_files.to_bytes([picture_files.load(real / f"{n}.png", 64) for n in range(6)]), range(6)).numpy()
    assert table[-1]["fid"] == pytest.approx(frechet(features, known), rel=1e-5)
    assert table[-1]["kid"] == pytest.approx(kid(features, known)[0], rel=1e-4, abs=1e-6)
    assert table[-1]["diversity"] > 0

    best = json.loads((tmp_path / "measured" / "best.json").read_text())
    lowest = min(table, key=lambda row: row["fid"])
    assert (best["step"], best["name"], best["value"]) == (lowest["step"], "fid", lowest["fid"])
    kept = LoRaD.load(tmp_path / "measured" / "one-step-best.safetensors")
    wanted = LoRaD.load(tmp_path / "measured" / f"one-step-step-{int(lowest['step']):08d}.safetensors")
    assert all(torch.equal(x, y) for key in kept.factors for x, y in zip(kept.factors[key], wanted.factors[key], strict=True))


def test_a_run_that_gets_no_better_ends(
    base: Path, prompts: Path, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([5.0, 3.0, 4.0, 3.5, 1.0])
    monkeypatch.setattr(Validation, "measure", lambda self: {"fid": next(figures)})
    config = tiny(base, prompts, tmp_path, steps=20, reference=str(real), patience=2, **{**MEASURED, "evaluate_every": 1})
    assert train(config) == tmp_path / "one-step.safetensors"
    assert read_checkpoint(sorted(tmp_path.glob("step-*.pt"))[-1])["step"] == 4
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2
    train(config)  # started again it is over already
    assert [row["fid"] for row in rows(tmp_path / "metrics.csv")] == [5.0, 3.0, 4.0, 3.5]


def test_each_checkpoint_has_its_lorad_and_can_be_written_again(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(base, prompts, tmp_path, steps=6, save_every=2, keep_last=2, sheet_teacher_steps=0))
    names = {path.name for path in tmp_path.glob("one-step-step-*.safetensors")}
    assert names == {"one-step-step-00000004.safetensors", "one-step-step-00000006.safetensors"}
    written = tmp_path / "again.safetensors"
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path), "4", "-o", str(written)])
    assert export_script.main() == 0 and capsys.readouterr().out == f"{written}\n"
    one, other = LoRaD.load(written), LoRaD.load(tmp_path / "one-step-step-00000004.safetensors")
    assert one.one_step == other.one_step and one.metadata.base_sha256 == other.metadata.base_sha256
    assert all(torch.equal(x, y) for key in one.factors for x, y in zip(one.factors[key], other.factors[key], strict=True))
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path), "5"])
    assert export_script.main() == 1
    assert capsys.readouterr().err.endswith("there is no checkpoint of step 5; there are those of 4, 6\n")


def test_a_sheet_has_captions_a_teacher_and_prompts_of_ones_own(base: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a green cat\na blue dog\n")
    config = tiny(base, prompts, tmp_path / "run", sheet_prompts=str(tmp_path / "mine.txt"), sheet_teacher_steps=2)
    (tmp_path / "run").mkdir()
    session = DistillationSession(Distillation(config))
    sheet = session.sheet()
    assert session.prompts == ["a green cat", "a blue dog"]
    assert sheet.size == (194 + 3 * (64 + 4), 26 + 2 * (64 + 4))  # captions, three columns; titles, two rows
    pixels = np.asarray(sheet)
    (first,) = session.run.teacher_pictures(["a green cat"], [0], 2)
    assert np.array_equal(pixels[26 : 26 + 64, 194 : 194 + 64], np.asarray(first))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "evaluate_every: there is nothing to measure with"),
        ({"reference": "REAL", "evaluate_count": 500}, "evaluate_count: 500 pictures are asked for, and there are 4 prompts"),
    ],
)
def test_what_cannot_be_measured_is_told_first(
    base: Path, prompts: Path, real: Path, tmp_path: Path, changes: dict, told: str
) -> None:
    changes = {key: str(real) if value == "REAL" else value for key, value in changes.items()}
    with pytest.raises(ValueError, match=told):
        Validation(Distillation(tiny(base, prompts, tmp_path, **{**MEASURED, **changes})))


def test_a_web_hook_is_told(base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802 - the name that the server looks for
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HOOK_OF_TEST", f"http://127.0.0.1:{server.server_port}/x")
    train(tiny(base, prompts, tmp_path / "run", steps=1, webhook="$HOOK_OF_TEST", sheet_teacher_steps=0))
    with pytest.raises(OSError):
        train(tiny(tmp_path / "nowhere", prompts, tmp_path / "other", webhook="$HOOK_OF_TEST"))
    server.shutdown()
    server.server_close()
    assert told[0]["text"] == told[0]["content"] == "run: finished, step 1 of 1" and told[0]["steps"] == 1
    assert told[1]["text"].startswith("other: ended with an error: ")
    assert "HOOK_OF_TEST" in (tmp_path / "run" / "config.yaml").read_text()
    train(tiny(base, prompts, tmp_path / "run", steps=2, webhook="$HOOK_OF_TEST", sheet_teacher_steps=0))  # nobody listens
    assert len(told) == 2


def coarse() -> object:
    """An extractor whose features are a picture in coarse squares."""
    return lambda pictures: torch.nn.functional.adaptive_avg_pool2d(pictures, 10).flatten(1)


@pytest.mark.parametrize("shows_them", [True, False])
def test_objects_of_mini_are_found_where_they_are(tmp_path: Path, shows_them: bool) -> None:
    things = scenes.things()
    plans = {scenes.scene(MINI_PROMPTS + row).caption: scenes.scene(MINI_PROMPTS + row) for row in range(60)}

    def pictures(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        """A student that shows each object as its real pictures do, or one that shows nothing."""
        made = []
        for prompt in prompts:
            index = plans[prompt].placed[0].thing.index
            real = scenes.draw(scenes.scene(MINI_SINGLE + index, pair=False, only=things[index]))
            made.append(real if shows_them else Image.new("RGB", real.size, "white"))
        return made

    config = tiny("mini", "mini", tmp_path, evaluate_every=1, evaluate_count=60, extractor="test_validation:coarse")
    processes = SimpleNamespace(first=True, rank=0, count=1, gather=lambda value: [value])
    run = SimpleNamespace(config=config, processes=processes, output=tmp_path, step=0, size=(128, 128),
                          device=torch.device("cpu"), pictures=pictures)  # fmt: skip
    found = Validation(run).measure()
    assert {"fid", "kid", "diversity", "retrieval_single", "retrieval_both"} <= set(found)
    if shows_them:
        assert found["retrieval_single"] > 0.9 and found["retrieval_both"] < 0.5  # of two objects it shows the first
    else:
        assert found["retrieval_single"] < 0.1 and found["diversity"] == pytest.approx(0, abs=1e-6)
