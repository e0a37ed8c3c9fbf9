"""The sharding rule of every parameter.

One table, from a module of the network to the mesh axes of its weight's inputs and outputs. Which
axes of an array are the inputs or the outputs is the array's own matter (`lora_flax.axes_of`), so
an adapter and a quantized weight are split like the plain weight that they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

import lora_flax
from phi3_jax.sharding.mesh import BATCH_AXES

State = nnx.State[Any, Any]

# Mesh axes for a weight's inputs and outputs; `sequence` devices have tokens of their own, so what
# `fsdp` cuts is cut over them too. Projections into heads or the MLP split their outputs
# over `tensor`, projections back split their inputs, so no communication is needed in between.
_SPLIT_OUT = {"in": "fsdp", "out": "tensor"}
_SPLIT_IN = {"in": "tensor", "out": "fsdp"}
_RULES: dict[str, dict[str, str]] = {
    "embed_tokens": _SPLIT_IN,
    "qkv_proj": _SPLIT_OUT,
    "gate_up_proj": _SPLIT_OUT,
    "o_proj": _SPLIT_IN,
    "down_proj": _SPLIT_IN,
    "lm_head": _SPLIT_OUT,
}


def spec_of(path: Iterable[str], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition spec of one array of the model.

    A mesh axis that does not divide its dimension is dropped, `sequence` first, and arrays without
    a rule are replicated.

    Args:
        path: names of the modules and the parameter, as `lora_flax.axes_of` takes them.
        shape: shape of the array.
        mesh: the mesh, for its axis sizes.
    """
    path = list(path)
    rule = next((_RULES[name] for name in path if name in _RULES), None)
    if rule is None:
        return PartitionSpec()

    def over(axis: lora_flax.Axis | None, size: int) -> str | tuple[str, ...] | None:
        if axis is None:
            return None
        name = rule[axis.side]
        parts, wide = mesh.shape[name] * axis.unit, mesh.shape.get("sequence", 1)
        if name == "fsdp" and wide > 1 and size % (parts * wide) == 0:
            return ("fsdp", "sequence")
        return name if size % parts == 0 else None

    axes = lora_flax.axes_of(path, len(shape))
    return PartitionSpec(*(over(axis, size) for axis, size in zip(axes, shape, strict=bool(axes))))


def lora_shards(path: Sequence[str], shape: Sequence[int], mesh: Mesh) -> lora_flax.Shards:
    """How a dense layer with LoRA is cut where it runs: its rows, and its weight over `tensor`.

    Args:
        path: names of the modules down to the layer.
        shape: shape of its weight.
        mesh: the mesh.
    """
    inputs, outputs = (*spec_of((*path, "kernel"), shape, mesh), None, None)[:2]

    def kept(side: Any) -> tuple[str, ...]:
        return ("tensor",) if side == "tensor" else ()

    gathered = mesh.shape["fsdp"] * mesh.shape["sequence"] > 1
    rows = (BATCH_AXES, ("sequence",))
    return lora_flax.Shards(rows, kept(inputs), kept(outputs), gathered)


def state_shardings(state: State, mesh: Mesh) -> State:
    """The sharding of each array of a state, as a tree of the same structure."""
    shardings: State = shardings_at((), state, mesh)
    return shardings


def shardings_at(path: tuple[str, ...], tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array of the part of a state that is found at the path."""

    def of(below: Sequence[Any], leaf: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, spec_of((*path, *_names(below)), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def gathered(state: State, module: str) -> State:
    """The state with one module's arrays gathered over `fsdp` and `sequence`.

    Needs jit and a mesh in context. For a module used in a loop, where the compiler would otherwise
    gather its weights on every iteration.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] * mesh.shape.get("sequence", 1) == 1:
        return state

    def of(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        names = _names(path)
        if module not in names:
            return leaf
        spec = (axis if axis == "tensor" else None for axis in spec_of(names, leaf.shape, mesh))
        placed: jax.Array = jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))
        return placed

    whole: State = jax.tree_util.tree_map_with_path(of, state)
    return whole


def _names(path: Sequence[Any]) -> list[str]:
    names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
    return [name for name in names if name != "value"]


def optimizer_shardings(
    tx: optax.GradientTransformation, trainable: State, mesh: Mesh
) -> optax.OptState:
    """Arrays that have a parameter's path and number of axes are sharded like it, others whole."""
    axes = {
        tuple(_names(path)): leaf.ndim
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)
    }
    lengths = sorted({len(names) for names in axes})
    whole = NamedSharding(mesh, PartitionSpec())

    def of(path: Sequence[Any], leaf: jax.Array) -> NamedSharding:
        names = _names(path)
        for length in lengths:
            for start in range(len(names) - length + 1):
                own = tuple(names[start : start + length])
                if axes.get(own) == leaf.ndim:
                    return NamedSharding(mesh, spec_of(own, leaf.shape, mesh))
        return whole

    return jax.tree_util.tree_map_with_path(of, jax.eval_shape(tx.init, trainable))
