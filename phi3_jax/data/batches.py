"""Examples to batches, in an order that is a function of (seed, epoch).

Any step's batch can be made without those before it, so a resumed run goes on with the very batches
that it would have seen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from phi3_jax.data.chat import Example
from phi3_jax.data.packing import pack

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The global batch of each training step.

    A step takes `batch_size * accumulation` rows; the last step of an epoch takes what is left,
    and empty rows fill it up, which the loss does not count.

    Attributes:
        examples: all training examples.
        batch_size: rows of a micro-batch (B).
        accumulation: micro-batches of a step (A).
        seed: of the order; each epoch has another one.
        pad_to_multiple_of: row lengths are rounded up to it.
        max_length: and are never above this.
        packing: a row holds as many examples as fit into `max_length`; without it, one.
    """

    examples: Sequence[Example]
    batch_size: int
    accumulation: int
    seed: int
    pad_to_multiple_of: int
    max_length: int
    packing: bool = False

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Steps until every example was seen once more."""
        return -(-len(self._rows(0)) // (self.batch_size * self.accumulation))

    def __getitem__(self, step: int) -> Batch:
        """The batch of step `step`, counted from 0 over all epochs.

        Returns:
            `tokens`, `segment_ids` and `positions` int32 `[A, B, S]`, `targets` bool `[A, B, S]`;
            segment 0 is padding, the others count the examples of a row.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        count = self.batch_size * self.accumulation
        rows = self._rows(epoch)[position * count : (position + 1) * count]
        chosen = [[self.examples[i] for i in row] for row in rows]
        batch = pad(chosen, count, self.pad_to_multiple_of, self.max_length)
        shape = (self.accumulation, self.batch_size, -1)
        return {name: array.reshape(shape) for name, array in batch.items()}

    @functools.cached_property
    def _rows(self) -> Callable[[int], list[list[int]]]:
        """`_make_rows`, which remembers the last epoch: every step asks for it."""
        return functools.lru_cache(maxsize=1)(self._make_rows)

    def _make_rows(self, epoch: int) -> list[list[int]]:
        """The examples of each row of an epoch, by index, in the order of the rows."""
        count = len(self.examples)
        order = list(grain.MapDataset.range(count).shuffle(seed=self._epoch_seed(epoch)))
        if not self.packing:
            return [[i] for i in order]
        rows = pack([len(self.examples[i].tokens) for i in order], self.max_length)
        # The first rows hold the longest examples: shuffled, steps are alike.
        mixed = grain.MapDataset.range(len(rows)).shuffle(seed=self._epoch_seed(epoch))
        return [[order[i] for i in rows[row]] for row in mixed]

    def _epoch_seed(self, epoch: int) -> int:
        return int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])


def eval_batches(
    examples: Sequence[Example], batch_size: int, pad_to_multiple_of: int, max_length: int
) -> Iterator[Batch]:
    """All examples once, the longest first, in batches `[B, S]` of similar lengths.

    Longest first, so that running out of memory shows at once.
    """
    ordered = sorted(examples, key=lambda example: -len(example.tokens))
    for first in range(0, len(ordered), batch_size):
        rows = [[example] for example in ordered[first : first + batch_size]]
        yield pad(rows, batch_size, pad_to_multiple_of, max_length)


def pad(filled: Sequence[Sequence[Example]], rows: int, multiple: int, max_length: int) -> Batch:
    """Lay examples out as rows of one length, each example a segment of its own.

    What fills a row is told by segment 0 and not by a token id, so no token that must be learned is
    ever taken for padding.

    Args:
        filled: the examples of at most `rows` rows, none of more tokens than `max_length`.
        rows: rows of the batch; those without an example are all padding.
        multiple: the length is the longest row's, rounded up to this.
        max_length: of a row.
    """
    longest = max(sum(len(example.tokens) for example in row) for row in filled)
    length = min(-(-longest // multiple) * multiple, max(max_length, longest))
    batch: Batch = {
        name: np.zeros((rows, length), np.int32) for name in ("tokens", "segment_ids", "positions")
    }
    batch["targets"] = np.zeros((rows, length), bool)
    for row, examples in enumerate(filled):
        start = 0
        for segment, example in enumerate(examples, start=1):
            part = slice(start, start := start + len(example.tokens))
            batch["tokens"][row, part] = example.tokens
            batch["segment_ids"][row, part] = segment
            batch["positions"][row, part] = np.arange(len(example.tokens))
            batch["targets"][row, part] = example.targets
    return batch
