"""Tiny checkpoints with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import transformers

from tests.conftest import ROOT, tiny_hf_model

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
VOCAB = 320


def digits() -> Any:
    """SmolLM2's rule."""
    pre = tokenizers.pre_tokenizers
    return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])


def by_regex(pattern: str) -> Any:
    pre = tokenizers.pre_tokenizers
    split = pre.Split(tokenizers.Regex(pattern), "removed", invert=True)
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def write_tokenizer(
    directory: Path, rule: Any, size: int = VOCAB - 4, every_byte: bool = True
) -> None:
    """A byte-level BPE tokenizer trained on this repository's README; some ids stay unused.

    Without `every_byte` each token is whole characters: llama.cpp leaves out the log-probabilities
    of a token that ends within one.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = rule
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if every_byte else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    text = (ROOT / "README.md").read_text(encoding="utf-8").encode("ascii", "ignore").decode()
    tokenizer.train_from_iterator([text], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    ).save_pretrained(directory)


def write_model(directory: Path, **shape: Any) -> Path:
    """A random model of that shape with a tokenizer."""
    settings = {"vocab_size": VOCAB, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    tiny_hf_model(**settings | shape).save_pretrained(directory)
    write_tokenizer(directory, digits(), every_byte=False)
    return directory
