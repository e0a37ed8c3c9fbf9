"""The rows of one file: JSON, JSONL, CSV, Parquet or Arrow, maybe compressed.

JSON and CSV are read here rather than with `datasets`, so that an error can cite the line, a bad
row costs only that row, and a value stays what the file says: `NA` in a CSV file is text.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import dataclasses
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from phi3_jax.data.json_text import DECODER, parse_json, problem
from phi3_jax.data.rows import RowError
from phi3_jax.errors import UserError

FORMATS = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst", ".bz2")
# A JSON object that wraps the rows: `{"data": [...]}`.
WRAPPERS = ("data", "rows", "examples", "instances")
# Some editors and shells write UTF-16, with a byte order mark.
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LINES = " \t\r\n"


@dataclasses.dataclass(frozen=True)
class Source:
    """One raw row and its location; `problem` is set if it could not be read."""

    where: str
    row: Any
    problem: str | None = None


def format_of(file: Path) -> str | None:
    """The file's format by its name, without the compression; None if it holds no rows."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def read_file(file: Path) -> Iterator[Source]:
    """The rows of a file.

    Raises:
        UserError: an unknown format, or a file that cannot be read at all.
    """
    readers: dict[str, Callable[[Path], Iterator[Source]]] = {
        ".json": _read_json,
        ".jsonl": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_table,
        ".arrow": _read_table,
    }
    format = format_of(file)
    if format is None:
        raise UserError(
            f"{file}: expected one of {', '.join(FORMATS)}, optionally followed by "
            f"{', '.join(COMPRESSED)}"
        )
    return readers[format](file)


def rows_of_table(table: Any, where: str) -> Iterator[Source]:
    """The rows of a `datasets` table, without the nulls that Arrow puts into every object."""
    for number, row in enumerate(table, start=1):
        yield Source(f"{where}: row {number}", _without_nulls(row))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_bytes(file: Path) -> bytes:
    """The file's contents, decompressed, as UTF-8 without a byte order mark."""
    try:
        if file.suffix.lower() == ".gz":
            content = gzip.decompress(file.read_bytes())
        elif file.suffix.lower() == ".bz2":
            content = bz2.decompress(file.read_bytes())
        elif file.suffix.lower() == ".zst":
            with pyarrow.input_stream(str(file), compression="zstd") as stream:
                content = stream.read()
        else:
            content = file.read_bytes()
        if content.startswith(UTF16_MARKS):
            return content.decode("utf-16").encode()
    except (OSError, EOFError, ValueError, zlib.error, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    return content.removeprefix(codecs.BOM_UTF8)


def _read_json(file: Path) -> Iterator[Source]:
    """One object a line; or one list of objects, one object, or objects over several lines."""
    content = _read_bytes(file)
    lines = content.split(b"\n")  # not str.splitlines: it also splits at U+2028 inside a string
    filled = (line for line in lines if line.strip())
    first, second = next(filled, b""), next(filled, None)
    listed = file.name.lower().removesuffix(file.suffix if file.suffix in COMPRESSED else "")
    whole = first.lstrip().startswith(b"[") and listed.endswith(".json")
    if whole or second is None or not _is_json(first):
        document = list(_read_document(file, content, must=whole))
        if document:
            yield from document
            return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _parse_line(f"{file}:{number}", line)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        # A line that begins a longer object, or a bad one among good ones?
        return not isinstance(error, json.JSONDecodeError)
    return True


def _parse_line(where: str, line: bytes) -> Source:
    try:
        return Source(where, parse_json(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Source(where, None, f"not UTF-8 ({error.reason} at byte {error.start + 1})")
    except RowError as error:
        return Source(where, None, str(error))


def _read_document(file: Path, content: bytes, must: bool) -> Iterator[Source]:
    """The rows of a file that does not have one value per line; nothing if it is not JSON.

    Raises:
        UserError: `must` is set and the file is not valid JSON.
    """
    try:
        text = content.decode("utf-8")
        values, lines = [], []
        position, line, counted = _skip(text, 0), 1, 0
        while position < len(text):
            value, end = DECODER.raw_decode(text, position)
            values.append(value)
            line, counted = line + text.count("\n", counted, position), position
            lines.append(line)
            position = _skip(text, end)
    except json.JSONDecodeError as error:
        if must:
            raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from None
        return
    except (ValueError, RecursionError) as error:
        if must:
            raise UserError(f"{file}: not valid JSON ({problem(error)})") from None
        return
    if len(values) > 1:
        yield from (Source(f"{file}:{n}", v) for n, v in zip(lines, values, strict=True))
    elif values:
        rows = _unwrap(values[0])
        if rows is None:
            yield Source(f"{file}:{lines[0]}", values[0])
        else:
            yield from (Source(f"{file}: row {n}", row) for n, row in enumerate(rows, start=1))


def _unwrap(value: Any) -> list[Any] | None:
    """The rows of a list, or of an object that holds nothing but a list of them and its header."""
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


def _skip(text: str, position: int) -> int:
    """The next position that is not whitespace."""
    while position < len(text) and text[position] in LINES:
        position += 1
    return position


def _read_csv(file: Path) -> Iterator[Source]:
    """A line a row; every value is text: an answer "42" is a string. An empty field is missing."""
    # Bytes that are not UTF-8 become lone surrogates, so that only their line is refused.
    text = io.StringIO(_read_bytes(file).decode("utf-8", "surrogateescape"), newline="")
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(text, strict=True)
    try:
        columns = next(reader, [])
    except csv.Error as error:
        raise UserError(f"{file}:1: not valid CSV ({error})") from None
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UserError(f"{file}:1: duplicate column {twice[0]!r}")
    while True:
        where = f"{file}:{reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Source(where, None, f"not valid CSV ({error})")
            continue
        if not fields:
            continue
        row = {name: field or None for name, field in zip(columns, fields, strict=False)}
        if len(fields) > len(columns):
            yield Source(where, None, f"{len(fields)} fields, the header has {len(columns)}")
        elif any("\udc80" <= character <= "\udcff" for field in fields for character in field):
            yield Source(where, None, "not UTF-8")
        else:
            yield Source(where, row)


def _read_table(file: Path) -> Iterator[Source]:
    try:
        if format_of(file) == ".arrow":
            table = datasets.Dataset.from_file(str(file))
        else:
            table = datasets.load_dataset("parquet", data_files=str(file), split="train")
    except (
        datasets.exceptions.DatasetGenerationError,
        pyarrow.ArrowException,
        ValueError,
        OSError,
    ) as error:
        cause = error.__cause__ or error
        raise UserError(f"{file}: cannot be read ({cause})") from None
    yield from rows_of_table(table, str(file))
