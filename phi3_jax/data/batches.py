"""Batch examples in an order determined by (seed, epoch).

Any step's batch can be built without the earlier ones, so a resumed run sees exactly the batches it
would have seen without the interruption.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from phi3_jax.config.data import DataConfig, PackingStrategy
from phi3_jax.config.training import TrainingConfig
from phi3_jax.data.examples import CachedExamples, lengths_of
from phi3_jax.data.masks import Example
from phi3_jax.data.mixing import Mixture
from phi3_jax.data.order import OneEach, Shuffled, grouped_by_length
from phi3_jax.data.packing import Part, pack, wrap

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
        packing_strategy: how (see `packing`).
        sampling_strategy: which rows come together where there is one example per row.
        mixture: how the sources of the examples share an epoch; otherwise all examples are used.
    """

    examples: Sequence[Example]
    batch_size: int
    accumulation: int
    seed: int
    pad_to_multiple_of: int
    max_length: int
    packing: bool = False
    packing_strategy: PackingStrategy = "bfd"
    sampling_strategy: Literal["random", "group_by_length"] = "random"
    mixture: Mixture | None = None

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Steps for one pass over all examples."""
        return -(-len(self.rows(0)) // (self.batch_size * self.accumulation))

    def __getitem__(self, step: int) -> Batch:
        """The batch for step `step`, counted from 0 across all epochs.

        Returns:
            `tokens`, `segment_ids` and `positions` int32 `[A, B, S]`, `targets` bool `[A, B, S]`;
            segment 0 is padding, the others number the examples within a row.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        count = self.batch_size * self.accumulation
        rows = self.rows(epoch)
        last = min((position + 1) * count, len(rows))
        chosen = [
            fill(self.examples, rows[i], self.packing_strategy if self.packing else "bfd")
            for i in range(position * count, last)
        ]
        batch = pad(chosen, count, self.pad_to_multiple_of, self.max_length)
        shape = (self.accumulation, self.batch_size, -1)
        return {name: array.reshape(shape) for name, array in batch.items()}

    @functools.cached_property
    def rows(self) -> Callable[[int], Sequence[Sequence[Part]]]:
        """What of which examples each row of an epoch has; the last epoch is remembered."""
        return functools.lru_cache(maxsize=1)(self._make_rows)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 `[n]`, tokens of each example."""
        return lengths_of(self.examples)

    @property
    def pace(self) -> str:
        """How long an epoch is, for the log."""
        return f"{self.steps_per_epoch} per epoch"

    def epoch(self, steps: int) -> float:
        """Passes over all examples after a number of steps."""
        return steps / self.steps_per_epoch

    def counts(self, step: int) -> dict[str, int]:
        """For the metrics of a step: the examples of each source; empty without a mixture."""
        if self.mixture is None:
            return {}
        epoch, position = divmod(step, self.steps_per_epoch)
        count, rows = self.batch_size * self.accumulation, self.rows(epoch)
        last = min((position + 1) * count, len(rows))
        parts = [part for i in range(position * count, last) for part in rows[i]]
        found = self.mixture.count_by_name(np.array([example for example, _, _ in parts]))
        return {f"examples/{name}": number for name, number in found.items()}

    def step_lengths(self, most: int | None = None) -> list[tuple[int, int]]:
        """For each step of the first epoch, the length of its rows and its tokens, padding not.

        `most` is the number of steps to look at; None looks at all.
        """
        count, rows = self.batch_size * self.accumulation, self.rows(0)
        looked = len(rows) if most is None else min(most * count, len(rows))
        sizes = [sum(stop - start for _, start, stop in rows[i]) for i in range(looked)]
        steps = [sizes[first : first + count] for first in range(0, len(sizes), count)]
        return [
            (padded_length(max(own), self.pad_to_multiple_of, self.max_length), sum(own))
            for own in steps
        ]

    def _make_rows(self, epoch: int) -> Sequence[Sequence[Part]]:
        seed = self._epoch_seed(epoch)
        order: Sequence[int] = Shuffled(len(self.examples), seed)
        if self.mixture is not None:
            # The number of packed rows depends on the lengths, and has to be that of every epoch:
            # then each epoch has the same examples.
            draw = self._epoch_seed(0 if self.packing else epoch)
            order = self.mixture.order(draw, seed)
        if not self.packing:
            if self.sampling_strategy == "group_by_length":
                step = self.batch_size * self.accumulation
                order = grouped_by_length(list(order), self.lengths, step)
            return OneEach(order, self.lengths)
        order = list(order)
        rows = packed(self.lengths[order], self.max_length, self.packing_strategy)
        # Packing puts the longest examples first; shuffle the rows so steps are similar.
        mixed = Shuffled(len(rows), seed)
        return [[(order[i], start, stop) for i, start, stop in rows[row]] for row in mixed]

    def _epoch_seed(self, epoch: int) -> int:
        return int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])


def packed(
    lengths: Sequence[int] | np.ndarray, capacity: int, strategy: PackingStrategy
) -> list[list[Part]]:
    """What of which examples each row has, by a packing strategy."""
    sizes = np.asarray(lengths).tolist()
    if strategy == "wrapped":
        return wrap(sizes, capacity)
    return [[(i, 0, sizes[i]) for i in row] for row in pack(sizes, capacity)]


def fill(
    examples: Sequence[Example], row: Sequence[Part], strategy: PackingStrategy
) -> list[Example]:
    """The segments of a row: its examples; with `wrapped` a single one, as in TRL."""
    if strategy != "wrapped":
        return [examples[i] for i, _, _ in row]
    tokens, targets = [], []
    for i, start, stop in row:
        example = examples[i]
        learned = example.targets.copy()
        learned[:1] = example.learns_first
        tokens.append(example.tokens[start:stop])
        targets.append(learned[start:stop])
    targets[0][:1] = False  # nothing precedes it
    return [Example(np.concatenate(tokens), np.concatenate(targets))]


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How examples become batches: one plan for a run, a sweep, and `phi3-jax evaluate`.

    Attributes:
        train_rows: rows per micro-batch, over all devices.
        eval_rows: rows per evaluation batch, over all devices.
        accumulation: micro-batches per step.
        pad_to_multiple_of, max_length: as in `Batches`.
        packing, packing_strategy, sampling_strategy: as in `Batches`, for training.
        eval_packing: whether evaluation rows are packed, by the same strategy.
    """

    train_rows: int
    eval_rows: int
    accumulation: int
    pad_to_multiple_of: int
    max_length: int
    packing: bool
    packing_strategy: PackingStrategy = "bfd"
    sampling_strategy: Literal["random", "group_by_length"] = "random"
    eval_packing: bool = False

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
            packing_strategy=data.packing_strategy,
            sampling_strategy=training.train_sampling_strategy,
            eval_packing=data.packs_held_out,
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
            packing_strategy=self.packing_strategy,
            sampling_strategy=self.sampling_strategy,
            mixture=examples.mixture if isinstance(examples, CachedExamples) else None,
        )

    def eval_batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """All examples once, in batches `[B, S]`."""
        strategy = self.packing_strategy if self.eval_packing else None
        return eval_batches(
            examples, self.eval_rows, self.pad_to_multiple_of, self.max_length, strategy
        )


def eval_batches(
    examples: Sequence[Example],
    batch_size: int,
    pad_to_multiple_of: int,
    max_length: int,
    strategy: PackingStrategy | None = None,
) -> Iterator[Batch]:
    """All examples once, longest first, in batches `[B, S]` of similar lengths.

    Longest first, so that running out of memory shows up immediately.

    Args:
        examples: held-out examples.
        batch_size: rows per batch.
        pad_to_multiple_of, max_length: as in `Batches`.
        strategy: how several examples are packed into a row; None has one per row.
    """
    lengths = lengths_of(examples)
    if strategy is None:
        order = np.argsort(-lengths, kind="stable").tolist()
        rows = [[(i, 0, int(lengths[i]))] for i in order]
    else:
        rows = packed(lengths, max_length, strategy)
    for first in range(0, len(rows), batch_size):
        chosen = [
            fill(examples, row, strategy or "bfd") for row in rows[first : first + batch_size]
        ]
        yield pad(chosen, batch_size, pad_to_multiple_of, max_length)


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
    length = padded_length(longest, multiple, max_length)
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


def padded_length(longest: int, multiple: int, max_length: int) -> int:
    """The length of a batch's rows: the longest, rounded up, but not beyond `max_length`."""
    return min(-(-longest // multiple) * multiple, max(max_length, longest))
