"""Rows that are cut along their tokens: context parallelism over the mesh axis `sequence`.

C devices of this axis each hold S / C consecutive tokens of a row. Everything but attention and the
loss's shift by one works token by token, and the compiler keeps it on the token's own device.

In attention each device gathers the keys and values of the whole row, a few heads at a time, so
that no more of them are in memory at once (all-gather rather than ring attention, as in Llama 3,
2024, section 3.3.2: attention takes longer than the gathering by far, and a kernel for whole rows
can be used). The compiler for TPUs does not gather while it runs a kernel.

Causal attention has more work for later queries. So each device exchanges the second half of its
queries with the device opposite to it (j with C - 1 - j) before, and the result after: all then
have an early and a late piece of the row, and the same work. The rows themselves stay in order, and
so dropout is that of a single device.

Shapes: B rows, S tokens, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

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
    tensor = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    groups = query.shape[2] // kv_heads
    local_heads = kv_heads // (mesh.shape["tensor"] if tensor else 1)
    parts = math.gcd(local_heads, PARTS)
    each = local_heads // parts
    kernel, kernel_spec = None, None
    if interpret is not None:
        devices = mesh.shape[AXIS]
        order = zigzag(length, devices)
        kernel = splash_kernel(length, groups * each, window, interpret, order, devices)
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, AXIS)))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, own: Any, seen: Any, kernel: Any) -> Any:
        if kernel is None:
            return _blocks(q, k, v, Tokens(*own, *seen), window)
        return apply_splash(kernel, q, k, v, own[1], seen[1])

    def on_device(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        made: Any,
    ) -> jax.Array:
        q = _exchanged(q)
        own = [_exchanged(array) for array in (positions, segments)]
        seen = [_gathered(array) for array in (positions, segments)]
        out = []
        for part in range(parts):
            heads = slice(part * each, (part + 1) * each)
            theirs = slice(part * each * groups, (part + 1) * each * groups)
            k_part, v_part = _gathered(k[:, :, heads]), _gathered(v[:, :, heads])
            out.append(attend(q[:, :, theirs], k_part, v_part, own, seen, made))
        return _exchanged(jnp.concatenate(out, axis=2))

    heads, ids = PartitionSpec(ROWS, AXIS, tensor, None), PartitionSpec(ROWS, AXIS)
    mapped = jax.shard_map(
        on_device,
        in_specs=(heads, heads, heads, ids, ids, kernel_spec),
        out_specs=heads,
        check_vma=False,
    )
    own = (tokens.query_positions, tokens.query_segments)
    out: jax.Array = mapped(query, key, value, *own, kernel)
    return out


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


def _blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, tokens: Tokens, window: int | None
) -> jax.Array:
    """Attention of a device's queries in plain JAX: `[B, S / C, heads, H]`."""
    b, s, n, h = query.shape
    kv_heads, half = key.shape[2], s // 2
    size = max(d for d in range(1, BLOCK + 1) if half % d == 0)
    device, count = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)
    first = jnp.stack([2 * device, 2 * (count - device) - 1]) * half  # of each piece
    starts = (first[:, None] + jnp.arange(0, half, size)).reshape(-1)
    query = query.reshape(b, s, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, K, S, H]
    out = flash_attention(Blocks(window, size, size), query, key, value, tokens, starts)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, s, n, h)
