"""What the lengths of the rows say: where to cut them, and whether to pack them."""

from __future__ import annotations

import dataclasses

import numpy as np

from phi3_jax.data.batches import Batches, packed

# Enough rows to know the shares of padding; a pass over millions would delay every start.
SAMPLE_STEPS, SAMPLE_ROWS = 1_000, 20_000


@dataclasses.dataclass(frozen=True)
class Filling:
    """How full the rows of training are, from a sample of the first epoch.

    Attributes:
        positions: mean positions of a step, padding included.
        padding: share of them that is padding.
        packed: the same share with `data.packing`; None if the rows are packed already.
    """

    positions: float
    padding: float
    packed: float | None


def filling(batches: Batches) -> Filling:
    """Measure the padding of the first steps, with and without packing."""
    rows = batches.batch_size * batches.accumulation
    steps = batches.step_lengths(SAMPLE_STEPS)
    # The empty rows that fill up the last step of an epoch are no reason to pack.
    taken = [min(rows, len(batches.rows(0)) - number * rows) for number in range(len(steps))]
    positions = sum(length * count for (length, _), count in zip(steps, taken, strict=True))
    tokens = sum(filled for _, filled in steps)
    return Filling(
        positions=sum(length for length, _ in steps) * rows / len(steps),
        padding=1 - tokens / positions,
        packed=None if batches.packing else packed_padding(batches),
    )


def packed_padding(batches: Batches) -> float:
    """The share of padding if the examples were packed into rows of `max_length`."""
    lengths = batches.lengths[:SAMPLE_ROWS]
    rows = packed(lengths, batches.max_length, "bfd")
    return 1 - float(lengths.sum()) / (len(rows) * batches.max_length)


@dataclasses.dataclass(frozen=True)
class LengthAdvice:
    """Where to cut rows.

    Attributes:
        percentiles: tokens of the rows before truncation, by percentile.
        max_length: the advised `data.max_length`.
    """

    percentiles: dict[int, int]
    max_length: int


def length_advice(lengths: np.ndarray, multiple: int, limit: int) -> LengthAdvice:
    """A `max_length` that holds 99 % of the rows whole.

    Args:
        lengths: int `[rows]`, tokens of each row before truncation.
        multiple: `data.pad_to_multiple_of`.
        limit: positions of the model.
    """
    shares = (50, 90, 99, 100)
    found = np.percentile(lengths, shares, method="inverted_cdf")
    percentiles = {share: int(value) for share, value in zip(shares, found, strict=True)}
    longest = -(-percentiles[99] // multiple) * multiple
    return LengthAdvice(percentiles, min(max(longest, 2), limit))
