"""Batch examples in an order determined by (seed, epoch).

Any step's batch can be built without the earlier ones, so a resumed run sees exactly the batches it
would have seen without the interruption.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from phi3_jax.config.data import DataConfig
from phi3_jax.config.sections import TrainingConfig
from phi3_jax.data.masks import Example
from phi3_jax.data.packing import pack

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The global batch of each training step.

    A step takes `batch_size * accumulation` rows. The last step of an epoch takes the remaining
    rows and is filled up with empty ones, which the loss ignores.

    Attributes:
        examples: all training examples.
        batch_size: rows per micro-batch (B).
        accumulation: micro-batches per step (A).
        seed: seed of the shuffle; each epoch is shuffled differently.
        pad_to_multiple_of: row lengths are rounded up to a multiple of this.
        max_length: maximum row length, after rounding.
        packing: put as many examples into a row as fit in `max_length`; otherwise one per row.
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
        """Steps for one pass over all examples."""
        return -(-len(self._rows(0)) // (self.batch_size * self.accumulation))

    def __getitem__(self, step: int) -> Batch:
        """The batch for step `step`, counted from 0 across all epochs.

        Returns:
            `tokens`, `segment_ids` and `positions` int32 `[A, B, S]`, `targets` bool `[A, B, S]`;
            segment 0 is padding, the others number the examples within a row.
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
        """`_make_rows` with the last epoch cached, since every step calls it."""
        return functools.lru_cache(maxsize=1)(self._make_rows)

    def _make_rows(self, epoch: int) -> list[list[int]]:
        """The example indices of each row of an epoch, in row order."""
        count = len(self.examples)
        order = list(grain.MapDataset.range(count).shuffle(seed=self._epoch_seed(epoch)))
        if not self.packing:
            return [[i] for i in order]
        rows = pack([len(self.examples[i].tokens) for i in order], self.max_length)
        # Packing puts the longest examples first; shuffle the rows so steps are similar.
        mixed = grain.MapDataset.range(len(rows)).shuffle(seed=self._epoch_seed(epoch))
        return [[order[i] for i in rows[row]] for row in mixed]

    def _epoch_seed(self, epoch: int) -> int:
        return int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How examples become batches: one plan for a run, a sweep, and `phi3-jax evaluate`.

    Attributes:
        train_rows: rows per micro-batch, over all devices.
        eval_rows: rows per evaluation batch, over all devices.
        accumulation: micro-batches per step.
        pad_to_multiple_of, max_length, packing: as in `Batches`; evaluation batches have one
            example per row.
    """

    train_rows: int
    eval_rows: int
    accumulation: int
    pad_to_multiple_of: int
    max_length: int
    packing: bool

    @classmethod
    def from_config(cls, data: DataConfig, training: TrainingConfig, devices: int = 1) -> BatchPlan:
        """The plan of a config whose rows are spread over `devices`."""
        return cls(
            train_rows=training.per_device_train_batch_size * devices,
            eval_rows=training.per_device_eval_batch_size * devices,
            accumulation=training.gradient_accumulation_steps,
            pad_to_multiple_of=data.pad_to_multiple_of,
            max_length=data.max_length,
            packing=data.packing,
        )

    def train_batches(self, examples: Sequence[Example], seed: int) -> Batches:
        """The batch of each training step, in the order that `seed` gives."""
        return Batches(
            examples,
            batch_size=self.train_rows,
            accumulation=self.accumulation,
            seed=seed,
            pad_to_multiple_of=self.pad_to_multiple_of,
            max_length=self.max_length,
            packing=self.packing,
        )

    def eval_batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """All examples once, in batches `[B, S]`."""
        return eval_batches(examples, self.eval_rows, self.pad_to_multiple_of, self.max_length)


def eval_batches(
    examples: Sequence[Example], batch_size: int, pad_to_multiple_of: int, max_length: int
) -> Iterator[Batch]:
    """All examples once, longest first, in batches `[B, S]` of similar lengths.

    Longest first, so that running out of memory shows up immediately.
    """
    ordered = sorted(examples, key=lambda example: -len(example.tokens))
    for first in range(0, len(ordered), batch_size):
        rows = [[example] for example in ordered[first : first + batch_size]]
        yield pad(rows, batch_size, pad_to_multiple_of, max_length)


def pad(filled: Sequence[Sequence[Example]], rows: int, multiple: int, max_length: int) -> Batch:
    """Lay out examples as rows of equal length, each example in its own segment.

    Padding is marked by segment 0 rather than a token id, so a token to learn is never mistaken for
    padding.

    Args:
        filled: the examples of at most `rows` rows, each row at most `max_length` tokens.
        rows: rows in the batch; rows without examples are all padding.
        multiple: the row length is the longest row's, rounded up to a multiple of this.
        max_length: maximum row length.
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
