"""Prompts in memory and in their order, the list that ships, and embeddings that are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import starter
from trainer.data.prompts import PromptList, Prompts
from trainer.data.random_draws import PROMPTS, shuffled, uniform64
from trainer.distill.embedding_cache import EmbeddingCache
from trainer.mini.captions import SceneCaptions
from wadi_core import configs

ROOT = Path(__file__).parents[2]
EIGHT = [7, 3, 2, 0, 6, 1, 5, 4], [4, 2, 5, 3, 6, 7, 0, 1]
FOUR = ["a cat", "a dog on a sofa", "ein grünes Haus", "a red apple, macro photograph"]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# ---------------------------------------------------------------- the list


def test_a_list_is_what_was_put_in(tmp_path: Path) -> None:
    prompts = PromptList.read(write_lines(tmp_path / "a.txt", FOUR))
    assert list(prompts) == FOUR and len(prompts) == 4
    assert [prompts[row] for row in (3, 0, 3)] == [FOUR[3], FOUR[0], FOUR[3]]
    for row in (4, -1):
        with pytest.raises(IndexError):
            prompts[row]


def test_a_list_tells_where_prompts_end() -> None:
    digests = {PromptList(lines).digest for lines in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", ""])}
    assert len(digests) == 5 and PromptList(iter(["ab", "c"])).digest in digests


def test_no_home_is_needed(tmp_path: Path) -> None:
    """As in a container whose user is in no list of users."""
    write_lines(tmp_path / "one.txt", FOUR)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    for name in ("HOME", "USERPROFILE", "HOMEDRIVE", "HOMEPATH", "LOCALAPPDATA"):
        environment.pop(name, None)
    command = [sys.executable, "-c", NO_HOME, str(ROOT), str(tmp_path / "one.txt")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.strip() == ascii(FOUR)
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


NO_HOME = """
import sys
sys.path.insert(0, sys.argv[1])
try:
    import pwd
    def nobody(user):
        raise KeyError("uid not found")
    pwd.getpwuid = nobody
except ImportError:
    pass
from trainer.data.prompts import Prompts
print(ascii(list(Prompts(sys.argv[2], 0).prompts)))
"""


# ---------------------------------------------------------------- the order


@given(count=st.integers(1, 300), seed=st.integers(0, 2**63 - 1), time=st.integers(0, 2**40))
def test_a_shuffle_is_a_permutation(count: int, seed: int, time: int) -> None:
    assert sorted(shuffled(count, seed, 1, time)) == list(range(count))


def test_shuffles_are_the_same_on_every_machine() -> None:
    """The bits of Philox, which numpy keeps as they are."""
    assert shuffled(8, 0, PROMPTS).tolist() == EIGHT[0]
    assert shuffled(8, 2**63 - 1, PROMPTS, 3).tolist() == EIGHT[1]


def test_shuffles_are_evenly_spread() -> None:
    orders = Counter(tuple(shuffled(4, seed, 1)) for seed in range(4800))
    assert len(orders) == 24 and min(orders.values()) > 140 and max(orders.values()) < 260
    far = torch.from_numpy(shuffled(1_400_000, 7, 1)[:3000] / 1_400_000)
    assert abs(far.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([far[:-1], far[1:]]))[0, 1]) < 0.06


def test_shuffles_differ_by_seed_purpose_and_time() -> None:
    keys = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (2**32, 1, 0)]
    assert len({tuple(shuffled(50, *key)) for key in keys}) == len(keys)


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
    drawn = SceneCaptions() if source == "mini" else None
    one = Prompts(path, 5, drawn=drawn)
    before = one.take(7)
    state = json.loads(json.dumps(one.state()))
    assert len(json.dumps(state)) < 200
    other = Prompts(path, 0, drawn=drawn)
    other.load_state(state)
    assert one.take(9) == other.take(9) == Prompts(path, 5, drawn=drawn).at(range(7, 16))
    assert before == Prompts(path, 5, drawn=drawn).take(7)


def test_a_stream_of_other_prompts_is_refused(tmp_path: Path) -> None:
    state = Prompts(write_lines(tmp_path / "a.txt", FOUR), 0).state()
    with pytest.raises(ValueError, match="not those that this run began with"):
        Prompts(write_lines(tmp_path / "b.txt", FOUR[1:]), 0).load_state(state)


def test_a_stream_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    """Its prompts came in another order, and a run that went on would see some twice and some never."""
    prompts = Prompts(write_lines(tmp_path / "a.txt", FOUR), 0)
    state = {name: value for name, value in prompts.state().items() if name != "order"}
    with pytest.raises(ValueError, match="another version of this trainer, which shuffled otherwise: finish it with"):
        prompts.load_state(state)
    scenes = Prompts("mini", 0, drawn=SceneCaptions())  # whose captions are not shuffled
    scenes.load_state({name: value for name, value in scenes.state().items() if name != "order"} | {"position": 3})
    assert scenes.position == 3


def test_ranks_take_other_samples(tmp_path: Path) -> None:
    """Each asks for its own numbers, and together they see what one process sees."""
    path = write_lines(tmp_path / "a.txt", [f"prompt {i}" for i in range(10)])
    alone = Prompts(path, 3).at(range(24))
    shares = [Prompts(path, 3).at(range(rank, 24, 2)) for rank in range(2)]
    assert [prompt for pair in zip(*shares, strict=True) for prompt in pair] == alone


def test_what_is_shown(tmp_path: Path) -> None:
    assert Prompts(write_lines(tmp_path / "a.txt", FOUR), 0).shown == tuple(FOUR)
    assert len(Prompts("starter", 0).shown) == len(Prompts("mini", 0, drawn=SceneCaptions()).shown) == 10


MANY = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from trainer.data.prompts import Prompts

def peak():
    kind = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kind / (1 << 20 if sys.platform == "darwin" else 1 << 10)

before, start = peak(), time.perf_counter()
prompts = Prompts(sys.argv[2], 0)
seconds = time.perf_counter() - start
taken = [prompt for _ in range(50) for prompt in prompts.take(128)]
assert len(set(taken)) == len(taken) == 6400
print(prompts.count, peak() - before, seconds)
"""


def test_a_million_prompts_take_little_memory(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    count = 1_400_000
    path = tmp_path / "many.txt"
    words = "a photograph of an old lighthouse on a rocky coast at dusk with a flock of birds"
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, count, 10_000):
            file.write("".join(f"{words}, number {i}\n" for i in range(start, start + 10_000)))
    command = [sys.executable, "-c", MANY, str(ROOT), str(path)]
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
    from trainer.data.starter_words import Kind

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
