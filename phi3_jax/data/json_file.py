"""The rows of a JSON or JSONL file, whichever of the two its name says."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from phi3_jax.data.json_list import read_list
from phi3_jax.data.json_text import Value, items, members, parse_json, values
from phi3_jax.data.rows import RowError, Source
from phi3_jax.errors import UserError

# A JSON object that wraps the rows: `{"data": [...]}`.
WRAPPERS = ("data", "rows", "examples", "instances")
# Up to this many bytes a file is read as a whole, to see what it is.
LARGE = 2**26


def read_json(file: str, content: BinaryIO, is_json: bool) -> Iterator[Source]:
    """One object a line; or one list of objects, one object, or objects over several lines.

    Of a file larger than `LARGE`, only lines and lists are read in flat memory.

    Args:
        file: the file's name, for errors.
        content: UTF-8.
        is_json: the name says `.json`, so that a list is a list of rows.

    Raises:
        UserError: a list that is not valid JSON.
    """
    head = content.read(LARGE)
    whole = head.lstrip().startswith(b"[") and is_json
    if whole and len(head) == LARGE:
        yield from read_list(file, head, content)
        return
    if is_document(head, is_json):
        head += content.read()
        document = list(_read_document(file, head, must=whole))
        if document or whole:
            yield from document
            return
    # Not str.splitlines: it also splits at U+2028 inside a string.
    lines = itertools.chain(io.BytesIO(head + content.readline()), content)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield parse_line(f"{file}:{number}", line.removesuffix(b"\n"))


def is_document(head: bytes, is_json: bool) -> bool:
    """Whether a file that begins with `head` may be something else than one value a line."""
    filled = (line for line in head.split(b"\n") if line.strip())
    first, second = next(filled, b""), next(filled, None)
    return (first.lstrip().startswith(b"[") and is_json) or second is None or not _is_json(first)


def parse_line(where: str, line: bytes) -> Source:
    """The row of a line of JSONL."""
    try:
        return Source(where, parse_json(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Source(where, None, f"not UTF-8 ({error.reason} at byte {error.start + 1})")
    except RowError as error:
        return Source(where, None, str(error))


def _is_json(line: bytes) -> bool:
    """Whether a line is a value, though maybe a bad one, and not the beginning of a longer one."""
    try:
        return len(list(values(line.decode("utf-8", "replace")))) == 1
    except json.JSONDecodeError:
        return False


def _read_document(file: str, content: bytes, must: bool) -> Iterator[Source]:
    """The rows of a file that does not have one value per line; nothing if it is not JSON.

    Raises:
        UserError: `must` is set and the file is not valid JSON.
    """
    # Bytes that are not UTF-8 become lone surrogates, so that only their row is refused.
    text = content.decode("utf-8", "surrogateescape")
    try:
        found = list(values(text))
        rows = _rows_inside(text, found[0]) if len(found) == 1 else None
    except json.JSONDecodeError as error:
        if must:
            raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from None
        return
    line, counted = 1, 0
    for number, value in enumerate(found if rows is None else rows, start=1):
        problem = value.problem or _bad_bytes(text, value)
        if rows is None:
            line, counted = line + text.count("\n", counted, value.start), value.start
            yield Source(f"{file}:{line}", value.value, problem)
        else:
            yield Source(f"{file}: row {number}", value.value, problem)


def _rows_inside(text: str, found: Value) -> list[Value] | None:
    """The rows of a list, or of an object that holds nothing but a list of them and its header."""
    if found.problem is None:
        rows = _unwrap(found.value)
        if rows is None:
            return None
        if not _bad_bytes(text, found):
            return [Value(row, None, 0, 0) for row in rows]
    start = found.start
    if text[start] == "{":
        pairs = list(members(text, start))
        lists = [(name, value) for name, value in pairs if text[value.start] == "["]
        if len(dict(pairs)) < len(pairs) or len(lists) != 1 or lists[0][0] not in WRAPPERS:
            return None
        start = lists[0][1].start
    return list(items(text, start)) if text[start] == "[" else None


def _unwrap(value: Any) -> list[Any] | None:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        for name in WRAPPERS:
            rows = value.get(name)
            others = [item for key, item in value.items() if key != name]
            if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
                if not any(isinstance(item, list) for item in others):
                    return rows
    return None


def _bad_bytes(text: str, found: Value) -> str | None:
    try:
        text[found.start : found.end].encode()
    except UnicodeEncodeError:
        return "not UTF-8"
    return None
