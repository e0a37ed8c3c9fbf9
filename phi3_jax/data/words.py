"""Token ids of texts, word by word, for the vocabularies where that gives what the tokenizer gives.

SentencePiece vocabularies such as Phi-3's write a space as `▁`, and no token has one after another
character, nor a line break beside one. A merge then never crosses the start of a word or line, so
words can be tokenized one by one, and most of a text's words were seen before: looking them up
takes a fraction of the time that the tokenizer needs, which runs its merges over the whole text.
"""

from __future__ import annotations

import array
import json
import re
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# What the tokenizer strips after a token that asks for it: Unicode's white space.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
NORMALIZER = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]
# A line break, or the byte that stands for it, beside something else.
LINE_BREAK = re.compile(r"(?:\n|<0x0A>).|.(?:\n|<0x0A>)", re.DOTALL)
# Words that are remembered, about 30 MB, and the longest ones among them.
MAX_WORDS, MAX_CHARACTERS = 2**17, 64
# Where words are longer than this on average, as in texts without spaces, the tokenizer is faster.
LONG = 16


class WordTokenizer:
    """The ids that a tokenizer gives to texts, without the tokens it puts around them.

    Args:
        model: the tokenizer's model.
        added: its added tokens, as its JSON has them.
    """

    def __init__(self, model: models.Model, added: list[dict[str, Any]]) -> None:
        self._words = _Words(model)
        self._special = {
            token["content"]: array.array("i", [token["id"]]).tobytes() for token in added
        }
        # The longest of several tokens that begin at the same character wins.
        ordered = sorted(added, key=lambda token: -len(token["content"]))
        patterns = [
            re.escape(token["content"]) + f"[{BLANKS}]*" * token["rstrip"] for token in ordered
        ]
        self._split = re.compile("(" + "|".join(patterns) + ")").split if patterns else _whole
        self._blanks = re.compile(f"[{BLANKS}]+$")

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> WordTokenizer | None:
        """For a tokenizer; None if its ids are not those of words."""
        parts = json.loads(backend.to_str())
        return cls(backend.model, parts["added_tokens"]) if _is_made_of_words(parts) else None

    def encode(self, text: str) -> np.ndarray | None:
        """int32 `[n]`, the ids of a text; None where the tokenizer itself is faster.

        Args:
            text: without lone surrogates.
        """
        if (text.count(" ") + text.count("\n")) * LONG < len(text):
            return None
        words, special = self._words, self._special
        found = []
        for number, piece in enumerate(self._split(text)):
            if number % 2:
                found.append(special.get(piece) or special[self._blanks.sub("", piece)])
            elif piece:
                found += map(words.__getitem__, _words(piece))
        return np.frombuffer(b"".join(found), np.int32)


def _whole(text: str) -> list[str]:
    return [text]


def _words(text: str) -> list[str]:
    """The words of a text, each without the space before it; further spaces are part of it.

    A word at the beginning of a line starts with the line break, and has no space before it.
    """
    words = text.replace(SPACE, " ").replace("\n", " \n").split(" ")
    if "" not in words:
        return words
    spaces, joined = 0, []
    for word in [*words, "\n"]:
        if not word:
            spaces += 1
            continue
        if spaces and word[0] == "\n":
            joined.append(" " * (spaces - 1))
            spaces = 0
        joined.append(" " * spaces + word)
        spaces = 0
    return joined[:-1]


class _Words(dict[str, bytes]):
    """The ids of words, as int32, tokenized where they are missing."""

    def __init__(self, model: models.Model) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, word: str) -> bytes:
        start = "" if word[:1] == "\n" else SPACE
        tokens = self._model.tokenize(start + word.replace(" ", SPACE))
        ids = array.array("i", [token.id for token in tokens]).tobytes()
        if len(word) <= MAX_CHARACTERS:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _is_made_of_words(parts: dict[str, Any]) -> bool:
    """Whether a tokenizer, by its JSON, gives every text the ids of its words."""
    model, normalizer = parts["model"], parts["normalizer"] or {}
    return bool(
        model["type"] == "BPE"
        and not any(model.get(key) for key in ("dropout", "ignore_merges"))
        and not any(model[key] for key in ("continuing_subword_prefix", "end_of_word_suffix"))
        and model["byte_fallback"]
        and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
        and not any(SPACE in token.lstrip(SPACE) for token in model["vocab"])
        and not any(LINE_BREAK.search(token) for token in model["vocab"])
        and parts["pre_tokenizer"] is None
        and normalizer.get("normalizers") == NORMALIZER
        and not any(
            token["single_word"]
            or token["normalized"]
            or token["lstrip"]
            or token["content"] != token["content"].strip()
            for token in parts["added_tokens"]
        )
    )
