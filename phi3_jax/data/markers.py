"""Markers in place of what a chat says, to see in a rendering what the template wrote where."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_jax.data.rows import Message

# Letters and digits only: it survives trimming, JSON and upper case. The number that follows is
# closed by a letter, so that marker 1 is not found in marker 10.
MARKER = "QZMARK7X"

Tools = Sequence[dict[str, Any]]


def marker(index: int, what: str = "") -> str:
    """A text that no chat has, for the message with this index."""
    return f"{MARKER}{what}N{index}E"


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a call, which some data sets wrap in an object."""
    function: Mapping[str, Any] = call.get("function", call)
    return function


def mark(index: int, message: Message) -> Message:
    """The message with markers for its content, its calls' names and their arguments."""
    marked = dict(message)
    if isinstance(marked.get("content"), str):
        marked["content"] = marker(index)
    elif "content" in marked:
        marked["content"] = [{"type": "text", "text": marker(index)}]
    if message.get("tools"):
        marked["tools"] = marker(index, "M")
    if message.get("tool_calls"):
        marked["tool_calls"] = [
            _mark_call(call, marker(index, f"C{n}"), marker(index, f"A{n}"))
            for n, call in enumerate(message["tool_calls"])
        ]
    return marked


def _mark_call(call: Mapping[str, Any], name: str, argument: str) -> dict[str, Any]:
    function = dict(function_of(call))
    function["name"] = name
    given = function.get("arguments")
    if isinstance(given, str):
        function["arguments"] = json.dumps({"a": argument})
    elif isinstance(given, Mapping) and given:
        function["arguments"] = {"a": argument}
    else:
        function["name"] = name + argument  # without arguments, there are none to lose
    return {**call, "function": function} if "function" in call else function


def mark_tools(tools: Tools) -> list[dict[str, Any]]:
    """The tools, the first one with a marker for its name."""
    first = dict(tools[0])
    inner = first.get("function")
    if isinstance(inner, Mapping):
        first["function"] = {**inner, "name": marker(0, "T")}
    else:
        first["name"] = marker(0, "T")
    return [first, *map(dict, tools[1:])]
