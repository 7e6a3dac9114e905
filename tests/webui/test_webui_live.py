"""Drawing while typing, the get command from the panel, and cards' own pictures; the programs are stood in for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from test_webui_network import program
from webui_stand_ins import module, standing_in

from wadi_core import catalog, pictures
from wadi_core.settings import SAMPLER

UNCHANGED = "nothing changes"


class Generation:
    """The program's object for a generation."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)
        self.comments: dict[str, int] = {}

    def comment(self, sentence: str) -> None:
        self.comments[sentence] = 1

    def close(self) -> None:
        pass


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Any]:
    """The module, and what the program has drawn."""
    modules, _ = program(tmp_path)
    drawn: list[Any] = []
    package = modules["modules"]
    command_line = SimpleNamespace(no_prompt_history=False, disable_console_progressbars=False, no_gradio_queue=False)
    package.shared.cmd_opts = command_line
    package.shared.state = SimpleNamespace(begin=lambda job: None, end=lambda: None, job="", job_count=0)
    package.shared.prompt_styles = SimpleNamespace(apply_styles_to_prompt=lambda prompt, styles: ", ".join([prompt, *styles]))

    def process(p: Any) -> Any:
        drawn.append(SimpleNamespace(p=p, quiet=vars(command_line).copy()))
        return SimpleNamespace(images=[Image.new("RGB", (p.width, p.height))])

    processing = module("modules.processing", StableDiffusionProcessingTxt2Img=Generation, process_images=process)
    queue = module("modules.call_queue", queue_lock=threading.Lock())
    package.processing, package.call_queue = processing, queue
    modules |= {"modules.processing": processing, "modules.call_queue": queue}
    package.ui_extra_networks = module("modules.ui_extra_networks")
    modules |= {"gradio": module("gradio", update=lambda **changes: changes or UNCHANGED)}
    with standing_in(modules) as extension:
        yield SimpleNamespace(
            module=extension("live"), drawn=drawn, lock=queue.queue_lock, extension=extension, command_line=command_line
        )


def asked(live: Any, newest: Any, prompt: str = "a cat", on: bool = True, seed: Any = 7, **changes: Any) -> Any:
    values = {"enabled": False, "name": "None", "strength": 1.0, "method": "off"} | changes
    return live.module.draw(newest, on, *values.values(), prompt, [], 16, 16, seed)


def test_off_nothing_is_drawn(live: Any) -> None:
    assert asked(live, live.module.Newest(), on=False) == "" and live.drawn == []


def test_one_step_of_the_page_and_nothing_is_kept(live: Any) -> None:
    shown = asked(live, live.module.Newest())
    assert 'src="data:image/jpeg;base64,' in shown and "seed 7" in shown
    (one,) = live.drawn
    assert (one.p.sampler_name, one.p.steps, one.p.seed, one.p.prompt) == (SAMPLER, 1, 7, "a cat")
    assert one.p.do_not_save_samples and one.p.do_not_save_grid
    assert one.quiet["no_prompt_history"] and one.quiet["disable_console_progressbars"]
    assert not live.command_line.no_prompt_history and not live.command_line.disable_console_progressbars
    assert live.lock.acquire(blocking=False)


@pytest.mark.parametrize(("seed", "used"), [(-1, 1), ("-1", 1), ("", 1), (None, 1), (5.0, 5), ("12", 12), ("much", 1)])
def test_a_seed_left_to_chance_is_a_fixed_one(live: Any, seed: Any, used: int) -> None:
    asked(live, live.module.Newest(), seed=seed)
    assert live.drawn[0].p.seed == used


def test_of_many_the_newest_alone_is_drawn(live: Any) -> None:
    newest, other = live.module.Newest(), live.module.Newest()
    before, answers = dict(live.module.COUNTS), {}
    threads = []

    def answered(page: Any, prompt: str) -> None:
        answers[prompt] = asked(live, page, prompt)

    with live.lock:  # somebody draws
        for page, prompts in ((newest, ["a", "a c", "a cat"]), (other, ["a dog"])):
            for prompt in prompts:
                threads.append(threading.Thread(target=answered, args=(page, prompt)))
                threads[-1].start()
                while page.number < prompts.index(prompt) + 1:
                    time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert sorted(one.p.prompt for one in live.drawn) == ["a cat", "a dog"]
    assert answers["a"] == answers["a c"] == UNCHANGED and "<img" in answers["a cat"]
    after = live.module.COUNTS
    assert {name: after[name] - before[name] for name in after} == {"asked": 4, "drawn": 2, "stale": 2}


def test_what_goes_wrong_is_a_sentence_in_its_place(live: Any) -> None:
    shown = asked(live, live.module.Newest(), enabled=True, name="a:b")
    assert "wadi-warning" in shown and "cannot hold" in shown and live.drawn == []
    assert live.lock.acquire(blocking=False)


def test_what_is_told_stands_below_the_picture(live: Any) -> None:
    assert "nowhere is left out" in asked(live, live.module.Newest(), "a <lorad:nowhere:1>")


# Get


def test_the_terms_are_shown_before(live: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    get = live.extension("get")
    assert "carries no licence" in get.licence_note() and "GB are fetched" in get.licence_note()
    (tmp_path / "wrong.json").write_text("[")
    monkeypatch.setenv(catalog.VARIABLE, str(tmp_path / "wrong.json"))
    assert "this is no JSON" in get.licence_note() and get.file_name() is None


def test_the_commands_own_sentence_is_the_result(live: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text("[")
    get = live.extension("get")
    monkeypatch.setenv(catalog.VARIABLE, str(tmp_path / "wrong.json"))
    *_, last = get.get()
    assert last.startswith("⚠ ") and "this is no JSON" in last and "error:" not in last


# Cards


def test_a_cards_picture_comes_from_the_file(live: Any) -> None:
    page = live.extension("page")
    picture = pictures.thumbnail(Image.new("RGB", (9, 9)))
    assert page.thumbnail({"modelspec.thumbnail": picture}) == picture
    wrong = ["javascript:alert(1)", 'data:image/png;base64,"onload=', "data:text/html;base64,AAAA", picture + "A" * 400_000, 7]
    assert [page.thumbnail({"modelspec.thumbnail": one}) for one in wrong] == [None] * len(wrong)
    assert page.thumbnail({}) is None
