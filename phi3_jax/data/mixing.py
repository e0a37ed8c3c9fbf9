"""Several data sets in one run, each with its share of the examples of an epoch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from phi3_jax.data.order import Lazy, Shuffled

StoppingStrategy = Literal["first_exhausted", "all_exhausted"]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Examples of several sources, one source after the other.

    The shares are exact, to less than an example: they are counted and not drawn by chance.
    `first_exhausted` takes as many examples as the source that runs out first allows, and of the
    others a random part; `all_exhausted` takes every example at least once, and those of the
    smaller sources again.

    Attributes:
        names: what reports call the sources.
        sizes: examples of each source.
        weights: shares of the sources, relative to each other.
        stopping_strategy: which source ends an epoch.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    stopping_strategy: StoppingStrategy = "first_exhausted"

    @property
    def counts(self) -> tuple[int, ...]:
        """Examples of each source in an epoch."""
        # Fractions of the decimal numbers that the config has: 0.1 is a tenth.
        shares = [Fraction(str(weight)) for weight in self.weights]
        totals = [size / share for size, share in zip(self.sizes, shares, strict=True)]
        if self.stopping_strategy == "first_exhausted":
            return tuple(math.floor(share * min(totals)) for share in shares)
        return tuple(math.ceil(share * max(totals)) for share in shares)

    def order(self, draw: int, shuffle: int) -> Mixed:
        """The examples of an epoch.

        Args:
            draw: seed of which examples are taken where not all are.
            shuffle: seed of their order.
        """
        return Mixed(self, draw, shuffle)

    def count_by_name(self, examples: np.ndarray) -> dict[str, int]:
        """How many of these examples, by their indices, each source has."""
        ends = np.cumsum(self.sizes)
        own = np.bincount(np.searchsorted(ends, examples, side="right"), minlength=len(ends))
        return dict(zip(self.names, own.tolist(), strict=True))


class Mixed(Lazy[int]):
    """The examples of an epoch of a mixture, in order; see `Mixture.order`."""

    def __init__(self, mixture: Mixture, draw: int, shuffle: int) -> None:
        self._sizes = mixture.sizes
        self._firsts = np.cumsum([0, *mixture.sizes])[:-1].tolist()
        self._ends = np.cumsum(mixture.counts)
        self._order = Shuffled(int(self._ends[-1]), shuffle)
        seeds = np.random.SeedSequence(draw).generate_state(len(mixture.sizes)).tolist()
        self._drawn = [Shuffled(n, seed) for n, seed in zip(mixture.sizes, seeds, strict=True)]

    def __len__(self) -> int:
        return len(self._order)

    def item(self, index: int) -> int:
        """The example at an index."""
        number = self._order.item(index)
        source = int(np.searchsorted(self._ends, number, side="right"))
        within = number - (int(self._ends[source - 1]) if source else 0)
        # Whole passes take every example; of the last one, a random part.
        return int(self._firsts[source]) + self._drawn[source].item(within % self._sizes[source])


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """What reports call the sources at these paths."""
    short = [PurePosixPath(path).name or path for path in paths]
    return tuple(
        f"{name} ({number})" if short.count(name) > 1 else name
        for number, name in enumerate(short, start=1)
    )
