"""The key/value cache for generation: allocated once, written in place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from phi3_jax.model.config import Phi3Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, with the position and segment of each slot.

    L layers, B rows, T slots, K key/value heads, H head_dim.

    Attributes:
        keys, values: `[L, B, T, K, H]`; keys are stored rotated.
        positions, segment_ids: int32 `[B, T]`; segment 0 marks an empty slot.
        length: int32 scalar, slots filled so far; the same for every row.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, config: Phi3Config, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
        """A cache with room for `slots` tokens in each of `batch` rows."""
        shape = (
            config.num_hidden_layers,
            batch,
            slots,
            config.num_key_value_heads,
            config.head_dim,
        )
        return cls(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            positions=jnp.zeros((batch, slots), jnp.int32),
            segment_ids=jnp.zeros((batch, slots), jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )

    def extend(self, positions: jax.Array, segment_ids: jax.Array) -> KVCache:
        """Claim the next S slots for tokens with `positions` and `segment_ids`, int32 `[B, S]`."""
        start = (0, self.length)
        return dataclasses.replace(
            self,
            positions=jax.lax.dynamic_update_slice(self.positions, positions, start),
            segment_ids=jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, start),
            length=self.length + positions.shape[1],
        )

    def write(self, layer: jax.Array, key: jax.Array, value: jax.Array) -> KVCache:
        """Write one layer's `[B, S, K, H]` into the S most recently claimed slots."""
        start = (layer, 0, self.length - key.shape[1], 0, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, key[None], start),
            values=jax.lax.dynamic_update_slice(self.values, value[None], start),
        )

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, each `[B, T, K, H]`."""
        return (
            jax.lax.dynamic_index_in_dim(self.keys, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.values, layer, keepdims=False),
        )
