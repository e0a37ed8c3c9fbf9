"""The rows of a CSV file, read strictly: every value is text, an answer "42" is a string."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from typing import BinaryIO

from phi3_jax.data.rows import Source
from phi3_jax.errors import UserError


def read_csv(file: str, content: BinaryIO, separator: str = ",") -> Iterator[Source]:
    """A line a row, with a header. An empty field is missing.

    Args:
        file: the file's name, for errors.
        content: UTF-8, of which a record at a time is in memory.
        separator: what is between two fields.

    Raises:
        UserError: no readable header, a column that appears twice, or a quote that is not closed.
    """
    # Bytes that are not UTF-8 become lone surrogates, so that only their line is refused.
    text = io.TextIOWrapper(content, "utf-8", errors="surrogateescape", newline="")
    record: list[str] = []  # the lines of the last record

    def lines() -> Iterator[str]:
        for line in text:
            record.append(line)
            yield line

    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines(), strict=True, delimiter=separator)
    columns = _header(file, reader, record, separator)
    while True:
        begin = reader.line_num
        where = f"{file}:{begin + 1}"
        record.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Source(where, None, _problem(file, record, begin, error, separator))
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


def _header(file: str, reader: Iterator[list[str]], record: list[str], separator: str) -> list[str]:
    try:
        columns = next(reader, [])
    except csv.Error as error:
        raise UserError(f"{file}:1: {_problem(file, record, 0, error, separator)}") from None
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UserError(f"{file}:1: duplicate column {twice[0]!r}")
    return columns


def _problem(file: str, record: list[str], begin: int, error: csv.Error, separator: str) -> str:
    """What is wrong with a record that begins after line `begin`.

    Raises:
        UserError: its last quote is not closed, so that it holds the rest of the file.
    """
    opened = _last_quote(record, separator) + begin + 1
    if str(error) == "unexpected end of data":
        raise UserError(
            f'{file}:{opened}: a quote (") opens here and is not closed in the rest of the file; '
            'close it, or write a quote inside a quoted field as ""'
        )
    across = f"; the quoted field begins in line {opened}" if len(record) > 1 else ""
    return f"not valid CSV ({error}{across})"


def _last_quote(record: list[str], separator: str) -> int:
    """Index of the line in which the last quoted field of a record opens."""
    opened, inside, fresh = 0, False, True
    for number, line in enumerate(record):
        position = 0
        while position < len(line):
            character = line[position]
            if inside and character == '"':
                doubled = line[position + 1 : position + 2] == '"'
                position += doubled
                inside = doubled
            elif character == '"' and fresh:
                opened, inside = number, True
            fresh = not inside and character == separator
            position += 1
        fresh = fresh and not inside
    return opened
