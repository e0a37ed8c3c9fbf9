"""Weight-decomposed low-rank adaptation (DoRA, Liu et al. 2024, arXiv:2402.09353).

The weights of each output, `V = W + A B scale`, are used as `m V / |V|`, where the magnitude m is
trained separately. As in section 4.3 of the paper and in PEFT, `|V|` is treated as a constant in
the backward pass.

`|V|` is computed without forming V: for `W` `[in, out]` with columns w, `|w + A b|^2 = |w|^2 + 2
(A^T w) b + b^T (A^T A) b`, which costs rank times W instead of a second matrix the size of W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_flax.layers.adapter import Adapter


def column_norms(adapter: Adapter, weight: jax.Array) -> jax.Array:
    """`|W + A B scale|` for the columns the adapter covers, float32 `[..., width]`.

    Args:
        adapter: the layer's adapter.
        weight: `[..., in, out]`, of the entire layer.
    """
    norms = []
    for index, part in enumerate(adapter.spec.slices):
        a, b = adapter.factors(index)
        w = weight[..., part.start : part.start + part.size].astype(jnp.float32)
        a_t = jnp.swapaxes(a, -1, -2)
        cross = jnp.sum(jnp.matmul(a_t, w, precision="highest") * b, axis=-2)
        gram = jnp.matmul(a_t, a, precision="highest")
        square = jnp.sum(jnp.matmul(gram, b, precision="highest") * b, axis=-2)
        norms.append(jnp.sqrt(jnp.sum(w * w, axis=-2) + 2 * cross + square))
    return jnp.concatenate(norms, axis=-1)


def _factor(adapter: Adapter, weight: jax.Array) -> jax.Array:
    """`m / |V|` for every output, `[..., features_out]`; 1 for outputs without an update."""
    assert adapter.lora_magnitude is not None
    norms = jax.lax.stop_gradient(column_norms(adapter, weight))
    ratio = adapter.split(adapter.lora_magnitude[...] / norms - 1)
    # A stack member without an update has scale 0, and its magnitudes must not train.
    adapted = adapter.scale[...] != 0
    ratio = [jnp.where(adapted[..., i, None], part, 0.0) for i, part in enumerate(ratio)]
    return 1 + adapter.spread(ratio)


def apply_magnitude(
    adapter: Adapter, weight: jax.Array, y: jax.Array, update: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Applies `m / |V|` to the output, excluding its bias.

    With dropout, PEFT runs the base a second time on the dropped-out input; here the base always
    sees its full input.

    Args:
        adapter: an adapter with magnitudes.
        weight: the layer's weight, `[in, out]`.
        y: the base's output `[..., out]`, including the bias.
        update: the adapter's update, in y's dtype.
        bias: the base's bias.
    """
    factor = _factor(adapter, weight).astype(y.dtype)
    offset = jnp.zeros((), y.dtype) if bias is None else bias.astype(y.dtype)
    # Not factor * (y + update - bias) + bias: this form leaves y unchanged when factor is 1.
    return y + (factor - 1) * (y - offset) + factor * update


def merged_weight(adapters: Sequence[Adapter], weight: jax.Array) -> jax.Array:
    """The weight `[*stack, in, out]`, in its own dtype, with all adapters' updates added.

    Computed in float32, one stack member at a time: a full stack in float32 would take several
    times the model's memory.
    """
    splits = [nnx.split(adapter) for adapter in adapters]
    graphdefs = tuple(graphdef for graphdef, _ in splits)
    merged: jax.Array = _merge(graphdefs, [state for _, state in splits], weight)
    return merged


@functools.partial(jax.jit, static_argnums=0)
def _merge(
    graphdefs: tuple[nnx.GraphDef[Any], ...], states: list[nnx.State[Any, Any]], weight: jax.Array
) -> jax.Array:
    def one(member: tuple[list[nnx.State[Any, Any]], jax.Array]) -> jax.Array:
        states, weight = member
        wide = weight.astype(jnp.float32)
        for graphdef, state in zip(graphdefs, states, strict=True):
            wide = _merged_columns(nnx.merge(graphdef, state), wide)
        return wide.astype(weight.dtype)

    run: Callable[[Any], Any] = one
    for _ in range(weight.ndim - 2):
        run = functools.partial(jax.lax.map, run)
    merged: jax.Array = run((states, weight))
    return merged


def _merged_columns(adapter: Adapter, weight: jax.Array) -> jax.Array:
    """The weight `[*stack, in, out]`, float32, with the adapter's update added."""
    merged = weight + adapter.delta()
    if adapter.lora_magnitude is None:
        return merged
    return merged * _factor(adapter, weight)[..., None, :]
