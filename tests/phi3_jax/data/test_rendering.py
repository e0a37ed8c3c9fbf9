"""Whatever a row holds reaches the chat template, or the row is refused."""

from __future__ import annotations

import json
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_jax import UserError
from phi3_jax.data import rendering
from phi3_jax.data.columns import parse
from phi3_jax.data.masks import Learning, draft, encode, runs_of, tokenize
from phi3_jax.data.rendering import ChatTemplate, render
from phi3_jax.data.rows import RowError
from phi3_jax.data.spans import Layouts, assistant_spans
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.data.words import WordTokenizer
from tests.phi3_jax.conftest import TOKENIZER
from tests.phi3_jax.data.templates import TEMPLATES
from tests.phi3_jax.data.test_cases import WITH_TOOLS

ALL = TEMPLATES | {"with tools": WITH_TOOLS}
ROLES = {
    "user": ("user", "Human", "prompter"),
    "assistant": ("assistant", "GPT", "model", "bot"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "ipython"),
}
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<|"), max_size=9)
TOOLS = [{"type": "function", "function": {"name": "tide", "parameters": {}}}]
CALLS = [{"type": "function", "function": {"name": "tide", "arguments": {"at": "Kiel"}}}]


@st.composite
def chats(draw):
    """A row, and its messages as the template should see them."""
    row_messages, expected = [], []
    for role in draw(st.lists(st.sampled_from(sorted(ROLES)), min_size=1, max_size=5)):
        name, content = draw(st.sampled_from(ROLES[role])), draw(WORDS)
        extra = draw(st.sampled_from([{}, {"name": "x"}, {"weight": 0}, {"train": False}]))
        if role == "assistant" and draw(st.booleans()):
            extra = {"tool_calls": CALLS}
            content = draw(st.sampled_from([content, None]))
        seen = {} if content is None else {"content": content}
        parts = content and draw(st.booleans())
        given_content = [{"type": "text", "text": content}] if parts else content
        row_messages.append({"role": name, "content": given_content, **extra})
        expected.append({"role": role, **seen, **extra})
    tools = draw(st.sampled_from([None, TOOLS]))
    as_text = draw(st.booleans())
    row = {"messages": json.dumps(row_messages) if draw(st.booleans()) else row_messages}
    if tools:
        row["tools"] = json.dumps(tools) if as_text else tools
    return row, expected, tools


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def words(tokenizer):
    return WordTokenizer.of(tokenizer.backend_tokenizer)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=chats())
def test_accepted_rows_have_the_ids_of_apply_chat_template(tokenizer, words, name, case):
    row, messages, tools = case
    tokenizer.chat_template = ALL[name]
    template = ChatTemplate(tokenizer)
    try:
        chat = template.prepare(parse(row).row)
        example = encode(chat, template, Learning())
    except RowError:
        return
    fast = draft(chat, template, Learning(), Layouts(template))
    for own in (None, words):
        (tokens,) = tokenize([fast], tokenizer, own)
        assert tokens.ids.tolist() == example.tokens.tolist()
        assert tokens.learned == runs_of(example.targets)
    if tools and name == "phi-4-mini":
        messages[0]["tools"] = json.dumps(tools)
    whole = tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    assert example.tokens.tolist() == whole
    text = render(messages, tokenizer, tools=tools)
    for message in messages:
        assert message.get("content", "").strip() in text
        assert "tool_calls" not in message or "Kiel" in text
    assert not tools or "tide" in text


@pytest.mark.parametrize("name", ALL)
def test_plain_chats_are_accepted_by_all(tokenizer, name):
    tokenizer.chat_template = ALL[name]
    template = ChatTemplate(tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    chat = template.prepare(parse({"messages": turns}).row)
    # And each is found by its layout, without rendering it turn by turn.
    found = Layouts(template).locate(chat, [1, 3], template.render(chat))
    assert found.spans == assistant_spans(chat, [1, 3], template.render(chat), template)


def test_a_content_that_the_template_cuts_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] | upper }}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = ChatTemplate(tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encode(template.prepare(parse({"messages": turns}).row), template, Learning())
    turns[1]["content"] = "<think>hm</think>b"
    with pytest.raises(RowError, match=r"messages\[1\] \(assistant\): a part of its content"):
        encode(template.prepare(parse({"messages": turns}).row), template, Learning())


def test_a_template_that_reads_text_parts_gets_them(tokenizer):
    row = {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
    ]}  # fmt: skip
    tokenizer.chat_template = TEMPLATES["phi-3"]
    assert ChatTemplate(tokenizer).prepare(parse(row).row).messages[0]["content"] == "a\nb"
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endif %}<|end|>{% endfor %}"
    )
    template = ChatTemplate(tokenizer)
    assert "a;b;" in template.render(template.prepare(parse(row).row))


def test_keys_that_the_template_never_reads_are_named(tokenizer):
    tokenizer.chat_template = TEMPLATES["phi-3"]
    template = ChatTemplate(tokenizer)
    turns = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]
    assert template.unread_keys(parse({"messages": turns}).row) == {"name (user)"}
    tokenizer.chat_template = TEMPLATES["phi-3"].replace("'<|user|>\n'", "message['name']")
    assert ChatTemplate(tokenizer).unread_keys(parse({"messages": turns}).row) == set()


@pytest.mark.parametrize(
    ("template", "error", "said"),
    [
        ("{{ 1 // 0 }}", RowError, "rejects it: .*by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", RowError, "nested too deeply"),
        ("{% if %}", RowError, "rejects it"),
        ("{{ messages[9].content }}", RowError, "rejects it"),
        ("{{ raise_exception('no') }}", RowError, "rejects it: no"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            UserError,
            "took over 0 s for one chat; it may have a loop without end",
        ),
    ],
)
def test_templates_that_fail(monkeypatch, template, error, said):
    monkeypatch.setattr(rendering, "TIME_LIMIT", 0.2)
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.chat_template = template
    with pytest.raises(error, match=said):
        render([{"role": "user", "content": "a"}], tokenizer)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_template_that_writes_half_of_a_character(tokenizer):
    tokenizer.chat_template = "{{ '\\ud800' }}" + TEMPLATES["phi-3"]
    template = ChatTemplate(tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = template.prepare(parse({"messages": turns}).row)
    with pytest.raises(RowError, match="the chat template writes a lone surrogate"):
        Layouts(template).locate(chat, [1], template.render(chat))
