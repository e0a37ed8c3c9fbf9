"""TRL's own preparation of the same rows: its masks, and its packed rows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import get_training_chat_template

from phi3_jax.config.data import DataConfig
from phi3_jax.data.batches import eval_batches, packed
from phi3_jax.data.columns import parse
from phi3_jax.data.loading import load_data
from phi3_jax.data.masks import Learning, encode
from phi3_jax.data.rendering import ChatTemplate
from phi3_jax.data.rows import Chat
from phi3_jax.data.tokenizer import load_tokenizer
from tests.phi3_jax.conftest import TOKENIZER
from tests.phi3_jax.data.templates import TEMPLATES

WORDS = st.builds(
    str.__add__,
    st.sampled_from(["", " ", "\n", "  \n"]),
    st.text(st.characters(codec="utf-8", exclude_characters="<|"), max_size=9),
)


@pytest.fixture(scope="module", params=["phi-3", "phi-3.5"])
def tokenizer(request):
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.chat_template = TEMPLATES.get(request.param, tokenizer.chat_template)
    return tokenizer


@settings(max_examples=60, deadline=None, derandomize=True)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), system=st.booleans())
def test_masks_are_trls(tokenizer, turns, system):
    """But for the end of text after the last turn, and the header before white space."""
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    theirs = tokenizer.apply_chat_template(
        messages,
        chat_template=get_training_chat_template(tokenizer),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    template = ChatTemplate(tokenizer)
    example = encode(template.prepare(Chat(messages)), template, Learning())
    assert example.tokens.tolist() == theirs["input_ids"]
    mask, ids = np.array(theirs["assistant_masks"], bool), np.array(theirs["input_ids"])
    assert mask[-1] and ids[-1] == tokenizer.eos_token_id
    mask[-1] = False
    mask[ids == tokenizer.convert_tokens_to_ids("<|assistant|>")] = False
    assert example.targets.tolist() == mask.tolist()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_prompts_and_completions_are_trls():
    """What is learned begins with the token that has the completion's first character."""
    tokenizer = load_tokenizer(TOKENIZER)
    pairs = [
        ("Q: hi\nA:", " yes"),
        ("Q: hi\nA: ", "yes"),
        ("Q: hi\nA: ", "yes, it is<|endoftext|>"),
        ("a", "b"),
        ("ends\n", "\nb  "),
        ("", "b"),
    ]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    settings = trl.SFTConfig(output_dir="unused", report_to=[], bf16=False)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=tokenizer.chat_template, completion_only_loss=True
    )
    prepared = trl.SFTTrainer._prepare_dataset(
        trainer, datasets.Dataset.from_list(rows), tokenizer, settings, False, None, "train"
    )
    for row, theirs in zip(rows, prepared, strict=True):
        example = encode(parse(row).row, ChatTemplate(tokenizer), Learning())
        assert example.tokens.tolist() == theirs["input_ids"], row
        learned = [token for token in theirs["labels"] if token != -100]
        assert example.tokens[example.targets].tolist() == learned, row


def test_wrapped_rows_learn_what_trl_learns(tmp_path):
    """The first token of an example, too, where it is one of those to learn and others precede."""
    tokenizer = load_tokenizer(TOKENIZER)
    user, assistant = ({"role": role, "content": "so it is"} for role in ("user", "assistant"))
    segments = [{"text": "<s>", "label": False}, {"text": "as it may be", "label": True}]
    rows = [{"text": f"row {i} " + "word " * (i * 3)} for i in range(9)]
    rows[4:4] = [
        {"segments": segments},
        {"messages": [user, assistant]},
        {"segments": segments[1:]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        path=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"), max_length=16,
        packing=True, packing_strategy="wrapped",
    )  # fmt: skip
    examples = list(load_data(data, tokenizer)[0].examples)
    masks = [example.targets.copy() for example in examples]
    for mask, row in zip(masks, rows, strict=True):
        mask[0] = "text" in row or row.get("segments") == segments[1:]
    table = datasets.Dataset.from_dict(
        {
            "input_ids": [example.tokens.tolist() for example in examples],
            "labels": [
                np.where(mask, example.tokens, -100).tolist()
                for mask, example in zip(masks, examples, strict=True)
            ],
        }
    )
    theirs = trl.pack_dataset(table, 16, "wrapped")
    (batch,) = eval_batches(examples, len(theirs), 16, 16, "wrapped")
    for ours, learned, row in zip(batch["tokens"], batch["targets"], theirs, strict=True):
        length = len(row["input_ids"])
        assert ours[:length].tolist() == row["input_ids"]
        # The loss is that of the labels from the second one on.
        assert np.flatnonzero(learned).tolist() == [
            i for i in range(1, length) if row["labels"][i] != -100
        ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_packed_rows_are_trls(lengths):
    """As many rows, as full; with `wrapped`, the same tokens in each."""
    ends = np.cumsum([0, *lengths])
    rows = [list(range(start, stop)) for start, stop in zip(ends, ends[1:], strict=False)]
    table = datasets.Dataset.from_dict({"input_ids": rows}).with_format("arrow")
    expected = trl.pack_dataset(table, 12, "wrapped")["input_ids"].to_pylist()
    ours = [
        [token for i, start, stop in row for token in rows[i][start:stop]]
        for row in packed(lengths, 12, "wrapped")
    ]
    assert ours == expected
    for strategy, kept in (
        ("bfd", [min(length, 12) for length in lengths]),
        ("bfd_split", [min(12, left) for n in lengths for left in range(n, 0, -12)]),
    ):
        theirs = trl.pack_dataset(table, 12, strategy)["input_ids"].to_pylist()
        own = packed(kept, 12, "bfd")
        filled = [sum(stop - start for _, start, stop in row) for row in own]
        assert sorted(filled) == sorted(map(len, theirs))
