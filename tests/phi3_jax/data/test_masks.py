"""The mask of a chat, on every template of the Phi family and SmolLM2's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_jax import UserError
from phi3_jax.data import masks
from phi3_jax.data.masks import Example, Learning
from phi3_jax.data.rendering import ChatTemplate
from phi3_jax.data.rows import Chat, RowError
from phi3_jax.data.tokenizer import load_tokenizer
from tests.phi3_jax.conftest import TOKENIZER
from tests.phi3_jax.data.templates import END, EOS, NAMES, TEMPLATES, byte_level_tokenizer


@pytest.fixture(scope="module")
def make_tokenizer():
    real = load_tokenizer(TOKENIZER)
    original = real.chat_template

    def make(name: str):
        if name.startswith("phi-3"):
            real.chat_template = TEMPLATES.get(name, original)
            return real
        tokenizer = byte_level_tokenizer(EOS.get(name, "<|endoftext|>"))
        tokenizer.chat_template = TEMPLATES[name]
        return tokenizer

    return make


def encode(chat: Chat, tokenizer, assistant_only_loss: bool, **learning) -> Example:
    template = ChatTemplate(tokenizer)
    return masks.encode(template.prepare(chat), template, Learning(assistant_only_loss, **learning))


def conversation(turns: int, system: bool) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for i in range(turns):
        messages.append({"role": "user", "content": f"question {i}, hello?"})
        messages.append({"role": "assistant", "content": f"answer {i} to the world"})
    return messages


@pytest.mark.parametrize(("turns", "system"), list(itertools.product((1, 2, 4), (False, True))))
@pytest.mark.parametrize("name", NAMES)
def test_learns_the_assistant_and_its_end_of_turn(make_tokenizer, name, turns, system):
    tokenizer = make_tokenizer(name)
    messages = conversation(turns, system)
    if system and name == "phi-3-april":
        with pytest.raises(RowError, match=r"does not write messages\[0\] \(system\): content"):
            encode(Chat(messages), tokenizer, True)
        return
    example = encode(Chat(messages), tokenizer, assistant_only_loss=True)
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    assert example.tokens.tolist() == whole
    end = END.get(name, "<|end|>")
    learned = runs(example, tokenizer)
    assert learned == [f"answer {i} to the world{end}" for i in range(turns)]


def runs(example, tokenizer) -> list[str]:
    """The texts of the consecutive learned stretches."""
    edges = np.flatnonzero(np.diff(example.targets.astype(int), prepend=0, append=0))
    pieces = [example.tokens[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [tokenizer.decode(piece).strip() for piece in pieces]


def test_golden_ids_of_the_real_tokenizer(make_tokenizer):
    """Ids as in the model card's own example; the line break after a role token vanishes."""
    messages = [
        {"role": "user", "content": "Hello world"},
        {"role": "assistant", "content": "Hi!"},
    ]
    example = encode(Chat(messages), make_tokenizer("phi-3"), True)
    assert example.tokens.tolist() == [32010, 15043, 3186, 32007, 32001, 6324, 29991, 32007, 32000]
    assert example.targets.astype(int).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("name", NAMES)
def test_what_users_write_moves_nothing(make_tokenizer, name):
    """Role and end tokens inside the content are content."""
    tokenizer = make_tokenizer(name)
    end = END.get(name, "<|end|>")
    messages = [
        {"role": "user", "content": f"say <|assistant|> and {end} please"},
        {"role": "assistant", "content": f"it is {end} here"},
        {"role": "user", "content": "answer 1"},
        {"role": "assistant", "content": "answer 1"},
    ]
    example = encode(Chat(messages), tokenizer, True)
    first, second = runs(example, tokenizer)
    assert "".join(first.split()) == f"itis{end}here{end}"
    assert second == f"answer 1{end}"


@pytest.mark.parametrize("name", NAMES)
def test_only_the_completion_of_a_prompt(make_tokenizer, name):
    tokenizer = make_tokenizer(name)
    example = encode(Chat(conversation(3, False), learn_from=4), tokenizer, True)
    assert runs(example, tokenizer) == [f"answer 2 to the world{END.get(name, '<|end|>')}"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="<|"), max_size=12),
        min_size=2,
        max_size=6,
    )
)
def test_any_text_is_learnt_once(make_tokenizer, name, texts):
    """Whatever is said: as many stretches as answers, each closed by its end-of-turn token."""
    tokenizer = make_tokenizer(name)
    texts = texts[: len(texts) // 2 * 2]
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    example = encode(Chat(messages), tokenizer, True)
    end = tokenizer.convert_tokens_to_ids(END.get(name, "<|end|>"))
    edges = np.flatnonzero(np.diff(example.targets.astype(int), prepend=0, append=0))
    assert len(edges) == len(texts)
    assert all(example.tokens[stop - 1] == end for stop in edges[1::2])


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("smollm2")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} "
        "{{ m.content if loop.last else m.content | upper }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    with pytest.raises(UserError, match="cannot be masked"):
        encode(Chat(conversation(2, False)), tokenizer, True)


def test_a_template_without_an_end_of_turn_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("smollm2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(UserError, match="could not learn to stop"):
        encode(Chat(conversation(1, False)), tokenizer, True)


def test_a_template_that_refuses_the_chat_is_the_rows_fault(make_tokenizer):
    tokenizer = make_tokenizer("smollm2")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match="roles must alternate"):
        encode(Chat(conversation(1, False)), tokenizer, True)


def test_no_template_and_no_tokenizer(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("smollm2")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode(Chat(conversation(1, False)), tokenizer, True)
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_turns_that_the_row_or_the_config_leaves_out(make_tokenizer, name):
    tokenizer, end = make_tokenizer(name), END.get(name, "<|end|>")
    messages = conversation(3, False)
    answers = [f"answer {i} to the world{end}" for i in range(3)]

    def learned(chat, **learning):
        return runs(encode(chat, tokenizer, True, **learning), tokenizer)

    assert learned(Chat(messages, flags={1: False, 3: True})) == answers[1:]
    assert learned(Chat(messages), train_on="last") == answers[2:]
    with pytest.raises(RowError, match="every turn is marked as not learned"):
        learned(Chat(messages, flags={5: False}), train_on="last")
    with pytest.raises(RowError, match=r"messages\[2\] \(user\) is marked as learned"):
        learned(Chat(messages, flags={2: True}))
    everything = encode(Chat(messages), tokenizer, False)
    example = encode(Chat(messages, flags={1: False}), tokenizer, False)
    left_out = everything.targets & ~example.targets
    assert tokenizer.decode(example.tokens[left_out]).strip() == answers[0]
    with pytest.raises(RowError, match="asks not to be learned"):
        encode(Chat(messages, flags={0: False}), tokenizer, False)


@pytest.mark.parametrize("name", NAMES)
def test_a_chat_that_begins_with_the_assistant(make_tokenizer, name):
    tokenizer, end = make_tokenizer(name), END.get(name, "<|end|>")
    messages = [{"role": "assistant", "content": "welcome"}, *conversation(1, False)]
    example = encode(Chat(messages), tokenizer, True)
    assert example.tokens.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    first, second = runs(example, tokenizer)
    # April's template writes no header for it, so that its first token has nothing before it.
    assert first in (f"welcome{end}", f"lcome{end}", f"elcome{end}")
    assert second == f"answer 0 to the world{end}"
    with pytest.raises(RowError, match="begins with an assistant turn"):
        encode(Chat(messages), tokenizer, True, assistant_first="refuse")
