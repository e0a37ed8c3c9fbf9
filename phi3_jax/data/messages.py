"""Read a row's messages and tools: roles by their other names, contents, calls, learning flags.

Every key of a message is kept, so that the chat template sees what the row says.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from phi3_jax.data.json_text import parse_json
from phi3_jax.data.roles import ROLES, known_role
from phi3_jax.data.rows import Message, RowError, shorten

# OpenAI's, Axolotl's, and ms-swift's ways to say whether a turn is learned.
FLAGS = ("weight", "train", "training", "loss")
# Axolotl's ways to learn a part of a turn.
PART_FLAGS = ("train_detail", "training_detail")
EMPTY: tuple[Any, ...] = (None, [], {}, "")
ROUND = {"system": "system", "input": "user", "output": "assistant"}
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclasses.dataclass(frozen=True)
class Messages:
    """The messages of one column, with their flags and places."""

    messages: list[Message]
    flags: dict[int, bool]
    labels: tuple[str, ...]


def read_messages(value: Any, where: str, sharegpt: bool = False) -> Messages:
    """Read a list of messages.

    Args:
        value: a list of objects with `role` and `content`, or `from` and `value`, or rounds with
            `input` and `output`; the same as JSON text; or the dictionary of lists that older
            versions of `datasets` store.
        where: the column's name, for errors.
        sharegpt: `from` and `value` win over `role` and `content` where a message has both.

    Raises:
        RowError: a wrong type, an unknown speaker, a content that is not text.
    """
    value = _as_list(value, where)
    messages: list[Message] = []
    flags: dict[int, bool] = {}
    labels: list[str] = []
    for place, item in _turns(value, where):
        if not isinstance(item, Mapping):
            names = "from and value" if sharegpt else "role and content"
            raise RowError(f"{place}: expected an object with {names}")
        message = _read_message(item, place, sharegpt)
        flag = _flag(message, place)
        if flag is not None:
            flags[len(messages)] = flag
        messages.append(message)
        labels.append(place)
    return Messages(messages, flags, tuple(labels))


def read_text(value: Any, where: str) -> str:
    """Check that a value is text, and return it.

    Raises:
        RowError: it is not text.
    """
    if not isinstance(value, str):
        raise RowError(f"{where}: expected text, not {shorten(value)}")
    return value


def read_tools(value: Any, where: str) -> tuple[list[dict[str, Any]] | None, str | None]:
    """The row's tools and their JSON text; None where there are none.

    Args:
        value: a list of objects, of JSON texts of objects, or the JSON text of such a list.
        where: the column's name, for errors.

    Raises:
        RowError: anything else.
    """
    text = value if isinstance(value, str) and value.strip() else None
    if isinstance(value, str):
        value = from_json(value, where) if text else None
    if isinstance(value, Mapping):
        value, text = [value] if value else [], None
    if value is None or value == []:
        return None, None
    if not isinstance(value, list):
        raise RowError(f"{where}: expected a list of functions, not {shorten(value)}")
    tools = []
    for number, item in enumerate(value):
        if isinstance(item, str):
            item, text = from_json(item, f"{where}[{number}]"), None
        if not isinstance(item, Mapping):
            raise RowError(f"{where}[{number}]: expected an object, not {shorten(item)}")
        tools.append(dict(item))
    return tools, text or json.dumps(tools, ensure_ascii=False)


def unpacked(value: Any) -> Any:
    """A value, or the list of messages whose JSON text it is; other text stays what it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        items = parse_json(value)
    except RowError:
        return value
    speak = all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in items)
    return items if speak else value


def _turns(items: list[Any], where: str) -> Iterator[tuple[str, Any]]:
    """Each message with its place. A round of `input` and `output` (Capybara) is two of them."""
    for number, item in enumerate(items):
        place = f"{where}[{number}]"
        if not isinstance(item, Mapping) or not item.keys() >= {"input", "output"}:
            yield place, item
            continue
        said = {k: v for k, v in item.items() if v not in EMPTY or k in ("input", "output")}
        if other := sorted(str(key) for key in said if key not in ROUND):
            raise RowError(f"{place}: {', '.join(other)} beside its input and output")
        for key, role in ROUND.items():
            if key in said:
                yield f"{place}.{key}", {"role": role, "content": said[key]}


def _as_list(value: Any, where: str) -> list[Any]:
    """The items, from a list, JSON text of one, or a dictionary of equally long lists."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, where)
    if isinstance(value, Mapping) and value:
        columns = list(value.values())
        if all(isinstance(column, list) for column in columns):
            if len({len(column) for column in columns}) > 1:
                raise RowError(f"{where}: its lists differ in length")
            value = [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
    if not isinstance(value, list) or not value:
        kind = "turns" if where == "conversations" else "messages"
        raise RowError(f"{where}: expected a list of {kind}, not {shorten(value)}")
    return value


def from_json(text: str, where: str) -> Any:
    """The value of JSON text.

    Raises:
        RowError: it is not JSON.
    """
    try:
        return parse_json(text)
    except RowError as error:
        raise RowError(f"{where}: {error}") from None


def _read_message(item: Mapping[str, Any], place: str, sharegpt: bool) -> Message:
    # Arrow gives every message every key, so nulls are dropped before the template sees them.
    message = {key: value for key, value in item.items() if value is not None}
    speaker = "from" if "from" in message and (sharegpt or "role" not in message) else "role"
    text = "value" if "value" in message and (sharegpt or "content" not in message) else "content"
    if sharegpt and "role" not in message:
        speaker = "from"
    _refuse_two(message, place, "role", "from")
    _refuse_two(message, place, "content", "value")
    name = message.pop(speaker, None)
    if speaker == "from" and not (isinstance(name, str) and known_role(name)):
        raise RowError(f"{place}: from is {name!r}; known: {', '.join(ROLES)}, function_call")
    name = read_text(name, f"{place}.{speaker}")
    role = known_role(name) or name
    content = message.pop(text, None)
    message = {"role": role, "content": content, **message}
    if role == "function_call":
        message["role"] = "assistant"
        message["tool_calls"] = _calls_of_text(content, f"{place}.{text}")
        del message["content"]
        return message
    if isinstance(message.get("function_call"), Mapping):  # OpenAI's older form
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if "tool_calls" in message:
        message["tool_calls"] = _read_calls(message["tool_calls"], f"{place}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    if content is None and "tool_calls" in message:
        del message["content"]
    elif content is None and text not in item:
        raise RowError(f"{place}: no content; its keys are {', '.join(map(str, item))}")
    else:
        message["content"] = _read_content(content, f"{place}.{text}")
    return message


def _refuse_two(message: Message, place: str, ours: str, theirs: str) -> None:
    """Raise RowError if a message says the same twice and differently, as `value` and `content`."""
    if ours in message and theirs in message:
        said = [message[ours], message[theirs]]
        if ours == "role":
            said = [(isinstance(name, str) and known_role(name)) or name for name in said]
        if said[0] != said[1]:
            raise RowError(f"{place}: {theirs} and {ours} contradict each other")


def _read_content(content: Any, where: str) -> Any:
    """Text, or a list of text parts."""
    if not isinstance(content, list):
        return read_text(content, where)
    parts = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        if not isinstance(part, Mapping):
            raise RowError(f"{where}[{number}]: expected a part of type text")
        said = [key for key, value in part.items() if value is not None]
        kind = part.get("type") or ("text" if "text" in said or not said else said[0])
        if kind not in TEXT_PARTS:
            raise RowError(f"{where}[{number}]: a part of type {kind!r}; only text is supported")
        parts.append({"type": "text", "text": read_text(part.get("text"), f"{where}[{number}]")})
        # The responses of OpenAI's API have empty `annotations` in every part.
        other = [key for key in part if key not in ("type", "text") and part[key] not in EMPTY]
        if other:
            raise RowError(f"{where}[{number}]: {', '.join(map(str, other))} beside its text")
    if not parts:
        raise RowError(f"{where}: expected text, not []")
    return parts


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str):
        calls = from_json(calls, where) if calls.strip() else []
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, list):
        raise RowError(f"{where}: expected a list of calls, not {shorten(calls)}")
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}[{number}]: expected a call with the function's name")
    return [dict(call) for call in calls]


def _calls_of_text(content: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a `function_call` turn (ShareGPT), whose value is JSON text."""
    value = from_json(content, where) if isinstance(content, str) else content
    calls = _read_calls(value, where)
    if not calls:
        raise RowError(f"{where}: expected a call with the function's name")
    return [
        call if "function" in call else {"type": "function", "function": call} for call in calls
    ]


def _flag(message: Message, place: str) -> bool | None:
    """Whether the message asks to be learned."""
    for key in PART_FLAGS:
        if message.get(key):
            raise RowError(
                f"{place}: {key} asks to learn a part of a turn, which cannot be done here; "
                "use train: true or false"
            )
    asked = {}
    for key in FLAGS:
        if key not in message:
            continue
        value = message[key]
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(
                f"{place}.{key}: {shorten(value)} cannot be honored; a turn is learned (1, true) "
                "or not (0, false)"
            )
        asked[key] = bool(value)
    if len(set(asked.values())) > 1:
        raise RowError(f"{place}: {' and '.join(asked)} contradict each other")
    return next(iter(asked.values()), None)
