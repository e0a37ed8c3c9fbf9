"""JAX's Pallas attention kernel for TPUs (splash attention).

Shapes: B rows, S queries, T keys, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np

# Tokens in a block of the kernel.
BLOCK = 128
# Long rows take larger blocks: the kernel's table of blocks has to fit into scalar memory.
LONG, LONG_BLOCK = 2**15, 512


def splash_kernel(
    length: int,
    heads: int,
    window: int | None,
    interpret: bool,
    order: np.ndarray | None = None,
    devices: int = 1,
) -> Any:
    """The kernel for causal attention over rows of a length.

    Args:
        length: tokens of a row, a multiple of 128, or of 256 times `devices` if there are several.
        heads: query heads.
        window: maximum number of keys a query attends to.
        interpret: run it interpreted, on any device.
        order: index in the row of each query; by default in order.
        devices: number of devices the queries are split over, in that order.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    back = None if window is None else window - 1
    mask = _mask_type()((length, length), window_size=(back, 0), offset=0)
    own = length if devices == 1 else length // (2 * devices)
    size = math.gcd(own, LONG_BLOCK if length >= LONG else BLOCK)
    if order is not None:
        mask.q_sequence = order
    blocks = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=devices,
        block_sizes=blocks,
        interpret=interpret,
        residual_checkpoint_name="attention",
    )


@functools.cache
def _mask_type() -> Any:
    """A `LocalMask` that computes only the blocks that the mask cuts through.

    The kernel's table is made by asking of every block whether any and all of it is visible: at
    131,072 tokens 65,536 times, each a comparison of 512 x 512 indices, minutes in all.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    class Mask(splash.LocalMask):
        def __getitem__(self, index: Any) -> np.ndarray:
            queries, keys = index
            rows = self.q_sequence[queries]  # consecutive
            first, last, back = int(rows[0]), int(rows[-1]), self.window_size[0]
            if last < keys.start or (back is not None and keys.stop <= first - back):
                return np.zeros((1, 1), bool)
            if keys.stop - 1 <= first and (back is None or last - back <= keys.start):
                return np.ones((1, 1), bool)
            block: np.ndarray = super().__getitem__(index)
            return block

    return Mask


def apply_splash(
    kernel: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
) -> jax.Array:
    """Attention `[B, S, N, H]` by the kernel.

    Args:
        kernel: from `splash_kernel`; its part for this device where it is split.
        query: `[B, S, N, H]`, scaled.
        key, value: `[B, T, K, H]`.
        query_segments, key_segments: int32 `[B, S]` and `[B, T]`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def row(q: jax.Array, k: jax.Array, v: jax.Array, own: jax.Array, seen: jax.Array) -> Any:
        heads_first = (a.swapaxes(0, 1) for a in (q, k, v))
        return kernel(*heads_first, segment_ids=splash.SegmentIds(own, seen)).swapaxes(0, 1)

    out: jax.Array = jax.vmap(row)(query, key, value, query_segments, key_segments)
    return out
