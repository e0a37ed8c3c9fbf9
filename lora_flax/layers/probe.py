"""Input statistics of a layer, extracted from a model as a gradient.

`observe` is the identity on its input; the cotangent of the variable passed along with the input is
not a derivative but a set of sums over the inputs. Callers take `jax.grad` with respect to
`ProbeStats`; scan, remat, jit and sharding carry the sums like any other gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# What the backward pass of `observe` needs: the inputs, the basis and the weights.
_Saved = tuple[jax.Array, jax.Array, jax.Array]


class ProbeStats(nnx.Variable[Any]):
    """Filled in by `observe`, float32 `[*stack, in, q + 3]`: see `Probe`."""


class ProbeWeights(nnx.Variable[Any]):
    """The weight of each input, float32 `[*stack, B, S]`, or `[*stack]` if all are equal."""


class Probe(nnx.Module):
    """Sums over a layer's inputs x, projected onto q directions.

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
        """Returns x unchanged."""
        return _observe(x, self.stats[...], self.basis[...], self.weights[...])


@jax.custom_vjp
def _observe(x: jax.Array, stats: jax.Array, basis: jax.Array, weights: jax.Array) -> jax.Array:
    return x


def _forward(
    x: jax.Array, stats: jax.Array, basis: jax.Array, weights: jax.Array
) -> tuple[jax.Array, _Saved]:
    return x, (x, basis, weights)


def _backward(
    saved: _Saved, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
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
