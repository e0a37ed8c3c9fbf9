"""Small files that users brought to this and to other programs, and what becomes of each."""

from __future__ import annotations

import json

import pytest

from phi3_jax import UserError
from phi3_jax.config.data import DataConfig
from phi3_jax.data.dataset import load_examples
from phi3_jax.data.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.phi3_jax.conftest import TOKENIZER
from tests.phi3_jax.data.templates import TEMPLATES

CASES = ROOT / "tests" / "fixtures" / "cases"
# File: what is learned of its row.
READ = {
    "bom.csv": "Bowline.<|end|>",
    "bom.jsonl": "Aye.<|end|>",
    "columns_dolly.jsonl": "A bowline.<|end|>",
    "columns_question_answer.jsonl": "A bowline.<|end|>",
    "content_text_parts.jsonl": "A bowline.<|end|>",
    "messages_as_json_string.jsonl": "Aye.<|end|>",
    "pretty_object.json": "Aye.<|end|>",
    "prompt_messages_completion_text.jsonl": "A bowline.<|end|>",
    "role_developer.jsonl": "Aye.<|end|>",
    "role_human.jsonl": "Aye.<|end|>",
    "sharegpt_gpt_first.jsonl": "Welcome aboard.<|end|> Aye, eight bells.<|end|>",
    "sharegpt_system_column.jsonl": "Aye, eight bells.<|end|>",
    "weight_zero.jsonl": "Sorry, four.<|end|>",
    "wrapped_data.json": "Bowline.<|end|>",
}
TOOLS = r"does not write tools; \w+\[1\] \(assistant\): tool_calls; \w+\[2\] \(tool\): content"
REFUSED = {
    "lone_surrogate.jsonl": r"a lone surrogate, \\ud83d",
    "phi4mini_tools_in_system.jsonl": r"does not write messages\[0\] \(system\): tools",
    "role_function.jsonl": r"does not write messages\[2\] \(tool\): content",
    "sharegpt_function_call.jsonl": TOOLS,
    "tools_empty_content.jsonl": TOOLS,
    "tools_null_content.jsonl": TOOLS,
}
# Writes tools, calls and results, as the templates of models that were trained on them do.
WITH_TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return load_tokenizer(TOKENIZER)


def load(file, tokenizer, **settings):
    return load_examples(DataConfig(path=str(CASES / file), **settings), tokenizer)[0]


def test_every_case_has_an_expectation():
    assert {file.name for file in CASES.iterdir()} == READ.keys() | REFUSED.keys() | {
        "text_with_bos.jsonl"
    }


@pytest.mark.parametrize(("file", "learned"), READ.items())
def test_read(tokenizer, file, learned):
    (example,) = load(file, tokenizer).examples
    assert tokenizer.decode(example.tokens[example.targets]) == learned


@pytest.mark.parametrize(("file", "message"), REFUSED.items())
def test_refused_with_its_line_and_skippable(tokenizer, tmp_path, file, message):
    with pytest.raises(UserError, match=message) as caught:
        load(file, tokenizer)
    assert str(caught.value).startswith(f"{CASES / file}:1: ")
    good = (CASES / "role_human.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text((CASES / file).read_text() + good)
    split, _ = load_examples(
        DataConfig(path=str(tmp_path / "a.jsonl"), on_bad_row="skip"), tokenizer
    )
    assert (split.report.examples, split.report.skipped) == (1, 1)
    assert f"(first: {tmp_path / 'a.jsonl'}:1)" in str(split.report)


def test_system_and_context_reach_the_model(tokenizer):
    (example,) = load("sharegpt_system_column.jsonl", tokenizer).examples
    assert "<|system|> Answer like a sailor.<|end|>" in tokenizer.decode(example.tokens)
    split = load("columns_dolly.jsonl", tokenizer)
    assert "does not slip" in tokenizer.decode(split.examples[0].tokens)
    assert "columns read: context as input, response as output" in str(split.report)
    assert "not used: category" in str(split.report)


def test_one_bos(tokenizer):
    (example,) = load("text_with_bos.jsonl", tokenizer).examples
    assert example.tokens.tolist().count(tokenizer.bos_token_id) == 1
    text = json.loads((CASES / "text_with_bos.jsonl").read_text())["text"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example.tokens.tolist() == [*ids, tokenizer.eos_token_id]


def test_tools_in_the_system_message(tokenizer, tmp_path):
    """Phi-4-mini's own form, and the row's tools put there."""
    tokenizer.chat_template = TEMPLATES["phi-4-mini"]
    file = CASES / "phi4mini_tools_in_system.jsonl"
    row = json.loads(file.read_text())
    expected = tokenizer.apply_chat_template(row["messages"])["input_ids"]
    assert load(file.name, tokenizer).examples[0].tokens.tolist() == expected
    tools = row["messages"][0].pop("tools")
    for value in (tools, json.loads(tools)):
        (tmp_path / "a.jsonl").write_text(json.dumps(row | {"tools": value}))
        split, _ = load_examples(DataConfig(path=str(tmp_path / "a.jsonl")), tokenizer)
        assert split.examples[0].tokens.tolist() == expected
    row["messages"].pop(0)
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"tools": tools}))
    with pytest.raises(UserError, match="in the system message, and there is none"):
        load_examples(DataConfig(path=str(tmp_path / "a.jsonl")), tokenizer)


@pytest.mark.parametrize("file", ["tools_null_content.jsonl", "tools_empty_content.jsonl"])
def test_a_template_that_writes_tools_gets_them(tokenizer, file):
    tokenizer.chat_template = WITH_TOOLS
    row = json.loads((CASES / file).read_text())
    (example,) = load(file, tokenizer).examples
    whole = tokenizer.apply_chat_template(row["messages"], tools=row["tools"])["input_ids"]
    assert example.tokens.tolist() == whole
    assert "get_tide" in tokenizer.decode(example.tokens[example.targets])


def test_sharegpts_calls(tokenizer):
    tokenizer.chat_template = WITH_TOOLS
    row = json.loads((CASES / "sharegpt_function_call.jsonl").read_text())
    (example,) = load("sharegpt_function_call.jsonl", tokenizer).examples
    call = json.loads(row["conversations"][1]["value"])
    roles = ("user", "assistant", "tool", "assistant")
    messages = [{"role": "system", "content": row["system"]}]
    for role, turn in zip(roles, row["conversations"], strict=True):
        messages.append({"role": role, "content": turn["value"]})
    messages[2] = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    tools = json.loads(row["tools"])
    assert (
        example.tokens.tolist() == tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    )
