"""Rotary position embedding, plain and LongRoPE.

transformers picks LongRoPE's short or long factors once per batch, by its largest position, so a
text's logits change when it is batched with a long one. Here each row, and each packed segment of a
row, picks its own, so a text's output never depends on its batch. For a single row the two agree;
`LongRope.choice` selects transformers' behavior, or that of servers, which always use the same
factors.

Shapes: B rows, S positions, N heads, H head_dim, R rotary_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.model.config import Phi3Config, RopeFactors


def inverse_frequencies(config: Phi3Config, factors: tuple[float, ...] | None) -> np.ndarray:
    """`1 / (factor_i * theta ** (2 i / R))`, float32 `[R / 2]` (Su et al. 2021, LongRoPE 2024).

    Rounds where transformers does: numpy's float32 power is sometimes off by the last bit, which
    at position 4,096 amounts to 2e-4 in the angle and 5e-3 in a logit.
    """
    exponent = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    power = (np.float64(config.rope_theta) ** exponent.astype(np.float64)).astype(np.float32)
    scale = np.float32(1.0) if factors is None else np.asarray(factors, np.float32)
    return np.float32(1.0) / (scale * power)


def default_positions(
    tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Fill in missing arguments: positions from 0, one segment per row. Both `[B, S]`."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
    return positions, segment_ids


@jax.named_scope("rotary")
def rotary_tables(
    config: Phi3Config, positions: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine for every position.

    Args:
        positions: int32 `[B, S]`, counted from 0 within each segment.
        segment_ids: int32 `[B, S]`; determines which tokens share a length.

    Returns:
        Two float32 arrays `[B, S, R / 2]`, both multiplied by LongRoPE's attention factor, if any.
    """
    if config.longrope is None:
        frequencies = jnp.asarray(inverse_frequencies(config, None))
        attention_factor = 1.0
    else:
        short = inverse_frequencies(config, config.longrope.short_factor)
        long = inverse_frequencies(config, config.longrope.long_factor)
        is_long = _is_long(config, config.longrope.choice, positions, segment_ids)
        frequencies = jnp.where(is_long[..., None], long, short)  # [B, S, R/2]
        attention_factor = config.longrope.attention_factor
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def _is_long(
    config: Phi3Config, choice: RopeFactors, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Which tokens the long factors apply to, bool `[B, S]`."""
    if choice in ("short", "long"):
        return jnp.full(positions.shape, choice == "long")
    lengths = segment_lengths(positions, segment_ids)
    if choice == "by_batch":
        lengths = jnp.broadcast_to(positions.max() + 1, lengths.shape)
    return lengths > config.original_max_position_embeddings


def segment_lengths(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The length of each token's segment (its largest position plus one), int32 `[B, S]`.

    Segment ids may be any numbers from 0 to S.
    """
    count = positions.shape[1] + 1

    def of_row(row_positions: jax.Array, row_segments: jax.Array) -> jax.Array:
        last = jax.ops.segment_max(row_positions, row_segments, num_segments=count)
        return last[row_segments] + 1

    return jax.vmap(of_row)(positions, segment_ids)


@jax.named_scope("rotary")
def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first R of each head's dimensions, pairing i with i + R / 2 as HF does.

    Args:
        x: `[B, S, N, H]`, any float dtype; rotated in float32 and returned in its own dtype.
        cos, sin: float32 `[B, S, R / 2]`.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]  # broadcast over the heads
    first, second = (x[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * half :]], axis=-1)
