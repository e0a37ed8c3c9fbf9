"""Rows read as they come, from files, URLs or the hub, without an end.

A stream tells its position as JSON values and can be opened there again. Where its last row was
read, it begins again, with its files in another order. On several hosts, each reads a share: every
n-th file if their number divides evenly, and otherwise every n-th row, as `datasets` does it.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node

from phi3_jax.config.data import SourceConfig
from phi3_jax.data.chunks import without_nulls
from phi3_jax.data.reading import hub_reason, is_hub_id
from phi3_jax.data.rows import Source
from phi3_jax.data.streamed_files import StreamedFile, streamed_files
from phi3_jax.errors import UserError

Position = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of the rows a process reads: the `index`-th of `count`."""

    index: int = 0
    count: int = 1


class RowStream(abc.ABC):
    """Rows of one source, again and again.

    Attributes:
        position: where the next row is; JSON values.
    """

    position: Position

    @abc.abstractmethod
    def take(self, count: int) -> list[Source]:
        """The next rows, at least one and at most `count`.

        Raises:
            UserError: a file cannot be read, or there are no rows.
        """

    @property
    def passes(self) -> int:
        """How often the source was read to its end."""
        return int(self.position["epoch"])

    @abc.abstractmethod
    def close(self) -> None:
        """Close what is open."""


class FileStream(RowStream):
    """The rows of files.

    Args:
        files: the files.
        seed: seed of their order.
        share: which part of them is read.
        position: where to begin, as a stream of the same files and share told it.
    """

    def __init__(
        self, files: list[StreamedFile], seed: int, share: Share, position: Position | None
    ) -> None:
        self._files, self._seed, self._share = files, seed, share
        self._by_file = len(files) % share.count == 0
        self.position = dict(position or {"epoch": 0, "file": 0, "row": 0})
        self._open: Generator[Source, None, None] | None = None
        self._found = position is not None  # whether the source has rows

    def take(self, count: int) -> list[Source]:
        while True:
            order = self._order()
            file = self._files[order[self.position["file"]]]
            if self._open is None:
                self._open = file.rows(self.position["row"])
            rows = list(itertools.islice(self._open, count * self._stride))
            first = self.position["row"]
            self.position = self.position | {"row": first + len(rows)}
            if not rows:
                self._next_file(len(order))
            if not self._by_file:
                rows = rows[(self._share.index - first) % self._share.count :: self._share.count]
            if rows:
                self._found = True
                return rows

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None

    @property
    def _stride(self) -> int:
        return 1 if self._by_file else self._share.count

    def _order(self) -> list[int]:
        """The files of this pass, in order."""
        seed = np.random.SeedSequence([self._seed, self.position["epoch"]])
        order: list[int] = np.random.default_rng(seed).permutation(len(self._files)).tolist()
        return order[self._share.index :: self._share.count] if self._by_file else order

    def _next_file(self, count: int) -> None:
        self.close()
        epoch, file = self.position["epoch"], self.position["file"] + 1
        if file == count:
            if not self._found:
                labels = ", ".join(file.label for file in self._files[:3])
                raise UserError(f"{labels}: no rows to stream")
            epoch, file = epoch + 1, 0
        self.position = {"epoch": epoch, "file": file, "row": 0}


class HubStream(RowStream):
    """The rows of a data set on the hub, which `datasets` streams."""

    def __init__(self, source: SourceConfig, share: Share, position: Position | None) -> None:
        self._source, self._share = source, share
        self._table = open_hub(source, source.split)
        if share.count > 1:
            self._table = split_dataset_by_node(self._table, share.index, share.count)
        self._first = self._table.state_dict()
        position = position or {"epoch": 0, "row": 0, "state": None}
        self.position = dict(position)
        self._found = position["state"] is not None
        self._open: Iterator[Any] | None = None

    def take(self, count: int) -> list[Source]:
        while True:
            with hub_errors(self._source.path):
                if self._open is None:
                    self._table.load_state_dict(self.position["state"] or self._first)
                    self._open = iter(self._table)
                rows = list(itertools.islice(self._open, count))
                state = self._table.state_dict()
            epoch, first = self.position["epoch"], self.position["row"]
            if rows:
                self._found = True
                self.position = {"epoch": epoch, "row": first + len(rows), "state": state}
                path, features = self._source.path, self._table.features
                return [
                    Source(f"{path}: row {number}", without_nulls(row, features))
                    for number, row in enumerate(rows, start=first + 1)
                ]
            if not self._found:
                raise UserError(f"{self._source.path}: no rows to stream")
            self.close()
            self.position = {"epoch": epoch + 1, "row": 0, "state": None}

    def close(self) -> None:
        self._open = None


def open_streams(
    source: SourceConfig, seed: int, held_out: Mapping[str, int]
) -> tuple[str, Callable[[Share, Position | None], RowStream]]:
    """A source, found but not read yet.

    Args:
        source: the source.
        seed: seed of the order of its files.
        held_out: files that are left out (`streamed_files`).

    Returns:
        What identifies it, whatever folder it is in: the names and sizes of its files, or the hub
        id with its split and revision. And a function that opens it for a share at a position.

    Raises:
        UserError: not found, files that cannot be streamed, or all of them held out.
    """
    if is_hub_id(source.path):
        parts = (source.path, source.name, source.split, source.revision)
        return repr(parts), lambda share, position: HubStream(source, share, position)
    files = streamed_files(source, held_out)
    identity = repr([(PurePosixPath(file.label).name, file.size) for file in files])
    return identity, lambda share, position: FileStream(files, seed, share, position)


def open_hub(source: SourceConfig, split: str) -> Any:
    """A split of a data set on the hub, streamed.

    Raises:
        UserError: not found, or the hub does not answer.
    """
    with hub_errors(source.path):
        return datasets.load_dataset(
            source.path, source.name, split=split, revision=source.revision, streaming=True
        )


@contextlib.contextmanager
def hub_errors(path: str) -> Iterator[None]:
    """Turn what `datasets` and its file systems raise into one error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every file system raises errors of its own
        raise UserError(
            f"{path}: no such file or folder, and cannot be streamed from the hub "
            f"({hub_reason(error)})"
        ) from None
