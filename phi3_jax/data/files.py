"""A file of rows: its format by its name, its content, and the rows of JSON and CSV files.

JSON and CSV are not read with `datasets`, so that an error can cite the line, a bad row costs only
that row, and a value stays what the file says: `NA` in a CSV file is text.
"""

from __future__ import annotations

import bz2
import codecs
import dataclasses
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath

import pyarrow

from phi3_jax.data.csv_file import read_csv
from phi3_jax.data.json_file import is_document, read_json
from phi3_jax.data.rows import Source
from phi3_jax.errors import UserError

FORMATS = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst", ".bz2")
# Some editors and shells write UTF-16, with a byte order mark.
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A local file with rows.

    Attributes:
        path: where it is.
        label: what errors call it.
    """

    path: Path
    label: str

    @property
    def format(self) -> str:
        """One of `FORMATS`."""
        return str(format_of(self.path))

    @property
    def is_compressed(self) -> bool:
        """Whether the file as a whole is compressed."""
        return self.path.suffix.lower() in COMPRESSED

    def digest(self) -> str:
        """A digest of the contents: a time stamp would miss a change.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{self.label}: cannot be read ({error})") from None


def format_of(file: PurePath) -> str | None:
    """The file's format by its name, without the compression; None if it holds no rows."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def check_format(file: PurePath) -> None:
    """Raise UserError unless the file's name says a known format."""
    if format_of(file) is None:
        raise UserError(
            f"{file}: expected one of {', '.join(FORMATS)}, optionally followed by "
            f"{', '.join(COMPRESSED)}"
        )


def is_plain_jsonl(file: DataFile) -> bool:
    """Whether a file has one JSON value a line, as UTF-8 that need not be decompressed."""
    if file.is_compressed or file.format not in (".json", ".jsonl"):
        return False
    with file.path.open("rb") as lines:
        head = lines.read(2)
        if head in UTF16_MARKS:
            return False
        lines.seek(0)
        filled = (line for line in lines if line.strip())
        first, second = next(filled, b""), next(filled, b"")
    return not is_document(first.removeprefix(codecs.BOM_UTF8) + second, file.format == ".json")


def read_file(file: DataFile) -> Iterator[Source]:
    """The rows of a JSON or CSV file.

    Raises:
        UserError: it cannot be read at all.
    """
    content = read_bytes(file).removeprefix(codecs.BOM_UTF8)
    if content.startswith(UTF16_MARKS):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeError as error:
            raise UserError(f"{file.label}: cannot be read ({error})") from None
    if file.format == ".csv":
        return read_csv(file.label, content)
    return read_json(file.label, content, is_json=file.format == ".json")


def read_bytes(file: DataFile) -> bytes:
    """The file's contents, decompressed.

    Raises:
        UserError: it cannot be read or decompressed.
    """
    suffix = file.path.suffix.lower()
    try:
        if suffix == ".gz":
            return gzip.decompress(file.path.read_bytes())
        if suffix == ".bz2":
            return bz2.decompress(file.path.read_bytes())
        if suffix == ".zst":
            with pyarrow.input_stream(str(file.path), compression="zstd") as stream:
                return bytes(stream.read())
        return file.path.read_bytes()
    except (OSError, EOFError, ValueError, zlib.error, pyarrow.ArrowException) as error:
        raise UserError(f"{file.label}: cannot be read ({error})") from None
