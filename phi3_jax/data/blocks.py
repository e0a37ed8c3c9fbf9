"""Streamed rows as blocks of examples: as many rows as the shuffle buffer holds.

A block is read, tokenized ahead in worker processes, packed, and shuffled by itself. What a run has
to remember of a stream is therefore where the current block begins and how far it got in it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from phi3_jax.data.chunks import Chunk, cores, spool
from phi3_jax.data.dataset import bad_row, encoder_settings, make_examples
from phi3_jax.data.encoder import SCHEMA
from phi3_jax.data.examples import CachedExamples
from phi3_jax.data.report import DataReport
from phi3_jax.data.row_streams import Position, RowStream, Share
from phi3_jax.data.stream import Stream
from phi3_jax.data.token_rows import TokenRows
from phi3_jax.data.workers import encode_chunks
from phi3_jax.errors import UserError

# Rows that are tokenized together.
CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a stream.

    Attributes:
        examples: its examples.
        ends: int64, where each source's rows end in `examples.source`.
        report: what became of its rows, and of those before it that gave no example.
        bad_rows: int64, rows of `examples.source` that were skipped.
        position: where it begins.
    """

    examples: CachedExamples
    ends: np.ndarray
    report: DataReport
    bad_rows: np.ndarray
    position: Position


class Blocks(Iterator[Block]):
    """The blocks of a stream, without an end.

    Args:
        stream: what is streamed.
        share: which part of the rows this process reads.
        position: where to begin, as a block tells it; None at the beginning.
        rows: rows of a block.
    """

    def __init__(
        self, stream: Stream, share: Share, position: Position | None, rows: int | None = None
    ) -> None:
        self._stream, config = stream, stream.config
        self._stopped = False
        self._rows = rows or config.shuffle_buffer_size
        self._number = position["number"] if position else 0
        starts = position["sources"] if position else [None] * len(stream.names)
        self._weights = [Fraction(str(source.weight)) for source in config.data_sets]
        self._folder = tempfile.TemporaryDirectory(
            prefix="phi3-jax-stream-", ignore_cleanup_errors=True
        )
        self._sources = [
            _TokenStream(open_rows, start, share, encode, Path(self._folder.name) / str(number))
            for number, (open_rows, start, encode) in enumerate(
                zip(stream.open_rows, starts, self._encoders(), strict=True)
            )
        ]

    def __next__(self) -> Block:
        """The next block with examples.

        Raises:
            UserError: a row that is bad, data that cannot be read, or nothing to learn in it.
        """
        report = DataReport(streamed=True)
        begun = [source.passes for source in self._sources]
        # Give up after a whole pass; earlier blocks may have read a part of the current one.
        while any(
            source.passes < first + 2 for source, first in zip(self._sources, begun, strict=True)
        ):
            try:
                block = self._make(report)
            except OSError as error:
                raise UserError(
                    f"{self._folder.name}: streamed rows cannot be kept there ({error}); set "
                    "TMPDIR to a folder with more space"
                ) from None
            if len(block.examples):
                return block
        raise UserError(
            f"no training examples in {report.rows:,} rows of {', '.join(self._stream.names)}: "
            f"{report}"
        )

    def stop(self) -> None:
        """Have the block that another thread is making end early, with an error."""
        self._stopped = True

    def close(self) -> None:
        """End the worker processes and close the files."""
        for source in self._sources:
            source.close()
        self._folder.cleanup()

    def _encoders(self) -> list[Callable[..., Generator[pa.RecordBatch, None, None]]]:
        config, count = self._stream.config, len(self._weights)
        workers = max(1, (config.dataset_num_proc or max(2, cores())) // count)

        def encoder(settings: Any) -> Callable[..., Generator[pa.RecordBatch, None, None]]:
            return lambda chunks, folder: encode_chunks(
                chunks, self._stream.tokenizer, settings, workers, folder
            )

        return [encoder(encoder_settings(source, config)) for source in config.data_sets]

    def _make(self, report: DataReport) -> Block:
        position = {
            "number": self._number,
            "sources": [source.position for source in self._sources],
        }
        counts = self._counts()
        parts = [
            list(self._told(source.take(count)))
            for source, count in zip(self._sources, counts, strict=True)
        ]
        self._number += 1
        source = self._written([batch for part in parts for batch in part])
        ends = np.cumsum([sum(batch.num_rows for batch in part) for part in parts])
        return self._block(source, ends, position, report)

    def _told(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if self._stopped:
                raise UserError("the stream was closed")
            yield batch

    def _counts(self) -> list[int]:
        """Rows of each source in this block: exact shares of all rows up to its end."""
        total = sum(self._weights)
        ends = [
            [math.floor(self._rows * number * weight / total) for weight in self._weights]
            for number in (self._number, self._number + 1)
        ]
        return [end - begin for begin, end in zip(*ends, strict=True)]

    def _written(self, batches: list[pa.RecordBatch]) -> TokenRows:
        file = Path(self._folder.name) / f"{self._number}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
        rows = TokenRows([file], [""])  # the places name the files
        with contextlib.suppress(OSError):  # where a mapped file cannot be removed
            file.unlink()
        return rows

    def _block(
        self, source: TokenRows, ends: np.ndarray, position: Position, report: DataReport
    ) -> Block:
        config = self._stream.config
        report.rows += len(source)
        bad = np.flatnonzero(source.bad)
        for row in bad.tolist():
            kind, problem = source.problem(row)
            if config.on_bad_row == "error":
                raise bad_row(source.where(row), problem)
            report.skip(kind, source.where(row))
        held_out = source.repeats(self._stream.held_out)
        report.held_out += int(held_out.sum())
        good = np.flatnonzero(~source.bad & ~held_out)
        strategy = config.packing_strategy if config.packing else None
        examples = make_examples(source, good, config, strategy, report)
        limit = self._stream.vocab_size
        if limit is not None and examples.largest >= limit:
            raise UserError(
                f"the tokenizer produces token id {examples.largest}, but the model's vocabulary "
                f"size is {limit}; is this another model's tokenizer?"
            )
        return Block(examples, ends, report, bad, position)


class _TokenStream:
    """One source, tokenized ahead.

    Args:
        open_rows: opens the source.
        position: where to begin: a position of the rows, and how many rows to leave out there.
        share: which part of the rows is read.
        encode: tokenizes chunks, in order.
        folder: a folder to make, for temporary files.
    """

    def __init__(
        self,
        open_rows: Callable[[Share, Position | None], RowStream],
        position: Position | None,
        share: Share,
        encode: Callable[..., Generator[pa.RecordBatch, None, None]],
        folder: Path,
    ) -> None:
        self._rows = open_rows(share, position["at"] if position else None)
        self._drop = int(position["skip"]) if position else 0
        self._folder = folder / "rows"
        self._folder.mkdir(parents=True)
        self.position: Position = position or {"at": self._rows.position, "skip": 0}
        self._ahead: collections.deque[_Ahead] = collections.deque()
        self._batches = encode(self._chunks(), folder)
        self._batch: pa.RecordBatch | None = None

    def take(self, count: int) -> Iterator[pa.RecordBatch]:
        """The next rows, tokenized."""
        while count:
            batch = self._batch or self._next_batch()
            rows = min(self._drop or count, batch.num_rows)
            dropped, self._drop = bool(self._drop), max(self._drop - rows, 0)
            self._batch = batch.slice(rows) if rows < batch.num_rows else None
            self.position = self.position | {"skip": self.position["skip"] + rows}
            if not dropped:
                count -= rows
                yield batch.slice(0, rows)

    @property
    def passes(self) -> int:
        """How often the source was read to its end before the file of the next row."""
        return int(self.position["at"]["epoch"])

    def close(self) -> None:
        """End the worker processes and close the files."""
        self._batches.close()
        self._rows.close()

    def _next_batch(self) -> pa.RecordBatch:
        batch = next(self._batches)
        ahead = self._ahead.popleft()
        self.position = {"at": ahead.at, "skip": ahead.before}
        if ahead.done is not None:
            ahead.done.unlink()
        return batch

    def _chunks(self) -> Iterator[Chunk]:
        for number in itertools.count():
            at, file = self._rows.position, self._folder / str(number)
            chunks = spool(self._rows.take(CHUNK), file, "")
            before = 0
            for chunk in chunks:
                self._ahead.append(_Ahead(at, before, file if chunk is chunks[-1] else None))
                yield chunk
                before += chunk.rows


class _Ahead(NamedTuple):
    """A chunk that is being tokenized."""

    at: Position  # where its file begins
    before: int  # rows of the file before it
    done: Path | None  # the file, if this is the last chunk of it
