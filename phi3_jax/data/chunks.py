"""Files as chunks of consecutive rows, which worker processes read on their own.

| file | chunk |
|---|---|
| JSONL as UTF-8 | a range of its bytes |
| Arrow as a stream, as `datasets` stores it | a range of its rows |
| all others | a range of a temporary file that holds their rows in one of these forms |
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from phi3_jax.data.files import DataFile, is_plain_jsonl, open_file, read_file
from phi3_jax.data.json_file import parse_line
from phi3_jax.data.rows import Source
from phi3_jax.errors import UserError

# What one task holds: few enough that results come steadily, enough that their number is small.
CHUNK_ROWS = 1024
CHUNK_BYTES = 2**22
BOM = b"\xef\xbb\xbf"
ARROW_MARK = b"ARROW1"
# Characters of a message that quotes an error of Arrow's.
_LONGEST_REASON = 300


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a file.

    Attributes:
        path: the file, or the temporary one with its rows.
        kind: lines of JSON as the user wrote them, rows that were read already, or a table.
        begin, end: bytes; rows of a table.
        rows: number of rows.
        line: the number of lines before it (`lines`).
        wanted: positions of the rows that are wanted, ascending; None for all of them.
    """

    path: str
    kind: Literal["lines", "rows", "table"]
    begin: int
    end: int
    rows: int
    line: int = 0
    wanted: list[int] | None = None


def split_into_chunks(file: DataFile, directory: Path) -> list[Chunk]:
    """The chunks of a file, in order.

    Args:
        file: the file.
        directory: where a temporary file may be put, for as long as the chunks are read.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if file.format in (".arrow", ".parquet"):
            if file.is_compressed:
                target = _temporary(file, directory, f".raw{file.format}")
                with target.open("wb") as out, open_file(file) as content:
                    shutil.copyfileobj(content, out, 2**20)
                file = dataclasses.replace(file, path=target)
            if file.format == ".parquet" or is_arrow_file(file.path):
                file = _copy_table(file, directory)
            return _chunks_of_table(file)
        if is_plain_jsonl(file):
            return _chunks_of_lines(file.path)
        return spool(read_file(file), _temporary(file, directory, ".rows"), file.label)
    except OSError as error:
        raise UserError(f"{file.label}: cannot be read ({error})") from None


class ChunkReader:
    """Reads chunks; tables stay open from one chunk to the next."""

    def __init__(self) -> None:
        self._tables: dict[str, Any] = {}

    def read(self, chunk: Chunk) -> list[Source]:
        """The wanted rows of a chunk; their `where` lacks the file's name."""
        if chunk.kind == "lines":
            return _read_lines(chunk)
        if chunk.kind == "rows":
            return _read_spooled(chunk)
        if chunk.path not in self._tables:
            self._tables[chunk.path] = _open_table(chunk.path, chunk.path)
        return _read_table(self._tables[chunk.path], chunk)


def select_rows(chunks: Iterable[Chunk], wanted: Iterable[int]) -> list[Chunk]:
    """The chunks with only the wanted rows of a file, given by their ascending numbers."""
    numbers = iter(wanted)
    number = next(numbers, None)
    first, chosen = 0, []
    for chunk in chunks:
        own = []
        while number is not None and number < first + chunk.rows:
            own.append(number - first)
            number = next(numbers, None)
        if len(own) == chunk.rows:
            chosen.append(chunk)
        elif own:
            chosen.append(dataclasses.replace(chunk, wanted=own))
        first += chunk.rows
    return chosen


def _chunks_of_lines(path: Path) -> list[Chunk]:
    chunks = []
    with path.open("rb") as file:
        begin = position = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(position)
        first = number = rows = 0
        for number, line in enumerate(file, start=1):
            position += len(line)
            rows += bool(line.strip())
            if rows >= CHUNK_ROWS or position - begin >= CHUNK_BYTES:
                chunks.append(Chunk(str(path), "lines", begin, position, rows, first))
                begin, first, rows = position, number, 0
        if rows:
            chunks.append(Chunk(str(path), "lines", begin, position, rows, first))
    return chunks


def _read_bytes(chunk: Chunk) -> bytes:
    with open(chunk.path, "rb") as file:
        file.seek(chunk.begin)
        return file.read(chunk.end - chunk.begin)


def _read_lines(chunk: Chunk) -> list[Source]:
    numbered = enumerate(_read_bytes(chunk).split(b"\n"), start=chunk.line + 1)
    filled = [(number, line) for number, line in numbered if line.strip()]
    return [parse_line(f":{number}", line) for number, line in _wanted(filled, chunk)]


def _wanted(rows: list[Any], chunk: Chunk) -> list[Any]:
    return rows if chunk.wanted is None else [rows[i] for i in chunk.wanted]


def spool(sources: Iterable[Source], path: Path, label: str) -> list[Chunk]:
    """Write rows that were read, each as a line of JSON, and give their chunks.

    Args:
        sources: the rows.
        path: the file to write.
        label: what their places begin with, which is left out.
    """
    with path.open("w", encoding="ascii") as out:
        for source in sources:
            place = source.where.removeprefix(label)
            try:
                line = json.dumps([place, source.row, source.problem], default=repr)
            except (RecursionError, ValueError):
                line = json.dumps([place, None, "nested too deeply"])
            out.write(line + "\n")
    return [dataclasses.replace(chunk, kind="rows") for chunk in _chunks_of_lines(path)]


def _read_spooled(chunk: Chunk) -> list[Source]:
    lines = _read_bytes(chunk).splitlines()
    return [Source(*json.loads(line)) for line in _wanted(lines, chunk)]


def _chunks_of_table(file: DataFile) -> list[Chunk]:
    total = len(_open_table(str(file.path), file.label))
    return [
        Chunk(str(file.path), "table", begin, end, end - begin)
        for begin in range(0, total, CHUNK_ROWS)
        for end in [min(begin + CHUNK_ROWS, total)]
    ]


def is_arrow_file(path: Path) -> bool:
    """Whether an Arrow file has the form that begins with a mark, and not that of `datasets`."""
    with path.open("rb") as content:
        return content.read(len(ARROW_MARK)) == ARROW_MARK


def _temporary(file: DataFile, directory: Path, suffix: str) -> Path:
    """A name that errors can show, and no longer than a file system allows: 255 bytes."""
    return directory / f"{file.path.name[:50]}{suffix}"


def _copy_table(file: DataFile, directory: Path) -> DataFile:
    """A table as the Arrow that `datasets` stores, of which rows can be read by their number."""
    # Imported where it is used, as `datasets` below: most files need neither.
    parquet: Any = importlib.import_module("pyarrow.parquet")
    import pyarrow

    target = _temporary(file, directory, ".arrow")
    try:
        with contextlib.ExitStack() as stack:
            if file.format == ".parquet":
                source = stack.enter_context(parquet.ParquetFile(str(file.path)))
                schema, batches = source.schema_arrow, source.iter_batches(batch_size=CHUNK_ROWS)
            else:
                content = stack.enter_context(pyarrow.OSFile(str(file.path), "rb"))
                source = pyarrow.ipc.open_file(content)
                schema = source.schema
                batches = map(source.get_batch, range(source.num_record_batches))
            with pyarrow.ipc.new_stream(str(target), schema) as out:
                for batch in batches:
                    batch.validate(full=True)
                    out.write_batch(batch)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file.label}: cannot be read ({_on_one_line(error)})") from None
    return dataclasses.replace(file, path=target)


def _open_table(path: str, label: str) -> Any:
    """An Arrow file as `datasets` stores it, memory-mapped."""
    import datasets
    import pyarrow

    try:
        return datasets.Dataset.from_file(path)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{label}: cannot be read ({_on_one_line(error)})") from None


def _on_one_line(error: Exception) -> str:
    """The text of an error, of which some list the types of whole tables."""
    return " ".join(str(error).split())[:_LONGEST_REASON]


def _read_table(table: Any, chunk: Chunk) -> list[Source]:
    import pyarrow

    try:
        # Otherwise damaged offsets would be followed wherever they lead.
        table.data.fast_slice(chunk.begin, chunk.end - chunk.begin).validate(full=True)
    except pyarrow.ArrowException as error:
        which = f"rows {chunk.begin + 1} to {chunk.end}"
        raise UserError(f"{chunk.path}: {which}: damaged ({_on_one_line(error)})") from None
    wanted = range(chunk.end - chunk.begin) if chunk.wanted is None else chunk.wanted
    numbers = [chunk.begin + number for number in wanted]
    rows = zip(numbers, table.select(numbers), strict=True)
    return [
        Source(f": row {number + 1}", without_nulls(row, table.features)) for number, row in rows
    ]


def without_nulls(value: Any, feature: Any) -> Any:
    """A value of a table without the nulls that Arrow puts into every object.

    Args:
        value: the value.
        feature: its type, as `datasets` has it; None if unknown. JSON, which Arrow has as text,
            has only the nulls that were written.
    """
    if getattr(feature, "_type", None) == "Json":  # a class that `datasets` 4.0 lacks
        return value
    if isinstance(value, dict):
        own = feature if isinstance(feature, dict) else {}
        found = ((key, item) for key, item in value.items() if item is not None)
        return {key: without_nulls(item, own.get(key)) for key, item in found}
    if isinstance(value, list):
        return [without_nulls(item, getattr(feature, "feature", None)) for item in value]
    return value


def rows_of_file(file: DataFile, directory: Path) -> Iterator[Source]:
    """All rows of a file, with their places in full."""
    reader = ChunkReader()
    for chunk in split_into_chunks(file, directory):
        for source in reader.read(chunk):
            yield dataclasses.replace(source, where=file.label + source.where)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
