"""A stack of layers that a loop runs: which of its arrays are sliced, and which stay whole.

`jax.lax.scan` gives its body a slice of each stacked array. XLA fuses that slice with a matrix
product that reads it, but for a kernel it first writes a copy. A kernel that reads its blocks out
of the stack asks for the whole of it: by the metadata `whole_stack` of the weight, a wrapper tells
the loop to pass the stack and an index (`Member`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# The metadata of a variable that a wrapper sets.
WHOLE = "whole_stack"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stack", "index"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One layer's array, for readers of the stack; `member[...]` is the array itself.

    Attributes:
        stack: `[L, ...]`.
        index: the layer, int32.
    """

    stack: jax.Array
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def dtype(self) -> jnp.dtype:
        return self.stack.dtype

    def __getitem__(self, index: Any) -> jax.Array:
        layer: jax.Array = jax.lax.dynamic_index_in_dim(self.stack, self.index, keepdims=False)
        return layer[index]


def split_stack(
    layers: nnx.Module,
) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any], nnx.State[Any, Any]]:
    """The graph definition of a stack, its arrays to be sliced, and those that stay whole."""

    def stays_whole(path: Any, variable: Any) -> bool:
        return isinstance(variable, nnx.Variable) and variable.get_metadata().get(WHOLE, False)

    graphdef, *states = nnx.split(layers, stays_whole, ...)
    whole, sliced = states
    return graphdef, sliced, whole


def member_of(whole: nnx.State[Any, Any], index: jax.Array) -> nnx.State[Any, Any]:
    """One layer's part of the arrays that stay whole."""
    members: nnx.State[Any, Any] = jax.tree.map(lambda stack: Member(stack, index), whole)
    return members
