"""The order of the examples of an epoch, as a function of a seed."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Generic, TypeVar, overload

import grain
import numpy as np

from phi3_jax.data.packing import Part

T = TypeVar("T")


class Lazy(abc.ABC, Sequence[T], Generic[T]):
    """A sequence whose items are worked out one by one, when they are asked for."""

    @abc.abstractmethod
    def item(self, index: int) -> T:
        """The item at an index that is not negative."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.item(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.item(index % len(self))


class Shuffled(Lazy[int]):
    """The numbers below `count` in an order that `seed` decides."""

    def __init__(self, count: int, seed: int) -> None:
        self._order = grain.MapDataset.range(count).shuffle(seed=seed)

    def __len__(self) -> int:
        return len(self._order)

    def item(self, index: int) -> int:
        """The number at an index."""
        # Not by iterating over the data set, which starts threads and takes ten times as long.
        return int(self._order[index])


class OneEach(Lazy[list[Part]]):
    """Rows of one whole example each, in an order."""

    def __init__(self, order: Sequence[int], lengths: np.ndarray) -> None:
        self._order, self._lengths = order, lengths

    def __len__(self) -> int:
        return len(self._order)

    def item(self, index: int) -> list[Part]:
        """The row at an index."""
        example = self._order[index]
        return [(example, 0, int(self._lengths[example]))]


def grouped_by_length(order: Sequence[int], lengths: np.ndarray, batch_size: int) -> list[int]:
    """Examples of similar lengths together, as Hugging Face's `LengthGroupedSampler`.

    The order is cut into groups of up to 50 batches, each of which is sorted by length. The longest
    example of all comes first, so that running out of memory shows up immediately.

    Args:
        order: the examples in random order.
        lengths: the length of each example.
        batch_size: examples per step.
    """
    batches = max(min(len(order) // (batch_size * 4), 50), 1)
    size = batches * batch_size
    groups = [list(order[first : first + size]) for first in range(0, len(order), size)]
    groups = [sorted(group, key=lambda i: -int(lengths[i])) for group in groups]
    if groups:
        longest = max(range(len(groups)), key=lambda g: int(lengths[groups[g][0]]))
        groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
    return [i for group in groups for i in group]
