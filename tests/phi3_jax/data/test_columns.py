"""Columns by their usual other names, system and history, and what is not used."""

from __future__ import annotations

import pytest

from phi3_jax.config.data import DataConfig
from phi3_jax.data.columns import parse
from phi3_jax.data.roles import CALLS, NAMES
from phi3_jax.data.rows import RowError
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
    ],
)
def test_well_known_names(question, answer):
    parsed = parse({question: "q", answer: "a", "id": 7})
    assert parsed.row.messages == QA
    named = {"instruction": question, "output": answer}
    assert parsed.renamed == {ours: theirs for ours, theirs in named.items() if ours != theirs}
    assert parsed.unused == {"id"}


def test_names_of_the_config():
    columns = {"instruction": "ask", "output": "say", "input": "about"}
    parsed = parse({"ask": "q", "say": "a", "text": "t", "about": None}, columns=columns)
    assert (parsed.row.messages, parsed.renamed, parsed.unused) == (QA, {}, {"text"})
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
    chat = parse({"messages": [{"role": "system", "content": "s"}, *QA], "system": "s"}).row
    assert len(chat.messages) == 3
    chat = parse({"prompt": QA, "completion": [{**QA[1], "weight": 1}], "system": "s"}).row
    assert (chat.learn_from, chat.flags) == (3, {3: True})


def test_openais_older_calls_and_lists_of_columns():
    call = {"name": "f", "arguments": "{}"}
    row = {"messages": [{"role": "assistant", "content": None, "function_call": call}]}
    (message,) = parse(row).row.messages
    assert message["tool_calls"] == [{"type": "function", "function": call}]
    lists = {"role": ["user", "assistant"], "content": ["q", "a"]}
    assert parse({"messages": lists}).row.messages == QA


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
