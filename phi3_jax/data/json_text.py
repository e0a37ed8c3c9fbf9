"""JSON text to values: what cannot be read, or would lose something, is an error of the row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from phi3_jax.data.rows import RowError

SPACE = re.compile(r"[ \t\r\n]*")
# Strings are skipped as wholes, so that the brackets in them do not count.
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_SCALAR = re.compile(r"[^ \t\r\n,\]}]*")


class Value(NamedTuple):
    """A JSON value in a text, from `start` to `end`; `problem` is set if it cannot be a row."""

    value: Any
    problem: str | None
    start: int
    end: int


def parse_json(text: str) -> Any:
    """One JSON value.

    Raises:
        RowError: not JSON, a duplicate key, nested too deeply, or an integer of thousands
            of digits.
    """
    try:
        return DECODER.decode(text)
    except RowError:
        raise
    except (ValueError, RecursionError) as error:
        raise RowError(f"not valid JSON ({problem(error)})", "unreadable") from None


def problem(error: Exception) -> str:
    """What the JSON reader says, in a few words."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error).split(";")[0]


def values(text: str) -> Iterator[Value]:
    """The JSON values of a text, one after the other.

    Raises:
        json.JSONDecodeError: the text is not JSON.
    """
    position = skip_space(text, 0)
    while position < len(text):
        found = value_at(text, position)
        yield found
        position = skip_space(text, found.end)


def items(text: str, start: int) -> Iterator[Value]:
    """The items of the list that begins at `start`, read one by one.

    Raises:
        json.JSONDecodeError: the list is not JSON.
    """
    position = skip_space(text, start + 1)
    while text[position : position + 1] != "]":
        found = value_at(text, position)
        yield found
        position = _after_item(text, found.end, "]")


def members(text: str, start: int) -> Iterator[tuple[str, Value]]:
    """The keys and values of the object that begins at `start`, read one by one.

    Raises:
        json.JSONDecodeError: the object is not JSON.
    """
    position = skip_space(text, start + 1)
    while text[position : position + 1] != "}":
        key, end = DECODER.raw_decode(text, position)
        colon = skip_space(text, end)
        if text[colon : colon + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, colon)
        found = value_at(text, skip_space(text, colon + 1))
        yield str(key), found
        position = _after_item(text, found.end, "}")


def skip_space(text: str, position: int) -> int:
    """The next position that is not whitespace."""
    match = SPACE.match(text, position)
    assert match is not None
    return match.end()


def value_at(text: str, start: int) -> Value:
    """The value that begins at `start`.

    Raises:
        json.JSONDecodeError: it is not JSON.
    """
    try:
        value, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except RowError as error:
        return Value(None, str(error), start, _end_of_value(text, start))
    except (ValueError, RecursionError) as error:
        message = f"not valid JSON ({problem(error)})"
        return Value(None, message, start, _end_of_value(text, start))
    return Value(value, None, start, end)


def _end_of_value(text: str, start: int) -> int:
    """Where a value ends that the decoder gave up on, by its brackets.

    Raises:
        json.JSONDecodeError: it does not end.
    """
    if text[start] not in '[{"':
        scalar = _SCALAR.match(text, start)
        assert scalar is not None
        return scalar.end()
    depth = 0
    for token in _TOKENS.finditer(text, start):
        if token[0] in ("[", "{"):
            depth += 1
        elif token[0] in ("]", "}"):
            depth -= 1
            if not depth:
                return token.end()
    raise json.JSONDecodeError("Unexpected end", text, len(text))


def _after_item(text: str, end: int, closing: str) -> int:
    """Where the next item begins, or the closing bracket is."""
    position = skip_space(text, end)
    if text[position : position + 1] == closing:
        return position
    if text[position : position + 1] != ",":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    return skip_space(text, position + 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without duplicate keys, of which the reader would keep only the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise RowError(f"duplicate key {twice[0]!r} in one object", "unreadable")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object)
