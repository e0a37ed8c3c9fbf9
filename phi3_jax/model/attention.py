"""Causal grouped-query attention inside segments, with an optional sliding window.

A token attends to tokens of its own segment at its own position or earlier, at most
`sliding_window` of them, itself included (transformers: `kv_idx > q_idx - sliding_window`). Segment
0 is padding, and no token attends to it. Causality goes by position, so the same rule covers left
and right padding, packed rows and a key/value cache.

Accelerator kernels run where they fit, and `blockwise_attention` everywhere else. Rows that a mesh
cuts along their tokens go through `phi3_jax.model.sequence`.

Shapes: B rows, S queries, T keys, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from phi3_jax.model.blockwise import Tokens, blockwise_attention
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.heads import Rotary, join_heads, split_heads
from phi3_jax.model.remat import saved
from phi3_jax.model.rope import apply_rotary
from phi3_jax.model.sequence import AXIS, PIECES, ROWS, sequence_attention, shards
from phi3_jax.model.splash import apply_splash, splash_kernel

# `splash` is JAX's Pallas kernel for TPUs; the interpreted version runs anywhere, for tests.
# `cudnn` is cuDNN's flash attention for right-padded rows of one segment, `cudnn_packed` for any.
Implementation = Literal["xla", "splash", "splash_interpreted", "cudnn", "cudnn_packed"]
# Splash attention works in blocks of this many tokens; cuDNN with a mask works in pairs.
MULTIPLES: dict[Implementation, int] = {"splash": 128, "splash_interpreted": 128, "cudnn_packed": 2}


def implementation_for(
    wanted: Implementation, in_order: bool, rows: int, length: int
) -> Implementation:
    """The wanted implementation, or `xla` if it does not take rows of this shape."""
    devices = shards(rows, length) if in_order else 1
    pieces = PIECES * devices if devices > 1 else 1
    if not in_order or length % (pieces * MULTIPLES.get(wanted, 1)):
        return "xla"
    return "xla" if devices > 1 and wanted in ("cudnn", "cudnn_packed") else wanted


def heads_first(implementation: Implementation) -> bool:
    """Whether the kernels of `phi3_jax.model.heads` run around this one.

    Not where heads are split over `tensor`: a device's columns of a fused projection are then not
    its heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.shape["tensor"] == 1
    return whole and implementation in ("splash", "splash_interpreted")


def split_projection(
    qkv: jax.Array, rotary: Rotary, config: Phi3Config, implementation: Implementation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries `[B, S, N, H]`, rotated keys and values `[B, S, K, H]`.

    If `heads_first`, the queries are scaled by `H^-0.5`.

    Args:
        qkv: `[B, S, (N + 2 K) H]`.
        rotary: from `rotary_tables`.
        config: the architecture.
        implementation: from `implementation_for`.
    """
    if heads_first(implementation):
        qkv = saved(qkv, "qkv")  # heads side by side take less memory, and are cut in one pass
        flat, heads = _flat_and_heads(*qkv.shape[:2])
        split = functools.partial(
            split_heads,
            counts=(config.num_attention_heads, config.num_key_value_heads),
            scale=config.head_dim**-0.5,
            interpret=implementation == "splash_interpreted",
        )
        arrays = _on_devices(split, (flat, flat, flat), (heads, heads, heads))(qkv, *rotary)
        # Swapped back for the kernel; the compiler leaves out both.
        q, k, v = (array.swapaxes(1, 2) for array in arrays)
        return q, k, v
    # Slices: the gradient of jnp.split is a concatenation, on a CPU a pass of its own.
    first, last = config.q_size, config.q_size + config.kv_size
    shape = (*qkv.shape[:2], -1, config.head_dim)
    q, k, v = (x.reshape(shape) for x in (qkv[..., :first], qkv[..., first:last], qkv[..., last:]))
    return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v


def join_output(out: jax.Array, implementation: Implementation) -> jax.Array:
    """`[B, S, N H]` of `attention`'s `[B, S, N, H]`; `implementation` as in `split_projection`."""
    if not heads_first(implementation):
        return out.reshape(*out.shape[:2], -1)
    flat, heads = _flat_and_heads(*out.shape[:2])
    join = functools.partial(join_heads, interpret=implementation == "splash_interpreted")
    joined: jax.Array = _on_devices(join, (heads,), flat)(out.swapaxes(1, 2))
    return joined


@jax.named_scope("attention")
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    sliding_window: int | None,
    in_order: bool,
    implementation: Implementation = "xla",
    scaled: bool = False,
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
        scaled: whether `query` has the factor `H^-0.5` already.

    Returns:
        `[B, S, N, H]` in the dtype of `query`. A query with nothing to attend to (padding) gets a
        finite value.
    """
    b, s, n, h = query.shape
    kv_heads = key.shape[2]
    implementation = implementation_for(implementation, in_order, b, s)
    # cuDNN scales the scores instead.
    if not scaled and implementation not in ("cudnn", "cudnn_packed"):
        query = query * h**-0.5
    if not heads_first(implementation):
        query, key, value = (saved(array, "qkv") for array in (query, key, value))
    if in_order and shards(b, s) > 1:
        interpret = None if implementation == "xla" else implementation == "splash_interpreted"
        return sequence_attention(query, key, value, tokens, sliding_window, interpret)
    if implementation != "xla":
        kernel = _KERNELS[implementation]
        return _by_shard(
            functools.partial(kernel, window=sliding_window), query, key, value, tokens
        )
    # Heads of one group share their keys. Laid out as one [G S, H] matrix per key head, both
    # products are plain batched matmuls, which XLA's CPU backend runs 1.6 times faster than an
    # einsum that leaves the layout to XLA.
    query = query.reshape(b, s, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, K, T, H]
    out = blockwise_attention(
        (sliding_window, in_order), query, key, value, tokens
    )  # [B, K, G, S, H]
    return out.transpose(0, 3, 1, 2, 4).reshape(b, s, n, h)


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    s, n, _ = query.shape[1:]
    kernel = splash_kernel(s, n, window, interpret)
    return apply_splash(kernel, query, key, value, segments, segments)


def _fused(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    window: int | None,
    packed: bool,
    backend: Literal["xla", "cudnn"],
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


def _by_shard(
    kernel: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
) -> jax.Array:
    """Run a kernel per device: rows split over `data` and `fsdp`, heads over `tensor`."""
    mesh = jax.sharding.get_abstract_mesh()
    tensor = "tensor" if not mesh.empty and key.shape[2] % mesh.shape["tensor"] == 0 else None
    heads = PartitionSpec(ROWS, None, tensor, None)
    mapped = _on_devices(kernel, (heads, heads, heads, PartitionSpec(ROWS, None)), heads)
    out: jax.Array = mapped(query, key, value, tokens.query_segments)
    return out


def _flat_and_heads(rows: int, length: int) -> tuple[PartitionSpec, PartitionSpec]:
    """How `[B, S, ...]` and `[B, N, S, H]` are split over devices."""
    tokens = AXIS if shards(rows, length) > 1 else None
    return PartitionSpec(ROWS, tokens, None), PartitionSpec(ROWS, None, tokens, None)


def _on_devices(kernel: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The kernel on each device's part; the compiler cannot split it by itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return kernel
    mapped: Callable[..., Any] = jax.shard_map(
        kernel, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return mapped
