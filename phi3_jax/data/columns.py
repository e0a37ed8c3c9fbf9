"""Dataset row formats, each parsed into one of three forms.

| format | columns | becomes |
|---|---|---|
| messages | messages: [{role, content}] | Chat |
| conversations | conversations: [{from, value}] (ShareGPT) | Chat |
| prompt_completion | prompt, completion: both texts, or both lists of messages | Completion, Chat |
| alpaca | instruction, output, and maybe input | Chat |
| text | text | Text |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from phi3_jax.data.rows import Chat, Completion, Message, Row, RowError, Text

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


def recognize(columns: set[str]) -> str:
    """The format of a row with these columns.

    Raises:
        RowError: no format matches; the message lists the known ones.
    """
    for name, needed in COLUMNS.items():
        if needed <= columns:
            return name
    known = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, needed in COLUMNS.items())
    raise RowError(f"columns {sorted(columns)} fit no known format ({known})")


def parse(row: Any, format: str = "auto") -> Row:
    """Parse one row into its form.

    Args:
        row: a mapping from column to value.
        format: one of `COLUMNS`, or `auto` to detect it from the columns.

    Raises:
        RowError: a value is missing or has the wrong type.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"an object is expected, not {_short(row)}")
    # Table formats give every row every column; treat null as missing.
    present = {name: value for name, value in row.items() if value is not None}
    name = recognize(set(present)) if format == "auto" else format
    if missing := sorted(COLUMNS[name] - present.keys()):
        raise RowError(f"format {name} needs {', '.join(missing)}; there is {sorted(present)}")
    return PARSERS[name](present)


def _messages(row: Mapping[str, Any]) -> Chat:
    return Chat(_message_list(row["messages"], "messages"))


def _conversations(row: Mapping[str, Any]) -> Chat:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowError(f"conversations: a list of turns is expected, not {_short(turns)}")
    messages = []
    for number, turn in enumerate(turns):
        where = f"conversations[{number}]"
        if not isinstance(turn, Mapping):
            raise RowError(f"{where}: an object with from and value is expected")
        speaker = turn.get("from")
        if speaker not in SHAREGPT_ROLES:
            raise RowError(f"{where}: from is {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
        content = _string(turn.get("value"), f"{where}.value")
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": content})
    return Chat(messages)


def _prompt_completion(row: Mapping[str, Any]) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _message_list(prompt, "prompt")
        return Chat(before + _message_list(completion, "completion"), learn_from=len(before))
    raise RowError(
        "prompt and completion must both be texts or both lists of messages, not "
        f"{type(prompt).__name__} and {type(completion).__name__}"
    )


def _alpaca(row: Mapping[str, Any]) -> Chat:
    content = _string(row["instruction"], "instruction")
    if row.get("input"):
        # Wording from the guide's notebook (Phi-3-finetune-lora-python.ipynb).
        content += "\n Input: " + _string(row["input"], "input")
    answer = _string(row["output"], "output")
    return Chat([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])


def _text(row: Mapping[str, Any]) -> Text:
    return Text(_string(row["text"], "text"))


def _message_list(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{where}: a list of messages is expected, not {_short(value)}")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise RowError(f"{where}[{number}]: an object with role and content is expected")
        role = _string(message.get("role"), f"{where}[{number}].role")
        content = _string(message.get("content"), f"{where}[{number}].content")
        messages.append({"role": role, "content": content})
    return messages


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{where}: text is expected, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# In detection order: a row that matches two formats gets the richer one.
COLUMNS: dict[str, set[str]] = {
    "messages": {"messages"},
    "conversations": {"conversations"},
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "output"},
    "text": {"text"},
}
PARSERS: dict[str, Callable[[Mapping[str, Any]], Row]] = {
    "messages": _messages,
    "conversations": _conversations,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
}
