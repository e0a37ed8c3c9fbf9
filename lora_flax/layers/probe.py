"""Statistics of what a layer sees, taken out of a model as a gradient.

`observe` is the identity; the cotangent of the variable that it is given beside the input is not a
derivative but sums over the inputs. A caller takes `jax.grad` with respect to `ProbeStats`, and
scan, remat, jit and sharding carry the sums out as they carry any gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class ProbeStats(nnx.Variable):
    """What `observe` fills in, float32 `[*stack, in, q + 3]`: see `Probe`."""


class ProbeWeights(nnx.Variable):
    """What each input counts, float32 `[*stack, B, S]`, or `[*stack]` for all alike."""


class Probe(nnx.Module):
    """Sums over the inputs x of a layer, seen along q directions.

    Attributes:
        basis: Q `[*stack, in, q]`.
        stats: its gradient has the columns `X^T (X Q)`, then `X^T 1`, `diag(X^T X)`, and the number
            of inputs.
        weights: see `ProbeWeights`.
    """

    def __init__(self, basis: jax.Array):
        *lead, q = basis.shape
        self.basis = nnx.Variable(basis.astype(jnp.float32))
        self.stats = ProbeStats(jnp.zeros((*lead, q + 3), jnp.float32))
        self.weights = ProbeWeights(jnp.ones(basis.shape[:-2], jnp.float32))

    def observe(self, x: jax.Array) -> jax.Array:
        """x as it is."""
        return _observe(x, self.stats[...], self.basis[...], self.weights[...])


@jax.custom_vjp
def _observe(x: jax.Array, stats: jax.Array, basis: jax.Array, weights: jax.Array) -> jax.Array:
    return x


def _forward(x, stats, basis, weights):
    return x, (x, basis, weights)


def _backward(saved, cotangent):
    x, basis, weights = saved
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    counts = jnp.broadcast_to(weights.reshape(*weights.shape, *(1,) * (x.ndim - weights.ndim)),
                              (*x.shape[:-1], 1)).reshape(-1, 1)  # fmt: skip
    weighted = flat * counts
    columns = [
        weighted.T @ (flat @ basis),
        weighted.sum(0)[:, None],
        (weighted * flat).sum(0)[:, None],
        jnp.broadcast_to(counts.sum(), (x.shape[-1], 1)),
    ]
    stats = jnp.concatenate(columns, axis=-1)
    return cotangent, stats, jnp.zeros_like(basis), jnp.zeros_like(weights)


_observe.defvjp(_forward, _backward)
