"""What the loss needs of the logits, computed in the orientation that each device takes fastest."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Of each position: log-sum-exp, the label's logit, mean, and maximum.
Statistics = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def statistics(logits: jax.Array, labels: jax.Array, with_mean: bool) -> Statistics:
    """Statistics of each position's logits, float32 `[n]` each.

    On a CPU they are computed from `[V, n]`, and so is the gradient. Rows of a vocabulary's length
    are often a multiple of a memory page apart, and the head's products then take twice as long.
    XLA turns the transposed product of the head into one that gives `[V, n]`; the barrier keeps it
    from turning that back. Over several devices, where the vocabulary may be cut, the logits keep
    their orientation.

    Args:
        logits: float32 `[n, V]`.
        labels: int32 `[n]`.
        with_mean: whether the mean is needed; otherwise it is 0.
    """

    def along(axis: int, logits: jax.Array, labels: jax.Array) -> Statistics:
        log_z = jax.nn.logsumexp(logits, axis=axis)
        own = jnp.take_along_axis(logits, jnp.expand_dims(labels, axis), axis=axis).squeeze(axis)
        mean = logits.mean(axis=axis) if with_mean else jnp.zeros_like(log_z)
        return log_z, own, mean, logits.max(axis=axis)

    def on_cpu(logits: jax.Array, labels: jax.Array) -> Statistics:
        return along(0, jax.lax.optimization_barrier(logits.T), labels)

    if jax.sharding.get_abstract_mesh().size > 1:
        return along(1, logits, labels)
    found: Statistics = jax.lax.platform_dependent(
        logits, labels, cpu=on_cpu, default=functools.partial(along, 1)
    )
    return found
