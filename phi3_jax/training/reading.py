"""Read a checkpoint's arrays onto the mesh of this run, and check them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from phi3_jax.sharding.mesh import place
from phi3_jax.sharding.processes import first_to_all, from_all, is_first, on_all, on_first
from phi3_jax.training.digests import digests
from phi3_jax.training.output import Output, outcome_of, value_of
from phi3_jax.training.shards import Index, flat_arrays, index_of, wanted_of
from phi3_jax.training.state_files import damaged, read_blocks
from phi3_jax.training.step import TrainState

T = TypeVar("T")
# Blocks of each array, by name.
Blocks = Mapping[str, Mapping[Index, np.ndarray]]


def first_reads(function: Callable[[], T]) -> T:
    """`on_first`, for a function that raises Damaged, which then is raised on all processes."""
    value: T = value_of(on_first(lambda: outcome_of(function)))
    return value


def read_state(
    folder: Path, record: Mapping[str, Any], template: TrainState, output: Output | None
) -> TrainState:
    """The state of a checkpoint, placed like another one; all processes call this.

    Each process reads the blocks that its devices hold; where only the first can, it sends every
    array to the others.

    Args:
        folder: the checkpoints of the run.
        record: from `read_record`, the same on all processes.
        template: a state with the shardings to use.
        output: the run's folder, if it is more than `folder`.

    Raises:
        Damaged: an array is missing, changed or not finite, on whatever process.
        Outage: the bucket that it is in does not answer, on whatever process.
    """
    arrays, step = flat_arrays(template), record["step"]
    each = output is None or output.each_writes

    def read() -> Blocks:
        if output is not None:
            output.get_parts(step)
        if each:
            wanted = {name: wanted_of(array) for name, array in arrays.items()}
        elif is_first():
            wanted = {name: [index_of((), array.shape)] for name, array in arrays.items()}
        else:
            return {}
        return read_blocks(folder, record, wanted)

    found = on_all(lambda: outcome_of(read))
    blocks: Blocks = found.pop("value", {})
    for other in from_all(found):
        value_of({"value": None} | other)
    placed = {
        name: _placed(blocks[name], array) if each else _sent(blocks.get(name, {}), array)
        for name, array in arrays.items()
    }
    check_arrays(folder / str(step), record, placed)
    state: TrainState = jax.tree.unflatten(jax.tree.structure(template), placed.values())
    return state


def check_arrays(where: Path, record: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> None:
    """Compare arrays with the digests of the checkpoint that they were read from.

    Raises:
        Damaged: they differ, or one is not finite; on all processes alike.
    """
    for name, digest in digests(arrays).items():
        if digest.text != record["arrays"][name]["digest"]:
            raise damaged(where, f"the array {name!r} differs from its digest")
        if not digest.finite:
            raise damaged(where, f"the array {name!r} is not finite")


def _placed(blocks: Mapping[Index, np.ndarray], like: jax.Array) -> jax.Array:
    """An array of the blocks of each process."""

    def block(slices: tuple[slice, ...] | None) -> np.ndarray:
        return blocks[index_of(slices or (), like.shape)]

    return jax.make_array_from_callback(like.shape, like.sharding, block)


def _sent(blocks: Mapping[Index, np.ndarray], like: jax.Array) -> jax.Array:
    """An array that the first process has as a whole."""
    whole = next(iter(blocks.values())) if blocks else np.zeros(like.shape, like.dtype)
    array: jax.Array = place(first_to_all(whole), like.sharding)
    return array
