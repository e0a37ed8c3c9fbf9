"""The real tokenizer of Phi-3-mini, through the program's own loader."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from phi3_jax import UserError
from phi3_jax.data.rendering import render
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.generation.answers import stop_ids
from tests.phi3_jax.conftest import TOKENIZER

SEPARATOR = "\n__ggml_vocab_test__\n"
STRINGS = (TOKENIZER / "test-strings.inp").read_bytes().decode().split(SEPARATOR)
IDS = (TOKENIZER / "test-ids.out").read_text().split("\n")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def test_llama_cpps_vectors(tokenizer):
    assert len(STRINGS) == 47
    for text, line in zip(STRINGS, IDS, strict=False):
        expected = [int(token) for token in line.split()]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, repr(text)


def test_special_tokens_are_single_ids(tokenizer):
    ids = {"<|endoftext|>": 32000, "<|assistant|>": 32001, "<|system|>": 32006}
    ids |= {"<|end|>": 32007, "<|user|>": 32010}
    for token, number in ids.items():
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [number]
    assert tokenizer.eos_token_id == 32000


def test_prompt_of_the_template(tokenizer):
    text = render([{"role": "user", "content": "Hello world"}], tokenizer, True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [32010, 15043, 3186, 32007, 32001]


def test_stops_are_the_checkpoints_and_the_templates(tokenizer, tmp_path):
    """`<|end|>` ends an answer though the tokenizer names `<|endoftext|>` its end."""
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, tmp_path)
    assert stop_ids(tmp_path, tokenizer) == [32000, 32007]
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [32000, 32001, 32007]})
    )
    assert stop_ids(tmp_path, tokenizer) == [32000, 32001, 32007]
    for wrong in ("x", "7", True, 1.5, [[1]], ["a"], {}, -2, 2**31):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(UserError, match="eos_token_id must be null or token ids"):
            stop_ids(tmp_path, tokenizer)


def test_a_chat_template_from_elsewhere(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokenizer = load_tokenizer(TOKENIZER, str(tmp_path / "t.jinja"))
    assert render(turns, tokenizer) == "[a][b]"
    tokenizer.save_pretrained(tmp_path / "other")
    tokenizer = load_tokenizer(TOKENIZER, str(tmp_path / "other"))
    assert render(turns, tokenizer) == "[a][b]"
    with pytest.raises(UserError, match="neither a Jinja file nor a tokenizer"):
        load_tokenizer(TOKENIZER, str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": 5}'),
        ("tokenizer.json", b"[" * 200_000),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b'{"eos_token": 5}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["a.B", null]}}'),
        ("tokenizer_config.json", b'{"model_max_length": "x"}'),
        ("tokenizer_config.json", None),
    ],
    ids=str,
)
def test_damaged_files(tmp_path, file, content):
    """None is read half, waited for, or run as code."""
    for source in TOKENIZER.glob("*.json"):
        shutil.copy(source, tmp_path)
    if content is None:
        (tmp_path / file).unlink()
        os.mkfifo(tmp_path / file)
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path}") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
