"""Columns by their usual other names, system and history, and what is not used."""

from __future__ import annotations

import json

import pytest

from phi3_jax.config.data import DataConfig
from phi3_jax.data.columns import parse
from phi3_jax.data.roles import CALLS, NAMES
from phi3_jax.data.rows import Completion, RowError
from tests.conftest import ROOT

QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("question", "answer"),
        ("prompt", "response"),
        ("query", "response"),
        ("instruction", "response"),
        ("problem", "solution"),
        ("input", "output"),
        ("instruction", "answer"),
        ("prompt", "output"),
        ("Question", " Answer"),
        ("Instruction", "Output"),
    ],
)
def test_well_known_names(question, answer):
    parsed = parse({question: "q", answer: "a", "id": 7})
    assert parsed.row.messages == QA
    named = {"instruction": question, "output": answer}
    assert parsed.renamed == {ours: theirs for ours, theirs in named.items() if ours != theirs}
    assert parsed.unused == {"id"}


def test_of_several_names_the_usual_pair_is_taken():
    row = {"problem": "q", "solution": "a", "answer": "42", "Answer": "x"}
    parsed = parse(row)
    assert (parsed.row.messages, parsed.unused) == (QA, {"answer", "Answer"})
    text = parse({"prompt": "p", "completion": "c", "system_prompt": "s"})
    assert (text.renamed, text.unused) == ({}, {"system_prompt"})
    for row in ({"messages": QA}, {"instruction": "q", "output": "a"}):
        parsed = parse(row | {"system_prompt": "s", "functions": [{"name": "f"}], "context": "c"})
        assert parsed.row.messages == [{"role": "system", "content": "s"}, *QA]
        assert parsed.row.tools == [{"name": "f"}] and parsed.unused == {"context"}
        assert parsed.renamed == {"system": "system_prompt", "tools": "functions"}


def test_names_of_the_config():
    columns = {"instruction": "ask", "output": "say", "input": "about"}
    parsed = parse({"ask": "q", "say": "a", "text": "t", "about": None}, columns=columns)
    assert (parsed.row.messages, parsed.renamed, parsed.unused) == (QA, {}, {"text"})
    assert parsed.named == {"ask": True, "say": True, "about": False}
    with pytest.raises(RowError, match=r"columns \['a', 'question'\] match no known format"):
        parse({"question": "q", "a": "a"}, columns={"instruction": "Question", "output": "a"})
    swapped = parse({"output": "q", "instruction": "a"}, columns={
        "instruction": "output", "output": "instruction",
    })  # fmt: skip
    assert swapped.row.messages == QA
    with pytest.raises(ValueError, match="should be 'messages'"):
        DataConfig(path="a", columns={"question": "instruction"})


def test_system_and_history():
    row = {"instruction": "q", "output": "a", "system": "s", "history": [["h", "g"]]}
    parsed = parse(row)
    roles = [(message["role"], message["content"]) for message in parsed.row.messages]
    assert roles == [
        ("system", "s"), ("user", "h"), ("assistant", "g"), ("user", "q"), ("assistant", "a"),
    ]  # fmt: skip
    assert parsed.row.label(1) == "history[0] (user)" and not parsed.unused
    assert parse(row | {"history": '[["h", "g"]]'}).row == parsed.row
    assert len(parse(row | {"history": " "}).row.messages) == 3
    with pytest.raises(RowError, match="history: not valid JSON"):
        parse(row | {"history": "h"})
    chat = parse({"messages": [{"role": "system", "content": "s"}, *QA], "system": "s"}).row
    assert len(chat.messages) == 3
    chat = parse({"prompt": QA, "completion": [{**QA[1], "weight": 1}], "system": "s"}).row
    assert (chat.learn_from, chat.flags) == (3, {3: True})


def test_other_forms_of_messages_and_tools():
    call = {"name": "f", "arguments": "{}"}
    row = {"messages": [{"role": "assistant", "content": None, "function_call": call}]}
    (message,) = parse(row).row.messages
    assert message["tool_calls"] == [{"type": "function", "function": call}]
    for none in ({}, [], "", "{}", "null"):
        assert parse({"messages": QA, "tools": none}).row.tools is None
    with pytest.raises(RowError, match=r"messages\[0\]: no content; its keys are role, text"):
        parse({"messages": [{"role": "user", "text": "q"}]})
    assert parse({"messages": [QA[0], {**QA[1], "loss": False}]}).row.flags == {1: False}
    lists = {"role": ["user", "assistant"], "content": ["q", "a"]}
    assert parse({"messages": lists}).row.messages == QA


def test_prompts_as_json_text():
    chat = parse({"prompt": QA[:1], "completion": QA[1:]}).row
    assert parse({"prompt": json.dumps(QA[:1]), "completion": json.dumps(QA[1:])}).row == chat
    assert parse({"prompt": json.dumps(QA[:1]), "completion": "a"}).row.messages == QA
    for text in ("[{1}]", '[{"a": 1}]', "[", "[{"):
        assert parse({"prompt": text, "completion": "a"}).row == Completion(text, "a")


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {}}, {"image": "a.png", "text": None}]
)
def test_image_parts_are_refused_by_name(part):
    with pytest.raises(RowError, match=r"content\[1\]: a part of type 'image"):
        parse({"messages": [{"role": "user", "content": ["a", part]}]})


@pytest.mark.parametrize("value", [5, "x", [], {}, [5], [{"role": 5}], [{"role": "user"}], [None]])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_wrong_types_anywhere(column, value):
    with pytest.raises(RowError):
        parse({column: value})


def test_the_docs_have_the_table_of_roles():
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for role, names in NAMES.items():
        others = ", ".join(name for name in names if name != role)
        assert f"| `{role}` | {others} |" in page
    assert f"| `assistant` with `tool_calls` | {', '.join(CALLS)}:" in page
