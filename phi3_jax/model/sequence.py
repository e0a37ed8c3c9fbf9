"""Rows that are cut along their tokens: context parallelism over the mesh axis `sequence`.

C devices of this axis each hold S / C consecutive tokens of a row. Everything but attention and the
loss's shift by one works token by token, and the compiler keeps it on the token's own device.

For attention, each device exchanges its tokens of all heads for the whole row of N / C heads, and
the result back (all-to-all, as in DeepSpeed-Ulysses, Jacobs et al. 2023). All then have the same
work, and a kernel for whole rows can be used.

Where C does not divide the key/value heads, each device gathers the keys and values of the whole
row, a few heads at a time, so that no more of them are in memory at once (all-gather rather than
ring attention, as in Llama 3, 2024, section 3.3.2). Without grouped heads (G = 1) that moves C / 2
times as much, as each device then receives all heads. Causal attention has more work for later
queries. So each device exchanges the second half of its queries with the device opposite to it (j
with C - 1 - j) before, and the result after: all then have an early and a late piece of the row,
and the same work.

The rows themselves stay in order, and so dropout is that of a single device.

Shapes: B rows, S tokens, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from phi3_jax.model.blockwise import Tokens
from phi3_jax.model.flash import Blocks, flash_attention
from phi3_jax.model.splash import apply_splash, splash_kernel

AXIS = "sequence"
ROWS = ("data", "fsdp")
# Each device takes two pieces of a row, an early and a late one.
PIECES = 2
# The keys and values of a layer are gathered in up to this many parts, by heads.
PARTS = 4
# Most queries and keys whose scores are held at once.
BLOCK = 512


def shards(rows: int, length: int) -> int:
    """Devices that rows of this shape are cut over along their tokens; 1 is uncut.

    Rows that cannot be cut into equal pieces (prompts, for example) are not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(AXIS, 1) == 1:
        return 1
    count = int(mesh.shape[AXIS])
    devices = math.prod(mesh.shape[axis] for axis in ROWS)
    return 1 if rows % devices or length % (PIECES * count) else count


def cut(x: jax.Array) -> jax.Array:
    """`[B, S, ...]` with rows and tokens on their devices; needs jit and a mesh in context.

    Otherwise the compiler may keep the parts of the weights where they are, compute every row on
    every device, and add up partial products after each layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.shape.keys() >= set(ROWS):  # none, or not one of this project
        return x
    devices = math.prod(mesh.shape[axis] for axis in ROWS)
    along = AXIS if shards(*x.shape[:2]) > 1 else None
    if x.shape[0] % devices or (devices == 1 and along is None):
        return x
    placed: jax.Array = jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, along))
    return placed


def parts_as_rows(x: jax.Array) -> jax.Array:
    """`[B, S, ...]` as `[C B, S / C, ...]`: the part of a row on each device is a row by itself."""
    rows, length = x.shape[:2]
    count = shards(rows, length)
    split = x.reshape(rows, count, length // count, *x.shape[2:]).swapaxes(0, 1)
    # Devices first, as then no part has to move.
    merged = split.reshape(count * rows, *split.shape[2:])
    placed: jax.Array = jax.lax.with_sharding_constraint(merged, PartitionSpec((AXIS, *ROWS)))
    return placed


def zigzag(length: int, count: int) -> np.ndarray:
    """Row indices in the order in which the devices have the queries, int32 `[S]`."""
    pieces = np.arange(length, dtype=np.int32).reshape(PIECES * count, -1)
    order = [(2 * j, 2 * (count - j) - 1) for j in range(count)]
    return np.concatenate([pieces[i] for pair in order for i in pair])


def sequence_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    window: int | None,
    interpret: bool | None,
) -> jax.Array:
    """`attention` in order, over rows cut along their tokens; arguments and result as there.

    Args:
        query: scaled.
        interpret: whether JAX's Pallas kernel for TPUs runs interpreted; None takes blocks in plain
            JAX instead of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    length, kv_heads = query.shape[1], key.shape[2]
    local_heads = heads_of_device(kv_heads, mesh.shape["tensor"])
    tensor = None if local_heads == kv_heads else "tensor"
    kernel, kernel_spec = None, None
    if heads_divide(kv_heads, mesh.shape["tensor"], mesh.shape[AXIS]):
        on_device = functools.partial(_with_whole_rows, window, interpret)
    else:
        parts = math.gcd(local_heads, PARTS)
        on_device = functools.partial(_with_all_keys, window, parts)
        if interpret is not None:
            devices, heads = mesh.shape[AXIS], query.shape[2] // kv_heads * local_heads // parts
            order = zigzag(length, devices)
            kernel = splash_kernel(length, heads, window, interpret, order, devices)
            along = NamedSharding(mesh, PartitionSpec(None, AXIS))
            kernel_spec = kernel.manual_sharding_spec(along)
    placed, ids = PartitionSpec(ROWS, AXIS, tensor, None), PartitionSpec(ROWS, AXIS)
    mapped = jax.shard_map(
        on_device,
        in_specs=(placed, placed, placed, ids, ids, kernel_spec),
        out_specs=placed,
        check_vma=False,
    )
    own = (tokens.query_positions, tokens.query_segments)
    out: jax.Array = mapped(query, key, value, *own, kernel)
    return out


def heads_of_device(kv_heads: int, tensor: int) -> int:
    """Key/value heads of a device: those that `tensor` devices share, or all of them."""
    return kv_heads if kv_heads % tensor else kv_heads // tensor


def heads_divide(kv_heads: int, tensor: int, devices: int) -> bool:
    """Whether the devices along a row can each take whole rows of some key/value heads."""
    return heads_of_device(kv_heads, tensor) % devices == 0


def _with_whole_rows(
    window: int | None,
    interpret: bool | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    _: None,
) -> jax.Array:
    """Attention on one device, which takes whole rows of its share of the heads."""
    q, k, v = (_tokens_for_heads(x) for x in (query, key, value))
    positions, segments = _gathered(positions), _gathered(segments)
    length, heads = q.shape[1:3]
    if interpret is None:
        size = _block_size(length)
        tokens, starts = Tokens(*[positions, segments] * 2), jnp.arange(0, length, size)
        out = _blocks(q, k, v, tokens, window, size, starts)
    else:
        kernel = splash_kernel(length, heads, window, interpret)
        out = apply_splash(kernel, q, k, v, segments, segments)
    return _heads_for_tokens(out)


def _with_all_keys(
    window: int | None,
    parts: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    kernel: Any,
) -> jax.Array:
    """Attention on one device, which gathers the keys and values of the other devices."""
    q = _exchanged(query)
    own = [_exchanged(array) for array in (positions, segments)]
    seen = [_gathered(array) for array in (positions, segments)]
    tokens = Tokens(*own, *seen)
    half = q.shape[1] // 2
    size = _block_size(half)
    device, count = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)
    first = jnp.stack([2 * device, 2 * (count - device) - 1]) * half  # of each piece
    starts = (first[:, None] + jnp.arange(0, half, size)).reshape(-1)
    out = []
    split = functools.partial(jnp.split, indices_or_sections=parts, axis=2)
    for q_part, k_part, v_part in zip(split(q), split(key), split(value), strict=True):
        k, v = _gathered(k_part), _gathered(v_part)
        if kernel is None:
            out.append(_blocks(q_part, k, v, tokens, window, size, starts))
        else:
            out.append(apply_splash(kernel, q_part, k, v, own[1], seen[1]))
    return _exchanged(jnp.concatenate(out, axis=2))


def _tokens_for_heads(x: jax.Array) -> jax.Array:
    """`[B, S, heads / C, H]` of `[B, S / C, heads, H]`: each device sends tokens and gets heads.

    The heads come first, as kernels have them, and each device's part as a whole: otherwise the
    compiler for TPUs transposes more before and after.
    """
    b, s, n, h = x.shape
    count = jax.lax.axis_size(AXIS)
    parts = x.swapaxes(1, 2).reshape(b, count, n // count, s, h)
    rows = jnp.moveaxis(_sent(jnp.moveaxis(parts, 1, 0)), 0, 2)
    return rows.reshape(b, n // count, count * s, h).swapaxes(1, 2)


def _heads_for_tokens(x: jax.Array) -> jax.Array:
    """The inverse of `_tokens_for_heads`."""
    b, s, n, h = x.shape
    count = jax.lax.axis_size(AXIS)
    rows = x.swapaxes(1, 2).reshape(b, n, count, s // count, h)
    parts = jnp.moveaxis(_sent(jnp.moveaxis(rows, 2, 0)), 0, 1)
    return parts.reshape(b, count * n, s // count, h).swapaxes(1, 2)


def _sent(parts: jax.Array) -> jax.Array:
    """`[C, ...]` by the device that sent them, of `[C, ...]` by the device that gets them."""
    received: jax.Array = jax.lax.all_to_all(parts, AXIS, split_axis=0, concat_axis=0, tiled=True)
    return received


def _exchanged(x: jax.Array) -> jax.Array:
    """`[B, S / C, ...]`, its second half exchanged with the opposite device; its own inverse."""
    count, half = jax.lax.axis_size(AXIS), x.shape[1] // 2
    opposite = [(j, count - 1 - j) for j in range(count)]
    other = jax.lax.ppermute(x[:, half:], AXIS, opposite)
    return jnp.concatenate([x[:, :half], other], axis=1)


def _gathered(x: jax.Array) -> jax.Array:
    """`[B, S, ...]` of `[B, S / C, ...]`."""
    whole: jax.Array = jax.lax.all_gather(x, AXIS, axis=1, tiled=True)
    return whole


def _block_size(length: int) -> int:
    """The largest block of queries and keys that divides a length."""
    return max(d for d in range(1, BLOCK + 1) if length % d == 0)


def _blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    window: int | None,
    size: int,
    starts: jax.Array,
) -> jax.Array:
    """Attention of a device's queries in plain JAX: `[B, T, heads, H]`.

    Args:
        size: queries and keys in a block.
        starts: of each block of queries, the index of its first one in the row.
    """
    b, s, n, h = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(b, s, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, K, S, H]
    out = flash_attention(Blocks(window, size, size), query, key, value, tokens, starts)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, s, n, h)
