"""Tokenized rows of the cache, read by their number from memory-mapped files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from phi3_jax.data.rows import Kind
from phi3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Note:
    """What of a row was read by another name, not used, and asked for by the config.

    Attributes:
        renamed: columns, ours to theirs.
        unused: columns, and keys of messages.
        named: columns that the config names, and whether the row has them.
    """

    renamed: dict[str, str]
    unused: list[str]
    named: dict[str, bool]


def row_digest(tokens: bytes, learned: bytes = b"") -> int:
    """A digest of a row's tokens and maybe learned ranges, both int32, as an int64."""
    digest = hashlib.blake2b(tokens + b"|" + learned, digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


class TokenRows:
    """The rows of several cache entries, one after the other.

    Only what is asked for is read from disk: tokens stay there. What is kept in memory is a few
    numbers per row.

    Args:
        entries: Arrow files of `encoder.SCHEMA`.
        labels: what errors call the file that each was made of.

    Attributes:
        lengths: int32 `[rows]`, tokens of each row; 0 for a bad one.
        bad: bool `[rows]`, rows that could not become examples.
        learned: int32 `[runs, 2]`, the learned ranges of all rows, from position 0 on.
        learned_ends: int64 `[rows + 1]`; row i has the runs from `[i]` to `[i + 1]`.
        digests: int64 `[rows]`, of tokens and learned ranges.
        contents: int64 `[rows]`, digests of the tokens alone.
        largest: int32 `[rows]`, the largest token id.
    """

    def __init__(self, entries: Sequence[Path], labels: Sequence[str]) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._entries: list[Path] = []
        self._labels: list[str] = []
        for entry, label in zip(entries, labels, strict=True):
            try:
                reader = pa.ipc.open_file(_mapped(entry))
                own = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            except (pa.ArrowException, OSError, ValueError) as error:  # or an empty file
                raise _damaged(entry, str(error)) from None
            self._batches += own
            self._entries += [entry] * len(own)
            self._labels += [label] * len(own)
        ends = np.cumsum([0, *(batch.num_rows for batch in self._batches)], dtype=np.int64)
        self._firsts = ends[:-1]
        self._tokens = [_list_column(batch, "tokens") for batch in self._batches]
        runs = [_list_column(batch, "learned") for batch in self._batches]
        self.lengths = _joined([np.diff(offsets) for offsets, _ in self._tokens], np.int32)
        counts = _joined([np.diff(offsets) for offsets, _ in runs], np.int64) // 2
        self.learned_ends = np.concatenate([[0], np.cumsum(counts)])
        self.learned = _joined([values for _, values in runs], np.int32).reshape(-1, 2)
        self.bad = _joined([batch["kind"].is_valid() for batch in self._batches], bool)
        self.digests = _joined([batch["digest"] for batch in self._batches], np.int64)
        self.contents = _joined([batch["content"] for batch in self._batches], np.int64)
        self.largest = _joined([batch["largest"] for batch in self._batches], np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def repeats(self, contents: np.ndarray) -> np.ndarray:
        """bool `[rows]`, good rows whose tokens are those of a row with one of these digests."""
        return ~self.bad & np.isin(self.contents, contents)

    def tokens(self, row: int) -> np.ndarray:
        """int32 `[n]`, a view of the file.

        Raises:
            UserError: the row does not have its digest: the file was damaged on disk.
        """
        batch, index = self._find(row)
        offsets, values = self._tokens[batch]
        tokens = values[offsets[index] : offsets[index + 1]]
        if row_digest(tokens.tobytes(), self.runs(row).tobytes()) != self.digests[row]:
            raise _damaged(self._entries[batch], f"its row {index} does not have its digest")
        return tokens

    def runs(self, row: int) -> np.ndarray:
        """int32 `[runs, 2]`, the learned ranges of a row."""
        return self.learned[self.learned_ends[row] : self.learned_ends[row + 1]]

    def where(self, row: int) -> str:
        """A row's file and place."""
        batch, index = self._find(row)
        return self._labels[batch] + str(self._batches[batch]["place"][index].as_py())

    def problem(self, row: int) -> tuple[Kind, str]:
        """What is wrong with a bad row."""
        batch, index = self._find(row)
        columns = self._batches[batch]
        return cast(Kind, columns["kind"][index].as_py()), str(columns["problem"][index].as_py())

    @functools.cached_property
    def notes(self) -> tuple[np.ndarray, list[Note]]:
        """int32 `[rows]`, the index of each row's note, and the notes."""
        column = pa.chunked_array([batch["note"] for batch in self._batches], pa.string())
        encoded = column.dictionary_encode().combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):  # of no rows
            return np.zeros(0, np.int32), []
        texts = [json.loads(text or "{}") for text in encoded.dictionary.to_pylist()]
        notes = [
            Note(dict(text.get("renamed", ())), text.get("unused", []), dict(text.get("named", ())))
            for text in texts
        ]
        return encoded.indices.to_numpy(), notes

    def _find(self, row: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return batch, row - int(self._firsts[batch])


def _mapped(entry: Path) -> pa.BufferReader:
    """A file mapped into memory, of which only the pages that are touched are read.

    By default the kernel reads around each page, which of a cold file is all of it.
    """
    with entry.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return pa.BufferReader(pa.py_buffer(mapped))


def _damaged(entry: Path, problem: str) -> UserError:
    return UserError(f"{entry}: damaged ({problem}); delete it, and the next run rebuilds it")


def _list_column(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a list column, as views of the file."""
    column: Any = batch[name]
    return column.offsets.to_numpy(), column.values.to_numpy()


def _joined(parts: Sequence[Any], dtype: Any) -> np.ndarray:
    arrays = [
        part if isinstance(part, np.ndarray) else part.to_numpy(zero_copy_only=False)
        for part in parts
    ]
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)
