"""Examples of a split, read by their index from the token cache."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Literal, overload

import numpy as np

from phi3_jax.data.masks import Example
from phi3_jax.data.mixing import Mixture
from phi3_jax.data.token_rows import TokenRows

TruncationMode = Literal["keep_start", "keep_end"]


@dataclasses.dataclass(frozen=True, eq=False)
class CachedExamples(Sequence[Example]):
    """Parts of tokenized rows, which are read when they are asked for.

    Attributes:
        source: the tokenized rows.
        rows: int64 `[n]`, the row of each example.
        starts, stops: int64 `[n]`, which of its tokens the example has.
        mixture: how sources share an epoch, if there are several.
    """

    source: TokenRows
    rows: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    mixture: Mixture | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row, start, stop = int(self.rows[index]), int(self.starts[index]), int(self.stops[index])
        targets = np.zeros(stop - start, bool)
        for first, last in self.source.runs(row) - start:
            targets[max(first, 0) : max(last, 0)] = True
        learns_first = bool(targets[:1].any())
        targets[:1] = False  # nothing precedes it
        return Example(np.array(self.source.tokens(row)[start:stop]), targets, learns_first)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 `[n]`, tokens of each example."""
        return np.asarray(self.stops - self.starts)

    @functools.cached_property
    def target_counts(self) -> np.ndarray:
        """int64 `[n]`, learned tokens of each example."""
        return count_targets(self.source, self.rows, self.starts, self.stops)

    def where(self, index: int) -> str:
        """The file and place of an example's row."""
        return self.source.where(int(self.rows[index]))

    def select(self, chosen: np.ndarray) -> CachedExamples:
        """The examples with these indices, or for which this is True."""
        return CachedExamples(
            self.source, self.rows[chosen], self.starts[chosen], self.stops[chosen]
        )

    def fingerprint(self) -> str:
        """A digest of the examples, in order, made of the digests of their rows."""
        digest = hashlib.sha256(self.source.digests[self.rows].astype("<i8").tobytes())
        for part in (self.starts, self.stops):
            digest.update(part.astype("<i8").tobytes())
        if self.mixture is not None:
            digest.update(repr((self.mixture.sizes, self.mixture.counts)).encode())
        return digest.hexdigest()

    @property
    def largest(self) -> int:
        """The largest token id of the rows."""
        return int(self.source.largest[self.rows].max(initial=0))


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """int64 `[n]`, tokens of each example, without reading those of cached ones."""
    if isinstance(examples, CachedExamples):
        return examples.lengths
    return np.array([len(example.tokens) for example in examples], np.int64)


def cut(
    source: TokenRows, rows: np.ndarray, max_length: int, truncation_mode: TruncationMode
) -> CachedExamples:
    """Rows as examples of at most `max_length` tokens, the first or the last ones."""
    lengths = source.lengths[rows].astype(np.int64)
    kept = np.minimum(lengths, max_length)
    starts = lengths - kept if truncation_mode == "keep_end" else np.zeros_like(lengths)
    return CachedExamples(source, rows, starts, starts + kept)


def split_long(source: TokenRows, rows: np.ndarray, max_length: int) -> CachedExamples:
    """Rows as examples of at most `max_length` tokens; longer rows become several."""
    lengths = source.lengths[rows].astype(np.int64)
    pieces = np.maximum(-(-lengths // max_length), 1)
    own = np.repeat(np.arange(len(rows)), pieces)
    number = np.arange(len(own)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = number * max_length
    return CachedExamples(source, rows[own], starts, np.minimum(starts + max_length, lengths[own]))


def count_targets(
    source: TokenRows, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> np.ndarray:
    """int64 `[n]`, learned tokens between `starts` and `stops` of each row.

    The first token of a part is never learned: nothing precedes it.
    """
    begin, counts = source.learned_ends[rows], np.diff(source.learned_ends)[rows]
    own = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(own)) - np.repeat(np.cumsum(counts) - counts, counts)
    runs = source.learned[np.repeat(begin, counts) + within].astype(np.int64)
    first = np.maximum(runs[:, 0], starts[own] + 1)
    last = np.minimum(runs[:, 1], stops[own])
    return np.bincount(own, np.maximum(last - first, 0), minlength=len(rows)).astype(np.int64)
