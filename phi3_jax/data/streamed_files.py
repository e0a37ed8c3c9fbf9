"""Files that are streamed: found by a source's path, and read from any row on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import datasets
import pyarrow

from phi3_jax.config.data import SourceConfig
from phi3_jax.data.chunks import ARROW_MARK, CHUNK_ROWS, without_nulls
from phi3_jax.data.files import (
    COMPRESSED,
    check_format,
    digest_of,
    format_of,
    open_bytes,
    read_errors,
    read_rows,
)
from phi3_jax.data.reading import find_files, remote_files
from phi3_jax.data.remote import Remote, is_url, remote_errors
from phi3_jax.data.rows import Source
from phi3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StreamedFile:
    """A file that is read from its beginning.

    Attributes:
        label: what errors call it.
        size: its bytes; None if unknown.
        opened: opens it.
        guard: turns what reading it raises into one error.
    """

    label: str
    size: int | None
    opened: Callable[[], BinaryIO]
    guard: Callable[[str], contextlib.AbstractContextManager[None]] = read_errors

    def rows(self, start: int) -> Generator[Source, None, None]:
        """Its rows from a number on.

        Raises:
            UserError: it cannot be read.
        """
        with self.guard(self.label):
            yield from self._rows(start)

    def digest(self) -> str:
        """A digest of the contents, which are read as a whole: that of `DataFile`.

        Raises:
            UserError: it cannot be read.
        """
        with self.guard(self.label), self.opened() as content:
            return digest_of(iter(lambda: content.read(2**20), b""))

    def _rows(self, start: int) -> Iterator[Source]:
        form = str(format_of(PurePosixPath(self.label)))
        if form in (".parquet", ".arrow"):
            with self.opened() as content:
                read = _parquet_rows if form == ".parquet" else _arrow_rows
                for number, row in enumerate(read(content, start), start=start + 1):
                    yield Source(f"{self.label}: row {number}", row)
            return
        with open_bytes(self.label, self.label, self.opened) as content:
            yield from itertools.islice(read_rows(self.label, form, content), start, None)


def streamed_files(source: SourceConfig, held_out: Mapping[str, int]) -> list[StreamedFile]:
    """The files of a source, without those that are held out, wherever a copy of them is.

    Args:
        source: the source.
        held_out: of each held-out file, the digest and the bytes.

    Raises:
        UserError: not found, files that cannot be streamed, or all of them held out.
    """
    files = _files(source)
    # A file is read as a whole only if its size does not tell it from the held-out ones.
    sizes = {None, *held_out.values()} if held_out else set()
    kept = [file for file in files if file.size not in sizes or file.digest() not in held_out]
    if not kept:
        raise UserError(
            f"data.path {source.path}: data.test_path holds out every file of it; hold out fewer, "
            "or stream other files"
        )
    return kept


def _files(source: SourceConfig) -> list[StreamedFile]:
    if not is_url(source.path):
        found = find_files(source.path, source.name, source.split)
        files = [
            StreamedFile(file.label, file.path.stat().st_size, functools.partial(_open, file.path))
            for file in found.files
        ]
    else:
        remote = Remote.open(source.path)
        if remote.is_file():
            check_format(PurePosixPath(remote.name()))
            names: list[PurePosixPath | None] = [None]
        else:
            names = [*remote_files(remote, source.name, source.split)[0]]
        base = remote.url.partition("?")[0].rstrip("/")
        files = [
            StreamedFile(
                f"{base}/{name}" if name else base,
                remote.size(name),
                functools.partial(remote.open_file, name),
                remote_errors,
            )
            for name in names
        ]
    for file in files:
        name = PurePosixPath(file.label)
        if format_of(name) in (".parquet", ".arrow") and name.suffix in COMPRESSED:
            raise UserError(f"{file.label}: a compressed table cannot be streamed; decompress it")
    return files


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _parquet_rows(content: BinaryIO, start: int) -> Iterator[dict[str, Any]]:
    parquet: Any = importlib.import_module("pyarrow.parquet")
    with parquet.ParquetFile(content) as table:
        groups = list(range(table.num_row_groups))
        while groups and table.metadata.row_group(groups[0]).num_rows <= start:
            start -= table.metadata.row_group(groups.pop(0)).num_rows
        if groups:
            batches = table.iter_batches(batch_size=CHUNK_ROWS, row_groups=groups)
            yield from _decoded(batches, table.schema_arrow, start)


def _arrow_rows(content: BinaryIO, start: int) -> Iterator[dict[str, Any]]:
    """`datasets` writes streams; a file in Arrow's other form begins with a mark."""
    head = content.read(len(ARROW_MARK))
    content.seek(0)
    if head == ARROW_MARK:
        with pyarrow.ipc.open_file(content) as table:
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
            yield from _decoded(batches, table.schema, start)
        return
    with pyarrow.ipc.open_stream(content) as stream:
        yield from _decoded(stream, stream.schema, start)


def _decoded(batches: Iterable[Any], schema: Any, start: int) -> Iterator[dict[str, Any]]:
    """The rows as `datasets` gives them, without the nulls of Arrow, from a number on."""
    features = datasets.Features.from_arrow_schema(schema)
    for batch in batches:
        if start >= batch.num_rows:
            start -= batch.num_rows
            continue
        for row in batch.slice(start).to_pylist():
            yield without_nulls(features.decode_example(row), features)
        start = 0
