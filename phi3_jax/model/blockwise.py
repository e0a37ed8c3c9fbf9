"""Attention in blocks of queries: memory grows linearly with length, in plain JAX.

The full score matrix is never materialized: queries are processed in blocks, forward and backward
(Rabe & Staats 2021, Dao et al. 2022), and keys that no query in a piece of the row can attend to
are skipped.

Shapes: B rows, S queries, T keys, K key/value heads, G query heads per key/value head, H head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from phi3_jax.model.remat import saved

# Maximum scores per head and row held at once, and maximum queries per block.
SCORES = 2**21
QUERIES = 512
# A row is split into at most this many pieces, each with only the keys it can attend to: half of
# all scores are above the diagonal.
PIECES = 8


class Tokens(NamedTuple):
    """Positions and segments, int32: `[B, S]` for the queries, `[B, T]` for the keys."""

    query_positions: jax.Array
    query_segments: jax.Array
    key_positions: jax.Array
    key_segments: jax.Array


class _Piece(NamedTuple):
    """Queries `start` to `start + blocks * size`, and the keys they may attend to."""

    start: int
    blocks: int
    size: int
    keys: slice


# Sliding window, and whether query i is key i.
Static = tuple[int | None, bool]
Arrays = tuple[jax.Array, ...]
# query, key, value, tokens, output, log-sum-exp of the scores.
Residuals = tuple[jax.Array, jax.Array, jax.Array, Tokens, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise_attention(
    static: Static, query: jax.Array, key: jax.Array, value: jax.Array, tokens: Tokens
) -> jax.Array:
    """Softmax attention `[B, K, G, S, H]`; scores and softmax in float32.

    Args:
        static: the sliding window (None: unlimited), and whether query i is key i.
        query: `[B, K, G, S, H]`, scaled.
        key, value: `[B, K, T, H]`.
        tokens: positions and segments.
    """
    return _forward(static, query, key, value, tokens)[0]


def _forward(
    static: Static, query: jax.Array, key: jax.Array, value: jax.Array, tokens: Tokens
) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, K, G, S, H]` and log-sum-exp of the scores, float32 `[B, K, G, S]`."""
    outs, sums = [], []
    for piece in _pieces(static, query.shape[3]):
        k, v, seen = key[:, :, piece.keys], value[:, :, piece.keys], _keys_of(tokens, piece)

        def block(
            _: None, xs: Arrays, k: jax.Array = k, v: jax.Array = v, seen: Arrays = seen
        ) -> Any:
            q, *own = xs
            scores = _scores(static, q, k, own, seen)
            top = scores.max(axis=-1)
            weights = jnp.exp(scores - top[..., None])
            total = weights.sum(axis=-1)
            # Normalize last: one exponential per score, and the output is smaller than the scores.
            out = _matmul(weights.astype(v.dtype), v) / total[..., None]
            return None, (out.astype(q.dtype), top + jnp.log(total))

        _, (out, log_sum) = jax.lax.scan(block, None, _queries_of(piece, query, tokens))
        outs.append(_joined(out))
        sums.append(_joined(log_sum))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(sums, axis=3)


def _blockwise_fwd(
    static: Static, query: jax.Array, key: jax.Array, value: jax.Array, tokens: Tokens
) -> tuple[jax.Array, Residuals]:
    out, log_sum = _forward(static, query, key, value, tokens)
    out, log_sum = saved(out, "attention"), saved(log_sum, "attention")
    return out, (query, key, value, tokens, out, log_sum)


def _blockwise_bwd(
    static: Static, residuals: Residuals, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    query, key, value, tokens, out, log_sum = residuals
    # The term that the softmax gradient subtracts from each row (FlashAttention, section 3.1).
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_query, d_key, d_value = [], *(jnp.zeros(a.shape, jnp.float32) for a in (key, value))
    for piece in _pieces(static, query.shape[3]):
        k, v, seen = key[:, :, piece.keys], value[:, :, piece.keys], _keys_of(tokens, piece)

        def block(
            carry: Arrays, xs: Any, k: jax.Array = k, v: jax.Array = v, seen: Arrays = seen
        ) -> Any:
            (q, *own), d_o, total, d = xs
            weights = jnp.exp(_scores(static, q, k, own, seen) - total[..., None])
            d_weights = _matmul(d_o, v.swapaxes(-1, -2))
            d_scores = (weights * (d_weights - d[..., None])).astype(k.dtype)
            d_k = _matmul(_grouped(d_scores).swapaxes(-1, -2), _grouped(q), grouped=True)
            d_v = _matmul(
                _grouped(weights.astype(v.dtype)).swapaxes(-1, -2), _grouped(d_o), grouped=True
            )
            return (carry[0] + d_k, carry[1] + d_v), _matmul(d_scores, k).astype(q.dtype)

        xs = (
            _queries_of(piece, query, tokens),
            *(_cut(array, piece) for array in (d_out, log_sum, delta)),
        )
        start = (d_key[:, :, piece.keys], d_value[:, :, piece.keys])
        (d_k, d_v), d_q = jax.lax.scan(block, start, xs)
        d_key, d_value = (
            whole.at[:, :, piece.keys].set(part) for whole, part in ((d_key, d_k), (d_value, d_v))
        )
        d_query.append(_joined(d_q))
    return (
        jnp.concatenate(d_query, axis=3),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
    )


blockwise_attention.defvjp(_blockwise_fwd, _blockwise_bwd)


def _pieces(static: Static, length: int) -> Iterator[_Piece]:
    """Split the row into pieces, each made of equally sized blocks."""
    window, in_order = static
    size = min(QUERIES, max(16, SCORES // length), max(128, length // PIECES))
    blocks = length // size
    each = max(1, -(-blocks // PIECES) if in_order else blocks)
    bounds = [(i * size, min(each, blocks - i), size) for i in range(0, blocks, each)]
    if length % size:
        bounds.append((blocks * size, 1, length % size))
    for start, count, width in bounds:
        first = 0 if window is None else max(0, start - window + 1)
        stop = start + count * width
        yield _Piece(start, count, width, slice(first, stop) if in_order else slice(None))


def _cut(array: jax.Array, piece: _Piece, axis: int = 3) -> jax.Array:
    """The piece's queries with a leading block axis: `[blocks, ..., size, ...]`."""
    stop = piece.start + piece.blocks * piece.size
    part = jax.lax.slice_in_dim(array, piece.start, stop, axis=axis)
    shape = (*part.shape[:axis], piece.blocks, piece.size, *part.shape[axis + 1 :])
    return jnp.moveaxis(part.reshape(shape), axis, 0)


def _joined(blocks: jax.Array) -> jax.Array:
    """`[blocks, B, K, G, size, ...]` as `[B, K, G, blocks * size, ...]`."""
    joined = jnp.moveaxis(blocks, 0, 3)
    return joined.reshape(*joined.shape[:3], -1, *joined.shape[5:])


def _queries_of(piece: _Piece, query: jax.Array, tokens: Tokens) -> Arrays:
    own = (tokens.query_positions, tokens.query_segments)
    return (_cut(query, piece), *(_cut(array, piece, axis=1) for array in own))


def _keys_of(tokens: Tokens, piece: _Piece) -> tuple[jax.Array, jax.Array]:
    return tokens.key_positions[:, piece.keys], tokens.key_segments[:, piece.keys]


def _scores(
    static: Static, query: jax.Array, key: jax.Array, own: Sequence[jax.Array], seen: Arrays
) -> jax.Array:
    """Scores `[B, K, G, size, keys]`, float32; masked ones are the lowest finite number."""
    (query_positions, query_segments), (key_positions, key_segments) = own, seen
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = (query_segments[:, :, None] == key_segments[:, None, :]) & (distance >= 0)
    mask &= key_segments[:, None, :] != 0
    if static[0] is not None:
        mask &= distance < static[0]
    # A sum: any score disappears beside the lowest number, and on a CPU a selection costs twice.
    bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    return _matmul(query, key.swapaxes(-1, -2)) + bias[:, None, None]


def _grouped(array: jax.Array) -> jax.Array:
    """`[B, K, G, n, m]` as `[B, K, G n, m]`."""
    return array.reshape(*array.shape[:2], -1, array.shape[-1])


def _matmul(left: jax.Array, right: jax.Array, grouped: bool = False) -> jax.Array:
    """float32 `left @ right` per key head; `left` has a separate group axis unless `grouped`."""
    matrix = left if grouped else _grouped(left)
    out = jnp.einsum("bkij,bkjl->bkil", matrix, right, preferred_element_type=jnp.float32)
    return out if grouped else out.reshape(*left.shape[:-1], out.shape[-1])
