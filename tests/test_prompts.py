"""Prompts out of every kind of file, their order, and how little of them is in memory."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer import starter
from trainer.embeddings import EmbeddingCache
from trainer.prompt_files import read_prompts, without_midjourney_settings
from trainer.prompt_table import PromptTable, cache_folder
from trainer.prompts import Prompts, Shuffle, uniform64
from wadi_core import configs

ROOT = Path(__file__).parents[1]
FOUR = ["a cat", "a dog on a sofa", "ein grünes Haus", "a red apple, macro photograph"]


def entry(prompt: str, caption: str = "what a person sees", image: str = "./000/a.jpg") -> dict:
    """An entry as JourneyDB's annotation files have them."""
    style = {"Style": "photo", "Content": "cat", "Atmosphere": "calm", "Others": ""}
    questions = {"Style Relevant Questions and Answers": [], "Content Relevant Questions and Answers": []}
    return {"img_path": image, "prompt": prompt, "Task1": style, "Task2": {"Caption": caption}, "Task3": questions}


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


# ---------------------------------------------------------------- files


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n  a dog   on a sofa \t\r\nein grünes Haus\n\na red apple, macro photograph".encode())
    assert list(read_prompts(path)) == FOUR


def test_json_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"id": i, "caption": text} for i, text in enumerate(FOUR)])
    assert list(read_prompts(path)) == FOUR
    path = write_lines(tmp_path / "b.ndjson", [json.dumps(FOUR[0]), *({"text": text} for text in FOUR[1:]), {"text": None}])
    assert list(read_prompts(path)) == FOUR
    path = write_lines(tmp_path / "c.jsonl", [{"caption": "no", "meta": {"long": text}} for text in FOUR])
    assert list(read_prompts(path, "meta.long")) == FOUR
    path = write_lines(tmp_path / "d.jsonl", [{"caption": "no", "Prompt": text} for text in FOUR])
    assert list(read_prompts(path)) == FOUR  # the prompt before the caption


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables(tmp_path: Path, ending: str, delimiter: str) -> None:
    rows = [["image", "Caption"], *([f"{i}.png", text] for i, text in enumerate(FOUR)), ["5.png"], []]
    path = write_rows(tmp_path / f"a.{ending}", rows, delimiter)
    assert list(read_prompts(path)) == FOUR
    assert list(read_prompts(path, "image")) == ["0.png", "1.png", "2.png", "3.png", "5.png"]
    bare = write_rows(tmp_path / f"b.{ending}", [[text] for text in ["a prompt\nof two lines", *FOUR]], delimiter)
    assert list(read_prompts(bare)) == ["a prompt of two lines", *FOUR]
    titled = write_rows(tmp_path / f"c.{ending}", [[text] for text in ["prompt", *FOUR]], delimiter)
    assert list(read_prompts(titled)) == FOUR


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": range(5), "text": [*FOUR, None], "other": list("abcde")}), path)
    assert list(read_prompts(path)) == FOUR
    assert list(read_prompts(path, "other")) == list("abcde")
    with pytest.raises(ValueError, match="there is no column 'none'; there are: id, text, other"):
        list(read_prompts(path, "none"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no whole Parquet file") as refused:
        list(read_prompts(path))
    assert "\n" not in str(refused.value)


def test_parquet_without_its_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"need the package pyarrow: python -m pip install pyarrow$"):
        list(read_prompts(tmp_path / "a.parquet"))


def test_a_folder_of_captions(tmp_path: Path) -> None:
    for name, text in {
        "b/2.txt": FOUR[2],
        "a/1.caption": "a dog\non a sofa\n",
        "a/0.txt": FOUR[0],
        "c.jsonl": '"one more"',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name in ("a/0.png", ".hidden.txt", "a/notes.md"):
        (tmp_path / name).write_text("nothing to read")
    assert list(read_prompts(tmp_path)) == ["one more", "a cat", "a dog on a sofa", "ein grünes Haus"]


def test_journeydb(tmp_path: Path) -> None:
    raw = ["https://s.mj.run/x1 a cat, cinematic --ar 16:9 --v 5", "a well-known dog \u2014ar 2:3", "a cat, cinematic --v 4"]
    path = write_lines(tmp_path / "train_anno.jsonl", [entry(text, f"caption {i}") for i, text in enumerate(raw)])
    assert list(read_prompts(path)) == ["a cat, cinematic", "a well-known dog", "a cat, cinematic"]
    assert list(read_prompts(path, "Task2.Caption")) == ["caption 0", "caption 1", "caption 2"]
    table = PromptTable.of(path, cache=tmp_path / "cache")  # a line for each picture of a prompt there, one prompt here
    assert table.read(range(table.count)) == ["a cat, cinematic", "a well-known dog"]
    assert without_midjourney_settings("--ar 1:1") == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\n\xff\xfe\n", "line 3 is no UTF-8 text"),
        ("a.txt", b"\n \n", "no prompt in this file"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b', "line 2 is not JSON"),
        ("a.jsonl", b'{"words": "a"}\n', "None is called prompt, caption, text; there are: words"),
        ("a.jsonl", b"[1]\n", "no prompt in this file"),
        ("a.csv", b"x,y\n1,2\n", "None is called prompt, caption, text; there are: x, y"),
        ("a.csv", b'prompt\n"never closed', "is not CSV"),
        ("a.jsonl.tgz", b"\x1f\x8b", "unpack it first"),
        ("a.docx", b"PK", "prompts are read from .txt, .jsonl"),
    ],
)
def test_unusable_files_are_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        PromptTable.of(tmp_path / name, cache=tmp_path / "cache")
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / name))


def test_missing_files_and_fields(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Prompts(tmp_path / "none.txt", 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no prompt in this folder"):
        Prompts(tmp_path / "empty", 0)
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "x"}])
    with pytest.raises(ValueError, match="no prompt in this file under 'caption'"):
        Prompts(path, 0, field="caption")
    (tmp_path / "blocked").write_text("a file where a folder should be made")
    with pytest.raises(OSError, match="set WADI_CACHE"):
        Prompts(path, 0, cache=tmp_path / "blocked" / "cache")


# ---------------------------------------------------------------- the table


def test_a_table_is_made_once_and_anew_for_another_source(tmp_path: Path) -> None:
    path, cache = write_lines(tmp_path / "a.txt", FOUR), tmp_path / "cache"
    first = PromptTable.of(path, cache=cache)
    made = first.path.stat().st_mtime_ns
    again = PromptTable.of(path, cache=cache)
    assert again == first and again.path.stat().st_mtime_ns == made
    assert again.read([3, 0, 3]) == [FOUR[3], FOUR[0], FOUR[3]]
    with pytest.raises(IndexError):
        again.read([4])
    write_lines(path, [*FOUR, "one more"])
    other = PromptTable.of(path, cache=cache)
    assert other.count == 5 and other.digest != first.digest
    assert first.read([0]) == ["a cat"]  # a run that began with the list before goes on with it
    first.path.write_bytes(first.path.read_bytes()[:-5])
    other.path.write_bytes(b"")
    assert PromptTable.of(path, cache=cache).count == 5


def test_a_table_tells_where_prompts_end(tmp_path: Path) -> None:
    digests = [
        PromptTable.of(write_lines(tmp_path / f"{i}.txt", lines)).digest for i, lines in enumerate([["ab", "c"], ["a", "bc"]])
    ]
    assert digests[0] != digests[1]
    assert list(cache_folder().glob("*.prompts"))


def test_text_that_is_none(tmp_path: Path) -> None:
    """JSON can hold half of a surrogate pair."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a \\ud800 cat"}')
    assert Prompts(path, 0, cache=tmp_path / "cache").take(1) == ["a ? cat"]


# ---------------------------------------------------------------- the order


@given(count=st.integers(1, 300), seed=st.integers(0, 2**63))
def test_a_shuffle_is_a_permutation(count: int, seed: int) -> None:
    assert sorted(map(Shuffle(count, seed), range(count))) == list(range(count))


def test_shuffles_are_evenly_spread() -> None:
    orders = Counter(tuple(map(Shuffle(4, seed), range(4))) for seed in range(4800))
    assert len(orders) == 24 and min(orders.values()) > 140 and max(orders.values()) < 260
    far = Shuffle(1_400_000, 7)
    places = torch.tensor([far(place) for place in range(3000)], dtype=torch.float64) / 1_400_000
    assert abs(places.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([places[:-1], places[1:]]))[0, 1]) < 0.06


def test_hashes_are_the_published_ones() -> None:
    """The generator that Java and others use, at seed 0."""
    assert uniform64(0) == 0xE220A8397B1DCDAF
    assert uniform64(1, 2) != uniform64(2, 1)
    assert uniform64(-1) == uniform64(2**64 - 1)


def test_each_round_brings_every_prompt_once_in_another_order(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt", [f"prompt {i}" for i in range(50)])
    rounds = [Prompts(path, 3).at(range(start, start + 50)) for start in (0, 50, 100)]
    assert all(sorted(one) == sorted(rounds[0]) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 3
    assert Prompts(path, 4).take(50) != rounds[0] and Prompts(path, 3).take(50) == rounds[0]


@pytest.mark.parametrize("source", ["file", "mini", "starter"])
def test_a_stream_goes_on_where_it_was(tmp_path: Path, source: str) -> None:
    path = write_lines(tmp_path / "a.txt", FOUR) if source == "file" else source
    one = Prompts(path, 5)
    before = one.take(7)
    state = json.loads(json.dumps(one.state()))
    assert len(json.dumps(state)) < 200
    other = Prompts(path, 0)
    other.load_state(state)
    assert one.take(9) == other.take(9) == Prompts(path, 5).at(range(7, 16))
    assert before == Prompts(path, 5).take(7)


def test_a_stream_of_other_prompts_is_refused(tmp_path: Path) -> None:
    state = Prompts(write_lines(tmp_path / "a.txt", FOUR), 0).state()
    with pytest.raises(ValueError, match="not those that this run began with"):
        Prompts(write_lines(tmp_path / "b.txt", FOUR[1:]), 0).load_state(state)


def test_what_is_shown(tmp_path: Path) -> None:
    assert Prompts(write_lines(tmp_path / "a.txt", FOUR), 0).shown == tuple(FOUR)
    assert len(Prompts("starter", 0).shown) == len(Prompts("mini", 0).shown) == 10


MANY = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from trainer.prompts import Prompts

def peak():
    kind = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kind / (1 << 20 if sys.platform == "darwin" else 1 << 10)

before, start = peak(), time.perf_counter()
prompts = Prompts(sys.argv[2], 0, cache=sys.argv[3])
seconds = time.perf_counter() - start
taken = [prompt for _ in range(50) for prompt in prompts.take(128)]
assert len(set(taken)) == len(taken) == 6400
print(prompts.count, peak() - before, seconds)
"""


def test_a_million_prompts_take_no_memory(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    count = 1_400_000
    path = tmp_path / "many.txt"
    words = "a photograph of an old lighthouse on a rocky coast at dusk with a flock of birds"
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, count, 10_000):
            file.write("".join(f"{words}, number {i}\n" for i in range(start, start + 10_000)))
    command = [sys.executable, "-c", MANY, str(ROOT), str(path), str(tmp_path / "cache")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    found, growth, _ = ended.stdout.split()
    assert int(found) == count
    assert float(growth) < 300  # MB


# ---------------------------------------------------------------- the list that ships


def test_the_starter_list_is_what_its_script_writes() -> None:
    assert starter.OUTPUT.read_text(encoding="utf-8").splitlines() == starter.starter_prompts()


def test_the_starter_list_is_long_varied_and_fits_the_text_encoder() -> None:
    from transformers import CLIPTokenizer

    lines = starter.OUTPUT.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2000
    assert len({line.lower().strip(" .") for line in lines}) == 2000
    assert all(line == " ".join(line.split()) and not set(line) & set("{}@;_") for line in lines)
    tokenizer = CLIPTokenizer.from_pretrained(configs.TOKENIZER)
    lengths = torch.tensor([len(ids) for ids in tokenizer(lines).input_ids])
    assert lengths.max() <= 77
    assert lengths.min() > 4 and lengths.double().std() > 5  # short ones and long ones
    starts = Counter(" ".join(line.split()[:3]).lower() for line in lines)
    assert starts.most_common(1)[0][1] < 60
    assert len({word for line in lines for word in line.lower().replace(",", "").split()}) > 1200


def test_articles() -> None:
    assert (
        starter.with_articles("@ owl and @ unicorn, @ hourglass and @ used car")
        == "an owl and a unicorn, an hourglass and a used car"
    )
    assert starter.with_articles("@ old man is reading.") == "An old man is reading."


def test_words_that_do_not_suffice_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.starter_words import Kind

    monkeypatch.setattr(starter, "KINDS", (Kind("few", 3, "a {thing}", {"thing": "cup; jug"}),))
    with pytest.raises(ValueError, match="few: the words yield no more than 2"):
        starter.starter_prompts()
    monkeypatch.setattr(starter, "KINDS", (Kind("open", 1, "a {nothing}"),))
    with pytest.raises(ValueError, match="no words are given for {nothing}"):
        starter.starter_prompts()


# ---------------------------------------------------------------- embeddings


def encoder(calls: list[list[str]]):
    def encode(prompts: list[str]) -> dict[str, torch.Tensor]:
        calls.append(prompts)
        text = torch.stack([torch.full((3, 4), float(len(prompt))) for prompt in prompts]).half()
        return {"text": text, "mask": torch.ones(len(prompts), 3, dtype=torch.int64)}

    return encode


def test_each_prompt_is_encoded_once(tmp_path: Path) -> None:
    calls: list[list[str]] = []
    cache = EmbeddingCache(tmp_path, "one encoder")
    first = cache.encode(["a", "bb", "a"], encoder(calls))
    again = EmbeddingCache(tmp_path, "one encoder").encode(["bb", "ccc", "a"], encoder(calls))
    assert calls == [["a", "bb"], ["ccc"]]
    assert first["text"].shape == (3, 3, 4) and first["text"].dtype == torch.float16
    assert first["mask"].dtype == torch.int64
    assert first["text"][:, 0, 0].tolist() == [1, 2, 1] and again["text"][:, 0, 0].tolist() == [2, 3, 1]
    EmbeddingCache(tmp_path, "another encoder").encode(["a"], encoder(calls))
    assert calls[2:] == [["a"]]
    with pytest.raises(ValueError, match="no prompt to encode"):
        cache.encode([], encoder(calls))


def test_a_damaged_embedding_is_made_anew(tmp_path: Path) -> None:
    calls: list[list[str]] = []
    cache = EmbeddingCache(tmp_path, "x")
    before = cache.encode(["a", "bb"], encoder(calls))
    (path, *_) = sorted(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    after = cache.encode(["a", "bb"], encoder(calls))
    assert torch.equal(before["text"], after["text"]) and len(calls[1]) == 1
    assert len(cache.encode(["a", "bb"], encoder(calls))["text"]) == 2 and len(calls) == 2
