"""Tokenizing word by word gives the tokenizer's own ids, or is not done."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_jax.data import words
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.data.words import WordTokenizer
from tests.phi3_jax.conftest import TOKENIZER

ODD = (
    *("the", "don't", "1234", "日本", "é", "e\u0301", "\U0001f600", "x=1;", "<", "<|", "<0x0A>"),
    *(" ", "  ", "\u2581", "\u2581\u2581", "\n", "\r\n", "\t", "\0", "\x1c", "\x85", "\xa0"),
    *("\u2028", "\u3000", "<|end|>", "<|user|>", "<|endoftext|>", "<s>", "</s>", "<unk>"),
)
PIECES = st.one_of(st.sampled_from(ODD), st.text(st.characters(codec="utf-8"), max_size=4))
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@pytest.fixture(scope="module")
def backend():
    return load_tokenizer(TOKENIZER).backend_tokenizer


@pytest.fixture(scope="module")
def by_words(backend):
    return WordTokenizer.of(backend)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_ids_are_the_tokenizers(backend, by_words, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "LONG", 10**9)
        for said in (text, f"{text} ", f" {text}", f"a {text}\n{text}", f"{text}  \n{text} \n"):
            if " " in said or "\n" in said:
                expected = backend.encode(said, add_special_tokens=False).ids
                assert by_words.encode(said).tolist() == expected


def test_a_small_memory_changes_nothing(backend, monkeypatch):
    monkeypatch.setattr(words, "MAX_WORDS", 2)
    small = WordTokenizer.of(backend)
    for text in ("one two three one two", "four one four one", "two"):
        expected = backend.encode(text, add_special_tokens=False).ids
        assert small.encode(f"{text} ").tolist() == [*expected, 29871]
        assert len(small._words) <= 2


def test_added_tokens_are_found(backend):
    grown = tokenizers.Tokenizer.from_str(backend.to_str())
    for content in ("<tool>", "<tool>s"):
        grown.add_tokens([tokenizers.AddedToken(content, normalized=False)])
    stripping = tokenizers.AddedToken("<|think|>", special=True, rstrip=True, normalized=False)
    grown.add_special_tokens([stripping])
    by_words = WordTokenizer.of(grown)
    text = "a <tool> b<tool>s c <|think|> \n d <|think|><|end|>\n\ne"
    assert by_words.encode(text).tolist() == grown.encode(text, add_special_tokens=False).ids


def test_texts_without_spaces_are_left_to_the_tokenizer(by_words):
    assert by_words.encode("日本語" * 100) is None
    assert by_words.encode("one two three") is not None


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("model", "vocab", "a\u2581b"), 32000),  # a token with a space inside
        (("model", "vocab", "a\n"), 32000),
        (("model", "vocab", "<0x0A><0x0A>"), 32000),
        (("model", "ignore_merges"), True),
        (("model", "dropout"), 0.1),
        (("model", "byte_fallback"), False),
        (("pre_tokenizer",), {"type": "Whitespace"}),
        (("normalizer",), None),
        (("normalizer",), {"type": "NFC"}),
        (("added_tokens", 4, "lstrip"), True),
        (("added_tokens", 4, "single_word"), True),
        (("added_tokens", 4, "normalized"), True),
    ],
)
def test_other_tokenizers_are_used_as_they_are(backend, where, value):
    parts = json.loads(backend.to_str())
    inner = parts
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    assert WordTokenizer.of(tokenizers.Tokenizer.from_str(json.dumps(parts))) is None
