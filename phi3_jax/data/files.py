"""A file of rows: its format by its name, its content, and the rows of JSON and CSV files.

JSON and CSV are not read with `datasets`, so that an error can cite the line, a bad row costs only
that row, and a value stays what the file says: `NA` in a CSV file is text.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import dataclasses
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

import pyarrow
import xxhash

from phi3_jax.data.csv_file import read_csv
from phi3_jax.data.json_file import LARGE, is_document, read_json
from phi3_jax.data.rows import Source
from phi3_jax.errors import UserError

FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_READ_ERRORS = (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
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
    def kind(self) -> str:
        """The format and the compression, which with the contents decide the rows: `.csv.gz`."""
        return self.format + (self.path.suffix.lower() if self.is_compressed else "")

    @property
    def is_compressed(self) -> bool:
        """Whether the file as a whole is compressed."""
        return self.path.suffix.lower() in COMPRESSED

    def digest(self) -> str:
        """A digest of the contents: a time stamp would miss a change.

        Every start reads every file for it, so it has to be faster than a disk, which SHA-256 is
        not.

        Raises:
            UserError: the file cannot be read, or its data was not downloaded.
        """
        buffer = bytearray(2**18)
        filled = memoryview(buffer)
        try:
            with self.path.open("rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                counts = iter(lambda: file.readinto(buffer), 0)
                digest = digest_of(filled[:count] for count in counts)
            if buffer.startswith(LFS_POINTER):
                raise UserError(
                    f"{self.label}: not the data, but what Git LFS puts in its place; run `git lfs "
                    "pull` in the repository, or download it with `hf download`"
                )
            return digest
        except OSError as error:
            raise UserError(f"{self.label}: cannot be read ({error})") from None


def digest_of(pieces: Iterable[bytes | memoryview]) -> str:
    """A digest of contents that are given in pieces, however they are cut."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return str(digest.hexdigest())


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
    if file.is_compressed or file.format not in (".json", ".jsonl", ".ndjson"):
        return False
    with file.path.open("rb") as lines:
        head = lines.read(2)
        if head in UTF16_MARKS:
            return False
        lines.seek(0)
        filled = (line for line in iter(lambda: lines.readline(LARGE), b"") if line.strip())
        first, second = next(filled, b""), next(filled, b"")
    if len(first) == LARGE:
        return False  # a document on one line
    return not is_document(first.removeprefix(codecs.BOM_UTF8) + second, file.format == ".json")


def read_file(file: DataFile) -> Iterator[Source]:
    """The rows of a JSON or CSV file, read as a stream.

    Raises:
        UserError: it cannot be read at all.
    """
    with open_file(file) as content:
        yield from read_rows(file.label, file.format, content)


def open_file(file: DataFile) -> contextlib.AbstractContextManager[BinaryIO]:
    """A file's content, decompressed; see `open_bytes`."""
    return open_bytes(file.label, file.path.name, lambda: file.path.open("rb"))


def read_rows(label: str, form: str, content: BinaryIO) -> Iterator[Source]:
    """The rows of JSON or CSV.

    Args:
        label: what errors call the file.
        form: its format, one of `FORMATS` that is text.
        content: what is in it, decompressed.

    Raises:
        UserError: it cannot be read at all.
    """
    with read_errors(label):
        head = content.read(len(codecs.BOM_UTF8))
        if head.startswith(UTF16_MARKS):
            whole = (head + content.read()).decode("utf-16").encode()
            head, content = b"", io.BytesIO(whole)
        start = _Prefixed(head.removeprefix(codecs.BOM_UTF8), content)
        buffered = io.BufferedReader(start, 2**20)
        if form in (".csv", ".tsv"):
            yield from read_csv(label, buffered, "\t" if form == ".tsv" else ",")
        else:
            yield from read_json(label, buffered, is_json=form == ".json")


class _Prefixed(io.RawIOBase):
    """A stream with something put back before it."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._head:
            self._head = self._rest.read(len(buffer))
        piece, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


@contextlib.contextmanager
def open_bytes(label: str, name: str, opened: Callable[[], BinaryIO]) -> Iterator[BinaryIO]:
    """A file's content, decompressed as its name says.

    Args:
        label: what errors call the file.
        name: its name.
        opened: opens it.

    Raises:
        UserError: it cannot be read or decompressed.
    """
    with read_errors(label), opened() as raw:
        suffix = PurePath(name).suffix.lower()
        if suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield cast(BinaryIO, unzipped)
        elif suffix == ".bz2":
            with bz2.BZ2File(raw) as unzipped2:
                yield cast(BinaryIO, unzipped2)
        elif suffix == ".xz":
            with lzma.LZMAFile(raw) as unzipped3:
                yield cast(BinaryIO, unzipped3)
        elif suffix == ".zst":
            with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd") as native:
                yield native
        else:
            yield raw


@contextlib.contextmanager
def read_errors(label: str) -> Iterator[None]:
    """Turn what reading and decompressing raise into one error that names the file."""
    try:
        yield
    except _READ_ERRORS as error:
        raise UserError(f"{label}: cannot be read ({error})") from None
