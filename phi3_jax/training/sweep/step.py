"""The training and evaluation steps of some members of a sweep, and where their arrays are.

The arrays of all N members are stacked along a leading axis. On a mesh that axis is split over the
mesh axis `member` (`mesh.data` of the config), and padded to a multiple of its size. A step takes
the arrays of its group out of the stack and puts the new ones back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phi3_jax.evaluation.loss import Batch, LossSettings, LossSums, batch_loss
from phi3_jax.model.remat import Remat
from phi3_jax.sharding.mesh import MEMBER, place
from phi3_jax.sharding.rules import state_shardings
from phi3_jax.training.step import (
    StepMetrics,
    TrainState,
    compiler_options,
    train_state_shardings,
    train_step,
)

T = TypeVar("T")


def stacked_state_shardings(
    tx: optax.GradientTransformation, trainable: nnx.State[Any, Any], mesh: Mesh
) -> TrainState:
    """The sharding of each array of the stacked state; `trainable` has the leading axis."""
    return _stacked(train_state_shardings(tx, _one(trainable), mesh))


def stacked_shardings(state: nnx.State[Any, Any], mesh: Mesh) -> nnx.State[Any, Any]:
    """The sharding of each array of a state with the leading axis."""
    return _stacked(state_shardings(_one(state), mesh))


def _one(state: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
    """One member's arrays, shapes only."""

    def first(tree: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
        member: nnx.State[Any, Any] = jax.tree.map(lambda leaf: leaf[0], tree)
        return member

    shapes: nnx.State[Any, Any] = jax.eval_shape(first, state)
    return shapes


def _stacked(shardings: T) -> T:
    stacked: T = jax.tree.map(
        lambda own: NamedSharding(own.mesh, PartitionSpec(MEMBER, *own.spec)), shardings
    )
    return stacked


def spread(tree: T, shardings: Any, count: int) -> T:
    """Stacked arrays, padded by copies of the first member to `count`, placed on the mesh."""

    def widened(array: jax.Array) -> jax.Array:
        extra = count - array.shape[0]
        return jnp.concatenate([array, jnp.repeat(array[:1], extra, axis=0)]) if extra else array

    placed: T = place(jax.tree.map(widened, tree), shardings)
    return placed


def jit_sweep_step(
    graphdef: nnx.GraphDef[Any],
    tx: optax.GradientTransformation,
    remat: Remat,
    loss: LossSettings = LossSettings(),  # noqa: B008 (immutable)
    shardings: TrainState | None = None,
) -> jax.stages.Wrapped:
    """`step(state, constants, frozen, batch, members, step, seeds, rates)` for N adapters.

    Leaves of state and constants have a leading axis of N, as have seeds and rates. `members`
    int32 `[k]` are those that take the step, None for all. The batch is `[A, B, S]`, or has a
    leading axis of k. The metrics are `[k]`. The base, `frozen`, is read once for all k. With
    `shardings`, the new state keeps the sharding of the old one, and every device has the metrics
    of all. See `lora_flax.wrap_many`.
    """

    def run(
        state: TrainState,
        constants: nnx.State[Any, Any],
        frozen: nnx.State[Any, Any],
        batch: Batch,
        members: jax.Array | None,
        step: jax.Array,
        seeds: jax.Array,
        rates: jax.Array,
    ) -> tuple[TrainState, StepMetrics]:
        shared = batch["tokens"].ndim == 3

        def one(own: Any) -> tuple[TrainState, StepMetrics]:
            own_state, own_constants, seed, rate, own_batch = own
            rest = nnx.merge_state(own_constants, frozen)
            micro = batch if shared else own_batch
            return train_step(graphdef, tx, remat, own_state, rest, micro, step, seed, rate, loss)

        taken = _taken((state, constants, seeds, rates), members)
        new, metrics = _for_each(one, (*taken, None if shared else batch))
        return _returned(state, new, members), metrics

    return jax.jit(
        run,
        donate_argnums=0,
        out_shardings=(shardings, None if shardings is None else _everywhere(shardings)),
        compiler_options=compiler_options(shardings),
    )


def jit_sweep_eval_step(graphdef: nnx.GraphDef[Any], mesh: Mesh) -> Callable[..., LossSums]:
    """`step(trainable, constants, frozen, batch, members) -> LossSums` `[k]`, batch `[B, S]`.

    Every device of the mesh has the sums of all.
    """

    def run(
        trainable: nnx.State[Any, Any],
        constants: nnx.State[Any, Any],
        frozen: nnx.State[Any, Any],
        batch: Batch,
        members: jax.Array | None,
    ) -> LossSums:
        def one(own: Any) -> LossSums:
            rest = nnx.merge_state(own[1], frozen)
            return batch_loss(graphdef, own[0], rest, batch, None, remat="none")

        return _for_each(one, _taken((trainable, constants), members))

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _everywhere(shardings: TrainState) -> NamedSharding:
    """A copy on every device of the mesh that these are of."""
    placed: list[NamedSharding] = jax.tree.leaves(shardings)
    return NamedSharding(placed[0].mesh, PartitionSpec())


def _taken(tree: T, members: jax.Array | None) -> T:
    """The arrays of some members; a number past the last one, which pads a group, is the last."""
    if members is None:
        return tree
    free = PartitionSpec.UNCONSTRAINED

    def of(whole: jax.Array) -> jax.Array:
        part = whole.at[members].get(mode="clip")
        if not _on_mesh():
            return part
        # Otherwise each device might compute all members.
        spec = PartitionSpec(MEMBER, *[free] * (part.ndim - 1))
        placed: jax.Array = jax.lax.with_sharding_constraint(part, spec)
        return placed

    taken: T = jax.tree.map(of, tree)
    return taken


def _returned(whole: T, new: T, members: jax.Array | None) -> T:
    """The whole stack with the arrays of some members replaced."""
    if members is None:
        return new
    put: T = jax.tree.map(lambda old, part: old.at[members].set(part, mode="drop"), whole, new)
    return put


def _for_each(function: Callable[[Any], T], members: Any) -> T:
    """The function of each member, all together; of a single one as in a run alone."""
    if jax.tree.leaves(members)[0].shape[0] == 1:
        own = function(jax.tree.map(lambda leaf: leaf[0], members))
        result: T = jax.tree.map(lambda leaf: leaf[None], own)
        return result
    return jax.vmap(function, spmd_axis_name=MEMBER if _on_mesh() else None)(members)


def _on_mesh() -> bool:
    """Whether the members are spread over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape.get(MEMBER, 1) > 1
