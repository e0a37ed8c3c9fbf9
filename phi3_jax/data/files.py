"""The rows of one file: JSON, JSONL, CSV, Parquet or Arrow, maybe compressed.

JSON and CSV are not read with `datasets`, so that an error can cite the line, a bad row costs only
that row, and a value stays what the file says: `NA` in a CSV file is text.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from phi3_jax.data.csv_file import read_csv
from phi3_jax.data.json_file import read_json
from phi3_jax.data.rows import Source
from phi3_jax.errors import UserError

FORMATS = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst", ".bz2")
# Some editors and shells write UTF-16, with a byte order mark.
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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
        ".json": lambda file: read_json(str(file), _read_bytes(file), is_json=True),
        ".jsonl": lambda file: read_json(str(file), _read_bytes(file), is_json=False),
        ".csv": lambda file: read_csv(str(file), _read_bytes(file)),
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
