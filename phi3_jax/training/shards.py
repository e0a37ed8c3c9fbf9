"""How arrays are cut into shards: which process writes which, and what another mesh needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

# The first and last position (exclusive) on every axis.
Index = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A block of an array, and the process that writes it."""

    index: Index
    process: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """A saved array.

    Attributes:
        shape, dtype: of the whole array.
        shards: blocks that cover it once.
    """

    shape: tuple[int, ...]
    dtype: str
    shards: tuple[Shard, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        shards = [[shard.process, [list(axis) for axis in shard.index]] for shard in self.shards]
        return {"shape": list(self.shape), "dtype": self.dtype, "shards": shards}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Layout:
        """The inverse of `to_json`."""
        shards = tuple(
            Shard(tuple((start, stop) for start, stop in index), process)
            for process, index in saved["shards"]
        )
        return cls(tuple(saved["shape"]), saved["dtype"], shards)


def flat_arrays(state: Any) -> dict[str, jax.Array]:
    """Arrays keyed by path: stable names, independent of Flax and optax classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    # Numbered, so that the order stays when dictionaries are sorted by key.
    return {
        f"{i:05d} {jax.tree_util.keystr(path, simple=True, separator='.')}": leaf
        for i, (path, leaf) in enumerate(leaves)
    }


def layout_of(array: jax.Array) -> Layout:
    """The blocks of an array and who writes them: of several holders the first, as in Orbax."""
    shards: dict[Index, Shard] = {}
    places: dict[Any, Any] = dict(array.sharding.devices_indices_map(array.shape))
    for device, slices in places.items():
        index = index_of(slices or (), array.shape)
        shards.setdefault(index, Shard(index, device.process_index))
    return Layout(array.shape, str(array.dtype), tuple(shards.values()))


def layout_on_first(array: jax.Array | np.ndarray) -> Layout:
    """The layout of an array that the first process writes as a whole."""
    shards = (Shard(index_of((), array.shape), 0),)
    return Layout(array.shape, str(array.dtype), shards)


def writes(array: jax.Array) -> bool:
    """Whether this process writes a block of the array."""
    return any(shard.replica_id == 0 for shard in array.addressable_shards)


def wanted_of(array: jax.Array) -> list[Index]:
    """The blocks that this process's devices hold."""
    slices = array.sharding.addressable_devices_indices_map(array.shape).values()
    return sorted({index_of(each or (), array.shape) for each in slices})


def index_of(slices: Sequence[slice], shape: Sequence[int]) -> Index:
    """The index of a block that JAX describes by slices."""
    found = [part.indices(size)[:2] for part, size in zip(slices, shape, strict=False)]
    return tuple(found) + tuple((0, size) for size in shape[len(found) :])


def overlap(one: Index, other: Index) -> Index | None:
    """What two blocks share; None if they share nothing."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < stop for start, stop in both) else None


def slices_in(whole: Index, part: Index) -> tuple[slice, ...]:
    """Where a part of a block is in it."""
    return tuple(
        slice(start - first, stop - first)
        for (first, _), (start, stop) in zip(whole, part, strict=True)
    )


def shape_of(index: Index) -> tuple[int, ...]:
    """The shape of a block."""
    return tuple(stop - start for start, stop in index)
