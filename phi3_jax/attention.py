"""Causal grouped-query attention inside segments, with an optional sliding window.

Shapes: B rows, S queries, T keys, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention_mask(
    query_positions: jax.Array,
    query_segments: jax.Array,
    key_positions: jax.Array,
    key_segments: jax.Array,
    sliding_window: int | None,
) -> jax.Array:
    """Which keys each query sees, bool `[B, S, T]`.

    A token sees the tokens of its own segment at its own position or before, at most
    `sliding_window` of them, itself included (transformers: `kv_idx > q_idx - sliding_window`).
    Segment 0 is padding and is seen by nobody. Positions, int32 `[B, S]` and `[B, T]`, must
    increase inside a segment; causality is by position, so the same mask serves left and right
    padding, packed rows and a key/value cache.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = (query_segments[:, :, None] == key_segments[:, None, :]) & (distance >= 0)
    mask &= key_segments[:, None, :] != 0
    if sliding_window is not None:
        mask &= distance < sliding_window
    return mask


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention; scores and softmax in float32 whatever the input type.

    Args:
        query: `[B, S, N, H]`.
        key, value: `[B, T, K, H]`; each key head serves N / K consecutive query heads.
        mask: bool `[B, S, T]`. A query that may see nothing (padding) gets a finite value.

    Returns:
        `[B, S, N, H]` in the type of `query`.
    """
    b, s, n, h = query.shape
    k = key.shape[2]
    query = (query * h**-0.5).reshape(b, s, k, n // k, h)
    scores = jnp.einsum("bskgh,btkh->bkgst", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgst,btkh->bskgh", weights, value).reshape(b, s, n, h)
