"""Examples to batches, in an order that is a function of (seed, epoch).

Any step's batch can be made without those before it, so a resumed run goes on with the very batches
that it would have seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from phi3_jax.data.chat import Example

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Batches:
    """The global batch of each training step.

    A step takes `batch_size * accumulation` examples; the last step of an epoch takes what is left,
    and empty rows fill it up, which the loss does not count.

    Attributes:
        examples: all training examples.
        batch_size: rows of a micro-batch (B).
        accumulation: micro-batches of a step (A).
        seed: of the order; each epoch has another one.
        pad_to_multiple_of: row lengths are rounded up to it.
        max_length: and are never above this.
    """

    examples: Sequence[Example]
    batch_size: int
    accumulation: int
    seed: int
    pad_to_multiple_of: int
    max_length: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every example was seen once more."""
        return -(-len(self.examples) // (self.batch_size * self.accumulation))

    def __getitem__(self, step: int) -> Batch:
        """The batch of step `step`, counted from 0 over all epochs.

        Returns:
            `tokens`, `segment_ids` and `positions` int32 `[A, B, S]`, `targets` bool `[A, B, S]`;
            segment 0 is padding.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        count = self.batch_size * self.accumulation
        order = grain.MapDataset.range(len(self.examples)).shuffle(seed=self._epoch_seed(epoch))
        first = position * count
        chosen = [self.examples[order[i]] for i in range(first, min(first + count, len(order)))]
        batch = pad(chosen, count, self.pad_to_multiple_of, self.max_length)
        shape = (self.accumulation, self.batch_size, -1)
        return {name: array.reshape(shape) for name, array in batch.items()}

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
        yield pad(ordered[first : first + batch_size], batch_size, pad_to_multiple_of, max_length)


def pad(examples: Sequence[Example], rows: int, multiple: int, max_length: int) -> Batch:
    """Lay examples out as rows of one length, each a segment of its own.

    What fills a row is told by segment 0 and not by a token id, so no token that must be learnt is
    ever taken for padding.

    Args:
        examples: at most `rows` of them, none longer than `max_length`.
        rows: rows of the batch; those without an example are all padding.
        multiple: the length is the longest example's, rounded up to this.
        max_length: of a row.
    """
    longest = max(len(example.tokens) for example in examples)
    length = min(-(-longest // multiple) * multiple, max(max_length, longest))
    batch: Batch = {
        name: np.zeros((rows, length), np.int32) for name in ("tokens", "segment_ids", "positions")
    }
    batch["targets"] = np.zeros((rows, length), bool)
    for row, example in enumerate(examples):
        n = len(example.tokens)
        batch["tokens"][row, :n] = example.tokens
        batch["segment_ids"][row, :n] = 1
        batch["positions"][row, :n] = np.arange(n)
        batch["targets"][row, :n] = example.targets
    return batch
