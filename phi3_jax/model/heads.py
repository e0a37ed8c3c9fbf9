"""Heads on their way into JAX's attention kernel for TPUs, and out of it.

A projection gives its heads side by side, `[B, S, N H]`; the kernel takes them before positions,
`[B, N, S, H]`. A head of 96 dimensions, or half of one, falls across the 128 lanes of a TPU, and
XLA takes several passes over all heads to cut, rotate, join, and transpose them. The kernels here
read and write every value once. Their numbers are those of `apply_rotary` and a reshape.

Shapes: B rows, S positions, N query heads, K key/value heads, H head_dim, R rotary_dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from phi3_jax.model.remat import LANES

Rotary = tuple[jax.Array, jax.Array]
# Bytes of a block: all heads of some positions, on both sides. Two are in a TPU's memory at once.
BLOCK_BYTES = 6 * 2**20
MAX_POSITIONS = 256


class _Layout(NamedTuple):
    """The heads of each array `[B, count, S, H]`, of which the first ones are rotated.

    The scale belongs to the first.
    """

    counts: tuple[int, ...]
    rotated: int
    scale: float
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
@jax.named_scope("rotary")
def split_heads(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    counts: tuple[int, int],
    scale: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, N, S, H]`, rotated and scaled, rotated keys and values `[B, K, S, H]`.

    Args:
        qkv: `[B, S, (N + 2 K) H]`.
        cos, sin: float32 `[B, S, R / 2]`; not differentiated.
        counts: N and K.
        scale: multiplies the queries once they are in the dtype of `qkv`.
        interpret: run the kernel interpreted, on any device.
    """
    q, k, v = _apart(_qkv(counts, scale, interpret), qkv, (cos, sin))
    return q, k, v


def _split_fwd(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, *static: Any
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Rotary]:
    return split_heads(qkv, cos, sin, *static), (cos, sin)


@jax.named_scope("rotary")
def _split_bwd(
    counts: tuple[int, int],
    scale: float,
    interpret: bool,
    rotary: Rotary,
    gradients: Sequence[jax.Array],
) -> tuple[jax.Array, None, None]:
    cos, sin = rotary
    return _together(_qkv(counts, scale, interpret), gradients, (cos, -sin)), None, None


split_heads.defvjp(_split_fwd, _split_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def join_heads(heads: jax.Array, interpret: bool) -> jax.Array:
    """`[B, S, N H]` of `[B, N, S, H]`."""
    return _together(_Layout((heads.shape[1],), 0, 1.0, interpret), [heads], ())


def _join_fwd(heads: jax.Array, interpret: bool) -> tuple[jax.Array, int]:
    return join_heads(heads, interpret), heads.shape[1]


def _join_bwd(interpret: bool, count: int, gradient: jax.Array) -> tuple[jax.Array]:
    (heads,) = _apart(_Layout((count,), 0, 1.0, interpret), gradient, ())
    return (heads,)


join_heads.defvjp(_join_fwd, _join_bwd)


def _qkv(counts: tuple[int, int], scale: float, interpret: bool) -> _Layout:
    n, k = counts
    return _Layout((n, k, k), 2, scale, interpret)


def _apart(layout: _Layout, x: jax.Array, rotary: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays of the layout from `x` `[B, S, heads H]`."""
    b, s, width = x.shape
    size = width // sum(layout.counts)
    out = [jax.ShapeDtypeStruct((b, count, s, size), x.dtype) for count in layout.counts]

    def block(*refs: Any) -> None:
        tables, (x_ref, *heads) = refs[: len(rotary)], refs[len(rotary) :]
        rotate = _rotation(tables, size)
        for index, head, lanes in _heads(layout, size):
            value = x_ref[:, lanes]
            value = rotate(value) if index < layout.rotated else value
            heads[index][head] = _scaled(value, layout.scale) if index == 0 else value

    return _run(block, [*rotary, x], out, layout.interpret)


def _together(
    layout: _Layout, arrays: Sequence[jax.Array], rotary: Sequence[jax.Array]
) -> jax.Array:
    """`[B, S, heads H]` from the arrays of the layout, by the operations of `_apart` reversed."""
    b, _, s, size = arrays[0].shape
    out = jax.ShapeDtypeStruct((b, s, sum(layout.counts) * size), arrays[0].dtype)

    def block(*refs: Any) -> None:
        tables, (*heads, x_ref) = refs[: len(rotary)], refs[len(rotary) :]
        rotate = _rotation(tables, size)
        for index, head, lanes in _heads(layout, size):
            value = heads[index][head]
            value = _scaled(value, layout.scale) if index == 0 else value
            x_ref[:, lanes] = rotate(value) if index < layout.rotated else value

    return _run(block, [*rotary, *arrays], [out], layout.interpret)[0]


def _heads(layout: _Layout, size: int) -> list[tuple[int, int, slice]]:
    """Array, head in it, and columns of each head side by side."""
    each = [(index, head) for index, count in enumerate(layout.counts) for head in range(count)]
    return [(*place, slice(i * size, (i + 1) * size)) for i, place in enumerate(each)]


def _rotation(tables: Sequence[Any], size: int) -> Callable[[jax.Array], jax.Array]:
    """`apply_rotary` for a block of one head, `[s, H]`."""
    if not tables:
        return lambda x: x
    cos, sin = (table[...] for table in tables)  # [s, R / 2]
    half = cos.shape[-1]
    cosines, sines = (jnp.concatenate(pair, axis=-1) for pair in ((cos, cos), (-sin, sin)))

    def rotate(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        first, second = wide[:, :half], wide[:, half : 2 * half]
        swapped = jnp.concatenate([second, first], axis=-1)
        rotated = (wide[:, : 2 * half] * cosines + swapped * sines).astype(x.dtype)
        rest = [x[:, 2 * half :]] if 2 * half < size else []
        return jnp.concatenate([rotated, *rest], axis=-1)

    return rotate


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    """`x * scale` in the dtype of `x`, by float32: not every TPU multiplies bfloat16."""
    if scale == 1:
        return x
    factor = float(np.asarray(scale, x.dtype))
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _run(
    block: Callable[..., None],
    operands: Sequence[jax.Array],
    out: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
) -> list[jax.Array]:
    """Run a kernel over blocks of positions, the last axis but one of all arrays."""
    from jax.experimental.pallas import tpu as pltpu

    length = operands[0].shape[-2]
    arrays: list[Any] = [*operands, *out]
    bytes_each = sum(
        math.prod(a.shape[1:-2]) * (-(-a.shape[-1] // LANES) * LANES) * a.dtype.itemsize
        for a in arrays
    )
    most = max(1, min(MAX_POSITIONS, BLOCK_BYTES // bytes_each))
    size = next(2**i for i in range(most.bit_length() - 1, -1, -1) if length % 2**i == 0)

    def spec(array: Any) -> pl.BlockSpec:
        *heads, _, width = array.shape[1:]
        return pl.BlockSpec(
            (None, *heads, size, width), lambda b, s: (b, *(0 for _ in heads), s, 0)
        )

    found: list[jax.Array] = pl.pallas_call(
        block,
        grid=(arrays[0].shape[0], length // size),
        in_specs=[spec(array) for array in operands],
        out_specs=[spec(array) for array in out],
        out_shape=list(out),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(*operands)
    return found
