"""JSON text to values: what cannot be read, or would lose something, is an error of the row."""

from __future__ import annotations

import json
from typing import Any

from phi3_jax.data.rows import RowError


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
        return f"{error.msg} at column {error.colno}"
    return str(error).split(";")[0]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without duplicate keys, of which the reader would keep only the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise RowError(f"duplicate key {twice[0]!r} in one object", "unreadable")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object)
