"""Prompts as token ids: no end-of-text token after them, text that is text, and their room."""

from __future__ import annotations

import json
import shutil

import pytest

from phi3_jax import UserError
from phi3_jax.data.masks import Learning, encode
from phi3_jax.data.rendering import ChatTemplate
from phi3_jax.data.rows import Chat, Completion, Text
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.generation.prompts import encode_chat, encode_text, rooms
from phi3_jax.model.config import Phi3Config
from tests.phi3_jax.conftest import TOKENIZER

EOS = 32000
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture(scope="module")
def plain():
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def appending(tmp_path_factory):
    """A tokenizer that appends EOS to every text, as some fine-tuned checkpoints have it."""
    folder = tmp_path_factory.mktemp("appends")
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    end = {"id": "<|endoftext|>", "ids": [EOS], "tokens": ["<|endoftext|>"]}
    content["post_processor"]["single"].append(
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    )
    content["post_processor"]["special_tokens"]["<|endoftext|>"] = end
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert tokenizer("Hi")["input_ids"][-1] == EOS
    return tokenizer


def test_a_tokenizer_that_appends_eos_changes_no_prompt(plain, appending):
    for text in ("Tell me", "", "Hi<|end|>", "It ends here.<|endoftext|>"):
        assert encode_text(text, appending) == encode_text(text, plain)
    assert encode_text("It ends here.<|endoftext|>", appending)[-1] == EOS
    assert encode_chat(CHAT, appending) == encode_chat(CHAT, plain)


def test_nor_any_row(plain, appending):
    texts = ("Tea.", "Tea.<|endoftext|>", "Tea.<|endoftext|>\n")
    rows = [Chat(CHAT), Completion("Tea or ", "rain?"), *map(Text, texts)]
    for row in rows:
        expected = encode(row, ChatTemplate(plain), Learning())
        found = encode(row, ChatTemplate(appending), Learning())
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.targets.tolist() == expected.targets.tolist()


def test_text_that_is_not_unicode(plain):
    latin1 = b"a caf\xe9 here".decode(errors="surrogateescape")
    with pytest.raises(UserError, match=r"the user message is not valid UTF-8, near .*caf\\"):
        encode_chat([{"role": "user", "content": latin1}], plain)
    with pytest.raises(UserError, match="the prompt is not valid UTF-8"):
        encode_text(latin1, plain)


def test_rooms():
    config = Phi3Config(max_position_embeddings=128, original_max_position_embeddings=128)
    assert rooms([[1] * n for n in (5, 100, 127, 128, 200)], 64, config) == [64, 28, 1, 0, 0]
