"""Attention of some queries of a row over all its keys, in plain JAX.

Queries are taken in blocks, and for each block the blocks of keys that it can see in the row, with
a running softmax (FlashAttention, Dao et al. 2022), forward and backward. Which keys those are may
depend on the device, as in context parallelism, unlike in `phi3_jax.model.blockwise`.

Shapes: B rows, S queries, T keys, K key/value heads, G query heads per key/value head, H head_dim,
n queries and m keys in a block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from phi3_jax.model.blockwise import Tokens
from phi3_jax.model.remat import saved


class Blocks(NamedTuple):
    """The sliding window (None: unlimited), and the queries and keys of a block.

    The block sizes divide the number of queries and of keys.
    """

    window: int | None
    queries: int
    keys: int


Arrays = tuple[jax.Array, ...]
# query, key, value, tokens, starts, output, log-sum-exp of the scores.
Residuals = tuple[jax.Array, jax.Array, jax.Array, Tokens, jax.Array, jax.Array, jax.Array]
_LOWEST = float(jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash_attention(
    blocks: Blocks,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    starts: jax.Array,
) -> jax.Array:
    """Softmax attention `[B, K, G, S, H]`; scores and softmax in float32.

    Args:
        blocks: window and block sizes.
        query: `[B, K, G, S, H]`, scaled.
        key, value: `[B, K, T, H]`, in the order of the row.
        tokens: positions and segments.
        starts: int32 `[S / n]`, for each block of queries the index of its first one in the row.
    """
    return _forward(blocks, query, key, value, tokens, starts)[0]


def _forward(
    blocks: Blocks,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    starts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, K, G, S, H]` and log-sum-exp of the scores, float32 `[B, K, G, S]`."""

    def block(_: None, xs: Any) -> Any:
        q, own, start = xs

        def add(index: jax.Array, carry: Arrays) -> Arrays:
            out, top, total = carry
            k, v, seen = _keys_of(blocks, key, value, tokens, index)
            scores = _scores(blocks, q, k, own, seen)
            new = jnp.maximum(top, scores.max(axis=-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            added = _einsum("bkgnm,bkmh->bkgnh", weights.astype(v.dtype), v)
            total = total * shrink + weights.sum(axis=-1)
            return out * shrink[..., None] + added, new, total

        zeros = jnp.zeros(q.shape[:-1], jnp.float32)
        carry = (jnp.zeros(q.shape, jnp.float32), zeros + _LOWEST, zeros)
        out, top, total = jax.lax.fori_loop(*_visible(blocks, start), add, carry)
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    xs = (_cut(blocks, query, 3), _own(blocks, tokens), starts)
    _, (out, log_sum) = jax.lax.scan(block, None, xs)
    return _joined(out), _joined(log_sum)


def _fwd(
    blocks: Blocks,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    starts: jax.Array,
) -> tuple[jax.Array, Residuals]:
    out, log_sum = _forward(blocks, query, key, value, tokens, starts)
    out, log_sum = saved(out, "attention"), saved(log_sum, "attention")
    return out, (query, key, value, tokens, starts, out, log_sum)


def _bwd(
    blocks: Blocks, residuals: Residuals, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    query, key, value, tokens, starts, out, log_sum = residuals
    # The term that the softmax gradient subtracts from each row (FlashAttention, section 3.1).
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def block(carry: Arrays, xs: Any) -> Any:
        q, d_o, own, start, total, d = xs

        def add(index: jax.Array, carry: Arrays) -> Arrays:
            d_q, d_key, d_value = carry
            k, v, seen = _keys_of(blocks, key, value, tokens, index)
            weights = jnp.exp(_scores(blocks, q, k, own, seen) - total[..., None])
            d_weights = _einsum("bkgnh,bkmh->bkgnm", d_o, v)
            d_scores = (weights * (d_weights - d[..., None])).astype(k.dtype)
            d_k = _einsum("bkgnm,bkgnh->bkmh", d_scores, q)
            d_v = _einsum("bkgnm,bkgnh->bkmh", weights.astype(v.dtype), d_o)
            d_q = d_q + _einsum("bkgnm,bkmh->bkgnh", d_scores, k)
            return d_q, _added(d_key, d_k, index), _added(d_value, d_v, index)

        carry = (jnp.zeros(q.shape, jnp.float32), *carry)
        d_q, *carry = jax.lax.fori_loop(*_visible(blocks, start), add, carry)
        return tuple(carry), d_q.astype(q.dtype)

    xs = (
        *(_cut(blocks, array, 3) for array in (query, d_out)),
        _own(blocks, tokens),
        starts,
        *(_cut(blocks, array, 3) for array in (log_sum, delta)),
    )
    zeros = tuple(jnp.zeros(array.shape, jnp.float32) for array in (key, value))
    (d_key, d_value), d_query = jax.lax.scan(block, zeros, xs)
    return _joined(d_query), d_key.astype(key.dtype), d_value.astype(value.dtype), None, None


flash_attention.defvjp(_fwd, _bwd)


def _visible(blocks: Blocks, start: jax.Array) -> tuple[jax.Array | int, jax.Array]:
    """The first block of keys that some query of a block can attend to, and the end of them."""
    stop = (start + blocks.queries - 1) // blocks.keys + 1
    if blocks.window is None:
        return 0, stop
    return jnp.maximum(start - blocks.window + 1, 0) // blocks.keys, stop


def _cut(blocks: Blocks, array: jax.Array, axis: int) -> jax.Array:
    """The queries' axis in blocks, which come first: `[S / n, ..., n, ...]`."""
    shape = (*array.shape[:axis], -1, blocks.queries, *array.shape[axis + 1 :])
    return jnp.moveaxis(array.reshape(shape), axis, 0)


def _joined(array: jax.Array) -> jax.Array:
    """`[S / n, B, K, G, n, ...]` as `[B, K, G, S, ...]`."""
    joined = jnp.moveaxis(array, 0, 3)
    return joined.reshape(*joined.shape[:3], -1, *joined.shape[5:])


def _own(blocks: Blocks, tokens: Tokens) -> Arrays:
    own = (tokens.query_positions, tokens.query_segments)
    return tuple(_cut(blocks, array, 1) for array in own)


def _keys_of(
    blocks: Blocks, key: jax.Array, value: jax.Array, tokens: Tokens, index: jax.Array
) -> tuple[jax.Array, jax.Array, Arrays]:
    """A block of keys and values, `[B, K, m, H]`, and their positions and segments."""

    def part(array: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array, index * blocks.keys, blocks.keys, axis)

    seen = (tokens.key_positions, tokens.key_segments)
    return part(key, 2), part(value, 2), tuple(part(array, 1) for array in seen)


def _added(whole: jax.Array, block: jax.Array, index: jax.Array) -> jax.Array:
    """`[B, K, T, H]` with a block of keys added to its place."""
    size = block.shape[2]
    old = jax.lax.dynamic_slice_in_dim(whole, index * size, size, 2)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + block, index * size, 2)


def _scores(
    blocks: Blocks, query: jax.Array, key: jax.Array, own: Arrays, seen: Arrays
) -> jax.Array:
    """Scores `[B, K, G, n, m]`, float32; masked ones are the lowest finite number."""
    (query_positions, query_segments), (key_positions, key_segments) = own, seen
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = (query_segments[:, :, None] == key_segments[:, None, :]) & (distance >= 0)
    mask &= key_segments[:, None, :] != 0
    if blocks.window is not None:
        mask &= distance < blocks.window
    scores = _einsum("bkgnh,bkmh->bkgnm", query, key)
    return jnp.where(mask[:, None, None], scores, _LOWEST)


def _einsum(what: str, left: jax.Array, right: jax.Array) -> jax.Array:
    out: jax.Array = jnp.einsum(what, left, right, preferred_element_type=jnp.float32)
    return out
