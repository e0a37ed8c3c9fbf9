"""The training step: pure, jitted, and the only place that computes gradients.

The model is split once into trainable and frozen arrays. Gradients are taken only with respect to
the trainable ones, so frozen weights never get a gradient, optimizer state or a weight-gradient
matmul.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import lora_flax
from phi3_jax.compiler import step_options
from phi3_jax.evaluation.loss import Batch, LossSettings, LossSums, batch_loss
from phi3_jax.model.remat import Remat
from phi3_jax.sharding.mesh import place
from phi3_jax.sharding.rules import optimizer_shardings, state_shardings

# The summed gradients and losses of the micro-batches so far.
Sums = tuple[nnx.State[Any, Any], LossSums]


class TrainState(NamedTuple):
    """Everything training changes: all the arrays a checkpoint must hold."""

    trainable: nnx.State[Any, Any]
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """Metrics of one step, all scalars.

    Attributes:
        loss: the objective, averaged over the target tokens of the global batch.
        accuracy: share of target tokens that were the most probable token.
        grad_norm: global L2 norm of the trainable gradients, before clipping.
        target_tokens: number of targets the loss is averaged over.
        finite: whether loss, gradient norm and updated arrays are finite; if not, the step was
            skipped.
    """

    loss: jax.Array
    accuracy: jax.Array
    grad_norm: jax.Array
    target_tokens: jax.Array
    finite: jax.Array


def partition(
    model: nnx.Module,
) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any], nnx.State[Any, Any]]:
    """Split a wrapped model into its graph definition, trainable arrays and frozen arrays."""
    graphdef, *states = nnx.split(model, lora_flax.mark_only_lora_as_trainable(model), ...)
    trainable, frozen = states
    return graphdef, trainable, frozen


def train_state_shardings(
    tx: optax.GradientTransformation, trainable: nnx.State[Any, Any], mesh: Mesh
) -> TrainState:
    """The sharding of each array of the train state, as a tree of the same structure."""
    return TrainState(state_shardings(trainable, mesh), optimizer_shardings(tx, trainable, mesh))


def start_state(
    tx: optax.GradientTransformation, trainable: nnx.State[Any, Any], shardings: TrainState
) -> TrainState:
    """The train state before the first step, placed according to `shardings`."""
    # Copies: a step donates these arrays, and PiSSA's frozen start shares A's initial array.
    trainable = place(jax.tree.map(jnp.copy, trainable), shardings.trainable)
    init = jax.jit(tx.init, out_shardings=shardings.opt_state)
    return TrainState(trainable, init(trainable))


def train_step(
    graphdef: nnx.GraphDef[Any],
    tx: optax.GradientTransformation,
    remat: Remat,
    state: TrainState,
    frozen: nnx.State[Any, Any],
    batch: Batch,
    step: jax.Array,
    seed: jax.Array,
    rate: jax.Array | None = None,
    loss: LossSettings = LossSettings(),  # noqa: B008 (immutable)
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step over a global batch.

    Args:
        batch: arrays `[A, B, S]`. The A micro-batches run sequentially; gradients of their summed
            losses are accumulated, then divided once by the number of targets.
        step, seed: dropout depends only on (seed, step, micro-batch).
        rate: a factor on the update, for a `tx` without a learning rate.
        loss: the loss settings.

    Returns:
        The new state, or the old one bit for bit if the loss, gradients or updated arrays are not
        finite.
    """
    chex.assert_rank(batch["tokens"], 3)
    # By name: JAX's default may be a generator whose numbers depend on the device.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)

    def summed_loss(
        trainable: nnx.State[Any, Any], micro: Batch, micro_key: jax.Array
    ) -> tuple[jax.Array, LossSums]:
        sums = batch_loss(graphdef, trainable, frozen, micro, micro_key, remat, loss)
        return sums.objective, sums

    def accumulate(carry: Sums, xs: tuple[Batch, jax.Array]) -> tuple[Sums, None]:
        micro, index = xs
        grads, sums = jax.grad(summed_loss, has_aux=True)(
            state.trainable, micro, jax.random.fold_in(key, index)
        )
        return jax.tree.map(jnp.add, carry, (grads, sums)), None

    zero = jnp.zeros((), jnp.float32)
    start: Sums = (jax.tree.map(jnp.zeros_like, state.trainable), LossSums(*[zero] * 4))
    micro_batches = batch["tokens"].shape[0]
    (grads, sums), _ = jax.lax.scan(accumulate, start, (batch, jnp.arange(micro_batches)))
    count = jnp.maximum(sums.targets, 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    mean, norm = sums.objective / count, optax.tree.norm(grads)

    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        if rate is not None:
            updates = jax.tree.map(lambda u: u * rate, updates)
        new = TrainState(optax.apply_updates(state.trainable, updates), opt_state)
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        # Finite gradients times a huge learning rate can overflow too, and would be saved.
        for leaf in jax.tree.leaves(new.trainable):
            finite &= jnp.isfinite(leaf).all()
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    return new, StepMetrics(mean, sums.correct / count, norm, sums.targets, finite)


def jit_train_step(
    graphdef: nnx.GraphDef[Any],
    tx: optax.GradientTransformation,
    remat: Remat,
    loss: LossSettings = LossSettings(),  # noqa: B008 (immutable)
    shardings: TrainState | None = None,
) -> jax.stages.Wrapped:
    """`step(state, frozen, batch, step, seed)`, compiled per batch shape; `state` is donated.

    With `shardings`, the new state keeps the sharding of the old one.
    """
    step = functools.partial(train_step, graphdef, tx, remat, loss=loss)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options(shardings),
    )


def compiler_options(shardings: TrainState | None) -> dict[str, str]:
    """What the compiler is told about a step whose state has these shardings."""
    placed: Any = jax.tree.leaves(shardings)
    devices = placed[0].mesh.devices.flat if placed else jax.local_devices()[:1]
    return step_options(devices[0].platform, len(devices), devices[0].device_kind)
