"""Update stacked arrays as their layers would be updated one by one.

A stack stores the A of all its layers in one array `[layer, in, r]`, and a fused projection stores
its slices side by side. Optimizers that work on single numbers (Adam, Lion, SGD) need not know.
Those that look at a whole parameter (Adafactor's factored moments and RMS clipping, Muon's
orthogonalization) would mix the layers: optax takes the two largest axes of `[layer, in, r]` for a
matrix, and transformers averages over the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lora_flax.index import ModelIndex
from lora_flax.layers.adapter import Spec
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.targets.naming import Path
from lora_flax.trainable import names_of, trainable_filter


@dataclass(frozen=True)
class Parts:
    """The parameters that one trainable array holds.

    Attributes:
        stack: number of leading axes that count layers.
        columns: how many of the last axis's entries belong to each slice.
        ranks: `[*stack, slice]`, the rank that each slice uses of the room for it; None for an
            array without a rank axis.
        rank_axis: -1 for A, -2 for B.
    """

    stack: int
    columns: tuple[int, ...]
    ranks: np.ndarray | None = None
    rank_axis: int = 0

    def split(self, array: jax.Array) -> list[jax.Array]:
        """The slices, `[*stack, rows, columns]` each; a convolution's window counts as rows.

        An array whose layers are vectors gives vectors.
        """
        ends = np.cumsum(self.columns)[:-1].tolist()
        found: list[jax.Array] = jnp.split(self._as_matrix(array), ends, axis=-1)
        return found

    def join(self, parts: list[jax.Array], like: jax.Array) -> jax.Array:
        """The array again, from its slices."""
        return jnp.concatenate(parts, axis=-1).reshape(like.shape)

    def sizes(self, array: jax.Array) -> list[jax.Array]:
        """Rows and columns in use of each slice, float32 `[*stack, 2]`; a vector has one row."""
        matrix = jax.eval_shape(self._as_matrix, array)
        stack, shape = matrix.shape[: self.stack], matrix.shape[self.stack :]
        found = []
        for index, width in enumerate(self.columns):
            size = np.ones((*stack, 2), np.float32)
            size[..., :] = (shape[0] if len(shape) > 1 else 1, width)
            if self.ranks is not None:
                size[..., 1 if self.rank_axis == -1 else 0] = self.ranks[..., index]
            found.append(jnp.asarray(size))
        return found

    def _as_matrix(self, array: jax.Array) -> jax.Array:
        if array.ndim - self.stack <= 2:
            return array
        return array.reshape(*array.shape[: self.stack], -1, array.shape[-1])


def array_parts(model: nnx.Module) -> dict[Path, Parts]:
    """How each trainable array of a wrapped model is made up, by its path.

    Raises:
        LoraError: for the same reasons as `mark_only_lora_as_trainable`.
    """
    index = ModelIndex(model)
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, trainable_filter(index))):
        owner, spec = _owner(index, path)
        stack = index.stack(owner)
        found[path] = _parts(path, stack, spec, variable.shape)
    return found


def _owner(index: ModelIndex, path: Path) -> tuple[Path, Spec | None]:
    """The module that an array belongs to, and the spec of its update if it is part of one."""
    for end in range(len(path)):
        if path[end] == "adapters":
            layer = index.owners[path[:end]]
            inside = isinstance(layer, LoRALayer) and len(path) == end + 3
            return path[:end], layer.adapters[path[end + 1]].spec if inside else None
    return path[:-1], None


def _parts(path: Path, stack: tuple[int, ...], spec: Spec | None, shape: tuple[int, ...]) -> Parts:
    if spec is None:
        return Parts(len(stack), (shape[-1],))
    sizes = tuple(part.size for part in spec.slices)
    ranks = np.array(spec.ranks, np.float32).reshape(*stack, len(sizes))
    if path[-1] == "lora_A":
        return Parts(len(stack), (spec.rank,) * len(sizes), ranks, -1)
    if path[-1] == "lora_B":
        return Parts(len(stack), sizes, ranks, -2)
    return Parts(len(stack), sizes)


def per_part(
    tx: optax.GradientTransformation, parts: Mapping[Path, Parts]
) -> optax.GradientTransformationExtraArgs:
    """Apply `tx` to every parameter that the arrays hold, each on its own.

    Args:
        tx: a transformation of one matrix `[in, out]` or vector. It gets the rows and columns in
            use as the extra argument `size`, float32 `[2]`: padding of unequal ranks, which stays
            zero, does not count.
        parts: from `array_parts`, for every array of the tree.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for path, leaf in _leaves(params):
            own, make = parts[path], tx.init
            for _ in range(own.stack):
                make = jax.vmap(make)
            _put(state, path, [make(part) for part in own.split(leaf)])
        return state

    def update(
        updates: optax.Updates,
        state: dict[str, Any],
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, dict[str, Any]]:
        new_state: dict[str, Any] = {}
        leaves = []
        values = _leaves(updates if params is None else params)
        for (path, leaf), (_, value) in zip(_leaves(updates), values, strict=True):
            own, take = parts[path], functools.partial(_update_one, tx, extra)
            for _ in range(own.stack):
                take = jax.vmap(take)
            done = [
                take(*arguments)
                for arguments in zip(
                    own.split(leaf), _get(state, path), own.split(value), own.sizes(leaf),
                    strict=True,
                )
            ]  # fmt: skip
            leaves.append(own.join([one for one, _ in done], leaf))
            _put(new_state, path, [after for _, after in done])
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _update_one(
    tx: optax.GradientTransformationExtraArgs,
    extra: dict[str, Any],
    update: jax.Array,
    state: Any,
    value: jax.Array,
    size: jax.Array,
) -> tuple[Any, Any]:
    new: tuple[Any, Any] = tx.update(update, state, value, size=size, **extra)
    return new


def _leaves(tree: Any) -> Iterator[tuple[Path, jax.Array]]:
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield names_of(key_path), leaf


def _put(tree: dict[str, Any], path: Path, value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(str(name), {})
    tree[str(path[-1])] = value


def _get(tree: dict[str, Any], path: Path) -> Any:
    for name in path:
        tree = tree[str(name)]
    return tree
