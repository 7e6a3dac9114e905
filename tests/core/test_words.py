"""Learned words in prompts: in any letter case, however they are composed, and where one holds another."""

from __future__ import annotations

import unicodedata
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from trainer.finetune.steering import content_words
from wadi_core import configs
from wadi_core.embeddings import Embedding, Vocabulary
from wadi_core.words import Match, Words, fold

FOUND = [
    # id, words, text, what of it is found
    ("plain", ["kedi"], "a kedi", ["kedi"]),
    ("upper-case", ["kedi"], "a KEDI, asleep", ["KEDI"]),
    ("dotted-capital", ["kedi"], "a KED\u0130", ["KED\u0130"]),
    ("dotless-small", ["kedi"], "a ked\u0131", ["ked\u0131"]),
    ("dotted-capital-decomposed", ["kedi"], "a KEDI\u0307", ["KEDI\u0307"]),
    ("long-s", ["<sks>"], "a <\u017fks> dog", ["<\u017fks>"]),
    ("kelvin", ["kit"], "\u212aIT", ["\u212aIT"]),
    ("word-with-a-dotted-capital", ["\u0130stanbul"], "istanbul ISTANBUL \u0131stanbul \u0130STANBUL", None),
    ("sharp-s", ["straße"], "STRASSE, strasse", ["STRASSE", "strasse"]),
    ("ligature", ["fish"], "\ufb01sh", ["\ufb01sh"]),
    ("not-half-of-a-ligature", ["ish"], "\ufb01sh", []),
    ("final-sigma", ["λόγος"], "ΛΌΓΟΣ", ["ΛΌΓΟΣ"]),
    ("composed-word-decomposed-text", ["café"], "CAFE\u0301", ["CAFE\u0301"]),
    ("decomposed-word-composed-text", ["cafe\u0301"], "Café", ["Café"]),
    ("marks-in-another-order", ["q\u0307\u0323"], "Q\u0323\u0307", ["Q\u0323\u0307"]),
    ("a-letter-without-its-mark", ["cafe"], "café cafe\u0301", []),
    ("a-sign-without-its-mark", ["<r>"], "<r>\u0338", []),
    ("hangul", ["가"], "가 \u1100\u1161 각 \u1100\u1161\u11a8", ["가", "\u1100\u1161"]),
    ("vowel-sign-belongs-to-the-word", ["क"], "कि क", ["क"]),
    ("inside-a-longer-word", ["ring"], "string rings _ring ring2 ring", ["ring"]),
    ("brackets-part-words", ["<r>"], "cat<R>cat", ["<R>"]),
    ("emoji", ["😀"], "a😀b", ["😀"]),
    ("one-begins-as-another", ["ring", "ring-by", "ring-by-all"], "ring-by-all ring", ["ring-by-all", "ring"]),
    ("one-inside-another", ["b", "a-b-c"], "a-b-c b a-b", ["a-b-c", "b", "b"]),
    ("longer-does-not-stand-alone", ["a", "a-b"], "a-bc", ["a"]),
    ("signs-of-patterns", ["a+b", "a.b", "(x", "$", "[y]", "\\d"], "a+b axb (x $ [Y] \\D 7", ["a+b", "(x", "$", "[Y]", "\\D"]),
    ("twice", ["x1"], "x1x1 x1 X1", ["x1", "X1"]),
    ("after-a-colon", ["embedding:kedi"], "embedding:KED\u0130 EMBEDDING:kedi", ["embedding:KED\u0130", "EMBEDDING:kedi"]),
    ("none", [], "a cat", []),
    ("empty-word", [""], "a cat", []),
    ("empty-text", ["a"], "", []),
]  # fmt: skip


@pytest.mark.parametrize(("words", "text", "expected"), [row[1:] for row in FOUND], ids=[row[0] for row in FOUND])
def test_what_is_found(words: list[str], text: str, expected: list[str] | None) -> None:
    found = list(Words(words).find(text))
    assert [text[match.start : match.end] for match in found] == (text.split() if expected is None else expected)
    assert all(fold(match.word) == fold(text[match.start : match.end]) and match.word in words for match in found)


letters = st.text(st.sampled_from("aAiI\u0130\u0131sS\u017fßé\u0301\u0307k\u212a\ufb01가<>-+. "), max_size=12)


@given(word=letters, before=letters, after=letters)
def test_a_word_between_spaces_is_found_in_every_form(word: str, before: str, after: str) -> None:
    word = word.strip()
    if not word or unicodedata.combining(word[0]):
        return
    forms = {word, word.upper(), word.lower(), *(unicodedata.normalize(form, word) for form in ("NFC", "NFD"))}
    for form in forms:
        text = f"{before} {form} {after}"
        start = len(before) + 1
        found = [match for match in Words([word]).find(text) if match.end > start]
        # What stands before may end inside of it: "a a a" holds "a a" once, from its beginning.
        assert found and (found[0] == Match(start, start + len(form), word) or found[0].start < start)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """A vocabulary of a base that has a tokenizer and a table, and no network besides."""
    table = torch.nn.Embedding(49408, 8)
    encoder = SimpleNamespace(get_input_embeddings=lambda: table, set_input_embeddings=lambda table: None)
    tokenizer = CLIPTokenizer.from_pretrained(configs.TOKENIZER)
    unet = SimpleNamespace(dtype=torch.float32)
    return Vocabulary(SimpleNamespace(text_encoder=encoder, tokenizer=tokenizer, unet=unet, architecture="sd15", pad=49407))


def learned(token: str, name: str = "", vectors: int = 1, value: float = 1.0) -> Embedding:
    return Embedding(token, torch.full((vectors, 8), value), name)


@pytest.mark.parametrize(
    ("token", "prompt"),
    [
        ("qkedi", "a QKED\u0130"), ("qkedi", "a qked\u0131"), ("<sks>", "a <\u017fKS>"), ("q\u0130stanbul", "a qistanbul"),
        ("qcafé", "a QCAFE\u0301"), ("q-straße", "a Q-STRASSE"), ("<s>", "a embedding:F\u0130LE"),
        ("<s>", "a Embedding:f\u0131le"),
    ],
)  # fmt: skip
def test_a_prompt_says_the_word(vocabulary: Vocabulary, token: str, prompt: str) -> None:
    vocabulary.learn([learned(token, "file", 2)])
    assert vocabulary.tokens(prompt) == [*vocabulary.tokens("a"), 49408, 49409]
    assert vocabulary.text(vocabulary.tokens(prompt)) == f"a {token}"


def test_the_words_around_stay_as_they_are(vocabulary: Vocabulary) -> None:
    """Folding is for finding: what the tokenizer reads is the prompt's own text."""
    vocabulary.learn([learned("<s>")])
    own = [vocabulary.tokens(part) for part in ("KED\u0130 straße", ", caf\u00e9")]
    assert vocabulary.tokens("KED\u0130 straße <S>, caf\u00e9") == [*own[0], 49408, *own[1]]


@pytest.mark.parametrize(
    ("one", "other", "word"),
    [
        (learned("<kedi>"), learned("<KED\u0130>"), "<KED\u0130>"),
        (learned("<café>"), learned("<cafe\u0301>"), "<cafe\u0301>"),
        (learned("<a>", "file"), learned("<b>", "FILE", value=2.0), "embedding:FILE"),
        (learned("embedding:x"), learned("<b>", "x", value=2.0), "embedding:x"),
    ],
    ids=["letter-case", "composition", "files-of-one-name", "word-and-file"],
)
def test_words_that_a_prompt_could_not_tell_apart_are_refused(
    vocabulary: Vocabulary, one: Embedding, other: Embedding, word: str
) -> None:
    with pytest.raises(ValueError, match=f"there is another embedding for '{word}'"):
        vocabulary.learn([one, other])


def test_a_file_may_have_two_words(vocabulary: Vocabulary) -> None:
    vocabulary.learn([learned("<a>", "file"), learned("<b>", "file")])
    assert vocabulary.tokens("<a><b>") == [49408, 49409]
    assert vocabulary.tokens("embedding:file") in ([49408], [49409])  # the same vectors


def test_the_steering_loss_leaves_the_word_out_in_every_form() -> None:
    assert content_words("a KED\u0130 beside a bowl, kedis", ["kedi"]) == ["bowl", "kedis"]
    assert content_words("a <\u017fks> on a TABLE", ["<sks>"]) == ["table"]
