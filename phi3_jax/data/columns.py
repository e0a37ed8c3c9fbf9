"""Dataset row formats, each parsed into one of three forms.

| format | columns | becomes |
|---|---|---|
| messages | messages: [{role, content}] | Chat |
| conversations | conversations: [{from, value}] (ShareGPT), and maybe system | Chat |
| prompt_completion | prompt, completion: texts | Completion |
| | prompt: messages; completion: messages or a text | Chat |
| alpaca | instruction, output, and maybe input, system, history | Chat |
| input_output | segments: [{text, label}] (Axolotl) | Segments |
| text | text | Text |

A chat may have `tools`. Columns by other names are mapped by `data.columns`, or recognized.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from phi3_jax.data.messages import (
    Messages,
    from_json,
    read_messages,
    read_text,
    read_tools,
    unpacked,
)
from phi3_jax.data.rows import Chat, Completion, Kind, Row, RowError, Segments, Text, shorten

# In detection order: a row that matches two formats gets the richer one.
COLUMNS: dict[str, set[str]] = {
    "messages": {"messages"},
    "conversations": {"conversations"},
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "output"},
    "input_output": {"segments"},
    "text": {"text"},
}
# What each format reads beside its own columns.
OPTIONAL: dict[str, set[str]] = {
    "messages": {"system", "tools"},
    "conversations": {"system", "tools"},
    "prompt_completion": {"system", "tools"},
    "alpaca": {"input", "system", "history", "tools"},
    "input_output": set(),
    "text": set(),
}
# Well-known names of the columns of questions and answers, tried in turn where no format matches:
# those that data sets have most often, then every other pair.
QUESTIONS = ("instruction", "question", "query", "prompt", "problem", "input")
ANSWERS = ("output", "response", "answer", "solution", "completion")
PAIRS = (
    ("instruction", "response"),  # Dolly
    ("question", "answer"),
    ("prompt", "response"),
    ("query", "response"),
    ("question", "response"),  # OpenOrca
    ("query", "answer"),
    ("prompt", "answer"),
    ("problem", "solution"),
    ("input", "output"),
    *itertools.product(QUESTIONS, ANSWERS),
)
# Ours to theirs.
WELL_KNOWN: tuple[dict[str, str], ...] = (
    {"conversations": "conversation"},
    *({"instruction": question, "output": answer} for question, answer in PAIRS),
)
WELL_KNOWN_OPTIONAL = {"input": "context", "system": "system_prompt", "tools": "functions"}


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A parsed row, and what happened to its columns.

    Attributes:
        row: its form.
        renamed: columns that were recognized by another name: ours to theirs.
        unused: columns with a value that the form does not hold.
        named: the columns that the config names, and whether the row has them.
    """

    row: Row
    renamed: Mapping[str, str]
    unused: frozenset[str]
    named: Mapping[str, bool]


def parse(row: Any, format: str = "auto", columns: Mapping[str, str] | None = None) -> Parsed:
    """Parse one row into its form.

    Args:
        row: a mapping from column to value.
        format: one of `COLUMNS`, or `auto` to detect it from the columns.
        columns: the file's names of our columns: `{"instruction": "question"}`.

    Raises:
        RowError: a value is missing or has the wrong type.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"expected an object, not {shorten(row)}")
    # Table formats give every row every column; treat null as missing.
    present = {name: value for name, value in row.items() if value is not None}
    given = dict(columns or {})
    names = _rename(present, given)
    format, recognized = _recognize(names, format, given)
    names = {o: t for o, t in names.items() if t not in recognized.values()} | recognized
    taken = {ours: names[ours] for ours in COLUMNS[format] | OPTIONAL[format] if ours in names}
    values = {ours: present[theirs] for ours, theirs in taken.items()}
    parsed = PARSERS[format](values)
    used = set(taken.values())
    if isinstance(parsed, Completion):
        used = {names["prompt"], names["completion"]}
    renamed = {
        ours: theirs
        for ours, theirs in taken.items()
        if ours != theirs and ours not in given and theirs in used
    }
    named = {theirs: theirs in present for theirs in given.values()}
    return Parsed(parsed, renamed, frozenset(present.keys() - used), named)


def _rename(present: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Our names of the row's columns, by `data.columns`, else their own.

    `Question` and ` answer`, as the headers of CSV files have them, are `question` and `answer`.
    """
    taken = set(columns.values())
    left = [name for name in present if name not in taken and name not in columns]
    plain = collections.Counter(_plain(name) for name in left)
    names = {_plain(name) if plain[_plain(name)] == 1 else name: name for name in left}
    mapped = {ours: theirs for ours, theirs in columns.items() if theirs in present}
    return {ours: theirs for ours, theirs in names.items() if ours not in columns} | mapped


def _plain(name: Any) -> str:
    return str(name).strip().casefold()


def _recognize(
    names: Mapping[str, str], format: str, given: Mapping[str, str]
) -> tuple[str, dict[str, str]]:
    """The row's format, and the well-known names that its columns go by: ours to theirs.

    A column that the config names (`given`) goes by no other name.

    Raises:
        RowError: no format matches, or not the one that was asked for.
    """
    optional = {
        ours: theirs
        for ours, theirs in WELL_KNOWN_OPTIONAL.items()
        if theirs in names and ours not in names and ours not in given
    }
    formats = COLUMNS if format == "auto" else {format: COLUMNS[format]}
    for name, needed in formats.items():
        if needed <= names.keys():
            # `context` beside these columns is not known to be Alpaca's input.
            known = OPTIONAL[name] - {"input"}
            return name, {o: names[t] for o, t in optional.items() if o in known}
    for other in WELL_KNOWN:
        if any(ours in given and theirs != ours for ours, theirs in other.items()):
            continue
        for name, needed in formats.items():
            if needed == other.keys() and set(other.values()) <= names.keys():
                return name, {ours: names[theirs] for ours, theirs in (optional | other).items()}
    kind: Kind = "unknown columns"
    if format != "auto":
        missing = ", ".join(sorted(COLUMNS[format] - names.keys()))
        raise RowError(f"format {format} needs {missing}; the row has {_listed(names)}", kind)
    listed = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, needed in COLUMNS.items())
    raise RowError(
        f"columns {_listed(names)} match no known format ({listed}); name them in data.columns",
        kind,
    )


def _listed(names: Mapping[str, str]) -> list[str]:
    """The columns as the file calls them."""
    return sorted(map(str, names.values()))


def _messages(row: Mapping[str, Any]) -> Chat:
    return _chat(row, read_messages(row["messages"], "messages"))


def _conversations(row: Mapping[str, Any]) -> Chat:
    return _chat(row, read_messages(row["conversations"], "conversations", sharegpt=True))


def _prompt_completion(row: Mapping[str, Any]) -> Row:
    prompt, completion = map(unpacked, (row["prompt"], row["completion"]))
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list | str):
        before = read_messages(prompt, "prompt")
        if isinstance(completion, str):
            after = Messages([_turn("assistant", completion)], {}, ("completion",))
        else:
            after = read_messages(completion, "completion")
        return _chat(row, before, after)
    raise RowError(
        "prompt and completion must both be texts or both lists of messages, or a list and a text, "
        f"not {type(prompt).__name__} and {type(completion).__name__}"
    )


def _alpaca(row: Mapping[str, Any]) -> Chat:
    content = read_text(row["instruction"], "instruction")
    if row.get("input"):
        # Wording from the guide's notebook (Phi-3-finetune-lora-python.ipynb).
        content += "\n Input: " + read_text(row["input"], "input")
    answer = read_text(row["output"], "output")
    turns = [_turn("user", content), _turn("assistant", answer)]
    past = _history(row.get("history"))
    labels = (*past.labels, "instruction", "output")
    return _chat(row, Messages([*past.messages, *turns], past.flags, labels))


def _input_output(row: Mapping[str, Any]) -> Segments:
    value = row["segments"]
    if not isinstance(value, list) or not value:
        raise RowError(f"segments: expected a list of segments, not {shorten(value)}")
    parts = []
    for number, item in enumerate(value):
        place = f"segments[{number}]"
        if not isinstance(item, Mapping):
            raise RowError(f"{place}: expected an object with text and label")
        label = item.get("label")
        if not isinstance(label, bool | int) or label not in (0, 1):
            raise RowError(f"{place}.label: expected true or false, not {shorten(label)}")
        other = sorted(str(key) for key in item if key not in ("text", "label"))
        if other:
            raise RowError(f"{place}: {', '.join(other)} beside its text and label")
        parts.append((read_text(item.get("text"), f"{place}.text"), bool(label)))
    return Segments(tuple(parts))


def _text(row: Mapping[str, Any]) -> Text:
    return Text(read_text(row["text"], "text"))


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _history(value: Any) -> Messages:
    """Alpaca's earlier turns: pairs of question and answer, or messages."""
    if isinstance(value, str) and value.strip():
        value = from_json(value, "history")
    if not value or (isinstance(value, str) and not value.strip()):
        return Messages([], {}, ())
    pairs = isinstance(value, list) and all(isinstance(pair, list | tuple) for pair in value)
    if not pairs:
        return read_messages(value, "history")
    messages, labels = [], []
    for number, pair in enumerate(value):
        if len(pair) != 2:
            raise RowError(f"history[{number}]: expected a question and an answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(_turn(role, read_text(text, f"history[{number}]")))
            labels.append(f"history[{number}]")
    return Messages(messages, {}, tuple(labels))


def _chat(row: Mapping[str, Any], *parts: Messages) -> Chat:
    """A chat of one list of messages, or of a prompt and what is learned after it."""
    messages = [message for part in parts for message in part.messages]
    labels = [label for part in parts for label in part.labels]
    flags: dict[int, bool] = {}
    start = 0
    for part in parts:
        flags |= {start + index: flag for index, flag in part.flags.items()}
        start += len(part.messages)
    learn_from = len(parts[0].messages) if len(parts) > 1 else 0
    system = row.get("system")
    if system is not None and read_text(system, "system").strip():
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        if first is None:
            messages, labels = [_turn("system", system), *messages], ["system", *labels]
            flags = {index + 1: flag for index, flag in flags.items()}
            learn_from += bool(learn_from)
        elif first.get("content") != system:
            raise RowError(f"both a system column and a system message in {labels[0]}")
    tools, text = read_tools(row.get("tools"), "tools")
    return Chat(messages, learn_from, tools, text, flags, tuple(labels))


PARSERS: dict[str, Callable[[Mapping[str, Any]], Row]] = {
    "messages": _messages,
    "conversations": _conversations,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "input_output": _input_output,
    "text": _text,
}
