"""Causal grouped-query attention inside segments, with an optional sliding window.

A token attends to tokens of its own segment at its own position or earlier, at most
`sliding_window` of them, itself included (transformers: `kv_idx > q_idx - sliding_window`). Segment
0 is padding, and no token attends to it. Causality goes by position, so the same rule covers left
and right padding, packed rows and a key/value cache.

The full score matrix is never materialized: queries are processed in blocks, forward and backward
(Rabe & Staats 2021, Dao et al. 2022), so memory grows linearly with length rather than
quadratically, and keys that no query in a piece of the row can attend to are skipped.

Shapes: B rows, S queries, T keys, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

# `splash` is JAX's Pallas kernel for TPUs; the interpreted version runs anywhere, for tests.
# `cudnn` is cuDNN's flash attention for right-padded rows of one segment, `cudnn_packed` for any.
Implementation = Literal["xla", "splash", "splash_interpreted", "cudnn", "cudnn_packed"]
# Splash attention works in blocks of this many tokens; cuDNN with a mask works in pairs.
MULTIPLES: dict[Implementation, int] = {"splash": 128, "splash_interpreted": 128, "cudnn_packed": 2}

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


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    sliding_window: int | None,
    in_order: bool,
    implementation: Implementation = "xla",
) -> jax.Array:
    """Softmax attention; scores and softmax in float32 whatever the input type.

    Args:
        query: `[B, S, N, H]`.
        key, value: `[B, T, K, H]`; each key head serves N / K consecutive query heads.
        tokens: positions and segments; positions must increase within a segment.
        sliding_window: maximum number of keys a query attends to.
        in_order: query i is key i, so no query attends to a key that comes later in the row.
        implementation: the kernels handle rows that are `in_order` and whose length is a multiple
            of `MULTIPLES`; others use `xla`.

    Returns:
        `[B, S, N, H]` in the dtype of `query`. A query with nothing to attend to (padding) gets a
        finite value.
    """
    b, s, n, h = query.shape
    kv_heads = key.shape[2]
    if implementation != "xla" and in_order and s % MULTIPLES.get(implementation, 1) == 0:
        kernel = _KERNELS[implementation]
        return _by_shard(
            functools.partial(kernel, window=sliding_window), query, key, value, tokens
        )
    # Heads of one group share their keys. Laid out as one [G S, H] matrix per key head, both
    # products are plain batched matmuls, which XLA's CPU backend runs 1.6 times faster than an
    # einsum that leaves the layout to XLA.
    query = (query * h**-0.5).reshape(b, s, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, K, T, H]
    out = _blockwise((sliding_window, in_order), query, key, value, tokens)  # [B, K, G, S, H]
    return out.transpose(0, 3, 1, 2, 4).reshape(b, s, n, h)


def _splash(query, key, value, segments, window: int | None, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    s, n, h = query.shape[1:]
    back = None if window is None else window - 1
    one = splash.LocalMask((s, s), window_size=(back, 0), offset=0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([one] * n), head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def row(q, k, v, ids):
        heads_first = (a.swapaxes(0, 1) for a in (q, k, v))
        return kernel(*heads_first, segment_ids=splash.SegmentIds(ids, ids)).swapaxes(0, 1)

    return jax.vmap(row)(query * h**-0.5, key, value, segments)


def _fused(
    query, key, value, segments, window: int | None, packed: bool, backend: Literal["xla", "cudnn"]
) -> jax.Array:
    """`jax.nn.dot_product_attention`; `xla` applies the same rule without the kernel, for tests.

    Row lengths are free in cuDNN. Segments are passed as a bias `[B, 1, S, S]` in the dtype of
    `query`: shared by all heads but quadratic in length (cuDNN's packed layout has no public API).
    """
    lengths = mask = None
    if packed:
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    else:
        lengths = (segments != 0).sum(axis=1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=backend,
    )


_KERNELS: dict[Implementation, Callable[..., jax.Array]] = {
    "splash": functools.partial(_splash, interpret=False),
    "splash_interpreted": functools.partial(_splash, interpret=True),
    "cudnn": functools.partial(_fused, packed=False, backend="cudnn"),
    "cudnn_packed": functools.partial(_fused, packed=True, backend="cudnn"),
}


def _by_shard(kernel: Callable[..., jax.Array], query, key, value, tokens: Tokens) -> jax.Array:
    """Run a kernel per device: rows split over `data` and `fsdp`, heads over `tensor`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(query, key, value, tokens.query_segments)
    rows = ("data", "fsdp")
    tensor = "tensor" if key.shape[2] % mesh.shape["tensor"] == 0 else None
    heads = PartitionSpec(rows, None, tensor, None)
    mapped = jax.shard_map(
        kernel,
        in_specs=(heads, heads, heads, PartitionSpec(rows, None)),
        out_specs=heads,
        check_vma=False,
    )
    return mapped(query, key, value, tokens.query_segments)


Static = tuple[int | None, bool]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(static: Static, query, key, value, tokens: Tokens) -> jax.Array:
    return _forward(static, query, key, value, tokens)[0]


def _forward(static: Static, query, key, value, tokens: Tokens):
    """Outputs `[B, K, G, S, H]` and log-sum-exp of the scores, float32 `[B, K, G, S]`."""
    outs, sums = [], []
    for piece in _pieces(static, query.shape[3]):
        k, v, seen = key[:, :, piece.keys], value[:, :, piece.keys], _keys_of(tokens, piece)

        def block(_, xs, k=k, v=v, seen=seen):
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


def _blockwise_fwd(static: Static, query, key, value, tokens: Tokens):
    out, log_sum = _forward(static, query, key, value, tokens)
    return out, (query, key, value, tokens, out, log_sum)


def _blockwise_bwd(static: Static, residuals, d_out):
    query, key, value, tokens, out, log_sum = residuals
    # The term that the softmax gradient subtracts from each row (FlashAttention, section 3.1).
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_query, d_key, d_value = [], *(jnp.zeros(a.shape, jnp.float32) for a in (key, value))
    for piece in _pieces(static, query.shape[3]):
        k, v, seen = key[:, :, piece.keys], value[:, :, piece.keys], _keys_of(tokens, piece)

        def block(carry, xs, k=k, v=v, seen=seen):
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


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


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


def _queries_of(piece: _Piece, query: jax.Array, tokens: Tokens) -> tuple[jax.Array, ...]:
    own = (tokens.query_positions, tokens.query_segments)
    return (_cut(query, piece), *(_cut(array, piece, axis=1) for array in own))


def _keys_of(tokens: Tokens, piece: _Piece) -> tuple[jax.Array, jax.Array]:
    return tokens.key_positions[:, piece.keys], tokens.key_segments[:, piece.keys]


def _scores(static: Static, query: jax.Array, key: jax.Array, own, seen) -> jax.Array:
    """Scores `[B, K, G, size, keys]`, float32; masked ones are the lowest finite number."""
    (query_positions, query_segments), (key_positions, key_segments) = own, seen
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = (query_segments[:, :, None] == key_segments[:, None, :]) & (distance >= 0)
    mask &= key_segments[:, None, :] != 0
    if static[0] is not None:
        mask &= distance < static[0]
    scores = _matmul(query, key.swapaxes(-1, -2))
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _grouped(array: jax.Array) -> jax.Array:
    """`[B, K, G, n, m]` as `[B, K, G n, m]`."""
    return array.reshape(*array.shape[:2], -1, array.shape[-1])


def _matmul(left: jax.Array, right: jax.Array, grouped: bool = False) -> jax.Array:
    """float32 `left @ right` per key head; `left` has a separate group axis unless `grouped`."""
    matrix = left if grouped else _grouped(left)
    out = jnp.einsum("bkij,bkjl->bkil", matrix, right, preferred_element_type=jnp.float32)
    return out if grouped else out.reshape(*left.shape[:-1], out.shape[-1])
