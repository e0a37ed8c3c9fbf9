"""Pallas kernels for TPUs that multiply by a weight and add LoRA's update in one pass.

XLA computes `x W + h B`, `h` being the narrow side of the update, as two products and an addition
that reads and writes the output once more. Here `h B` is added to the sums of `x W` while they are
still on the chip (`matmul_add`). In the backward pass, `dy B^T` and `h^T dy` come from a single
pass over dy (`gradients`).

Shapes: M rows, I inputs, O outputs, R rank, L layers of a stack; m, n and k are the blocks of the
rows, of the columns of the result, and of the dimension that is summed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lora_flax.kernels.blocks import Platform, is_interpreted, padded
from lora_flax.layers.dropout import random_bits, threshold

# Most rows and columns of a block. A product of 1,024 x 1,024 takes 512 operations for each byte
# that it reads; chips need 166 (v5p) to 560 (v6e) to be bound by arithmetic. With float32 sums and
# two buffers of everything, blocks take 13 of the 16 MiB that a kernel has by default.
ROWS, COLUMNS = 1024, 1024
# Bytes of the summed dimension in a block: 512 bfloat16 values.
DEPTH_BYTES = 1024
# Blocks of rows for which `gradients` keeps its sums on the chip.
KEPT = 2
# Inputs and outputs must be multiples of this, the lanes of a TPU's registers.
LANES = 128
# R is padded to the rows of a bfloat16 tile.
TILE = 16
# Above, blocks of the update would no longer fit beside the weight's.
MAX_RANK = 256


class Added(NamedTuple):
    """An update's second product.

    Attributes:
        h: `[M, R]`.
        b: `[R, O]`, or `[I, R]` where the weight is transposed.
        words: uint32 `[M, 2]`, if dropout applies to this product (`lora_flax.layers.dropout`).
        rate: that dropout's rate.
        start: index of the product's first column among all of dropout's features, int32.
    """

    h: jax.Array
    b: jax.Array
    words: jax.Array | None = None
    rate: float = 0.0
    start: jax.Array | int = 0


def problem_of(shape: tuple[int, int], parts: tuple[int, int], rank: int) -> str:
    """Why the kernels do not support an update of that rank; empty if they do.

    Args:
        shape: `(I, O)` of the weight.
        parts: the number of parts that each side is cut into, one for a device.
        rank: R.
    """
    if any(size % (count * LANES) for size, count in zip(shape, parts, strict=True)):
        each = " on each device" if max(parts) > 1 else ""
        return f"{shape[0]} inputs and {shape[1]} outputs are not multiples of {LANES}{each}"
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}"
    return ""


def matmul_add(
    x: jax.Array,
    weights: jax.Array,
    index: jax.Array | int,
    added: Added,
    platform: Platform,
    transposed: bool = False,
) -> jax.Array:
    """`x @ w + h @ b` `[M, O]`, or transposed, `x @ w.T + h @ b.T` `[M, I]`; in x's dtype.

    The weight is read from its stack: slicing it before would write a copy of it.

    Args:
        x: `[M, I]`, or transposed `[M, O]`.
        weights: `[L, I, O]`, in x's dtype.
        index: which of them is w.
        added: the update, in x's dtype.
        platform: the TPU, or interpreted.
        transposed: multiply by the transposed weight.
    """
    from jax.experimental.pallas import tpu as pltpu

    rows, depth = x.shape
    width = weights.shape[1 if transposed else 2]
    m = _row_block(rows, ROWS if x.dtype.itemsize < 4 else ROWS // 2)
    n, rank = _block(width, COLUMNS), added.h.shape[1]
    k = _block(depth, DEPTH_BYTES // x.dtype.itemsize // (1 if rank <= LANES else 2))
    operands = [padded(x, m), weights, padded(padded(added.h, m), TILE, axis=1)]
    operands.append(padded(added.b, TILE, axis=1 if transposed else 0))
    rank = operands[2].shape[1]
    in_specs = [
        pl.BlockSpec((m, k), lambda row, own, step, _: (row, step)),
        pl.BlockSpec((None, n, k), lambda row, own, step, at: (at[0], own, step))
        if transposed
        else pl.BlockSpec((None, k, n), lambda row, own, step, at: (at[0], step, own)),
        pl.BlockSpec((m, rank), lambda row, own, step, _: (row, 0)),
        pl.BlockSpec((n, rank), lambda row, own, step, _: (own, 0))
        if transposed
        else pl.BlockSpec((rank, n), lambda row, own, step, _: (0, own)),
    ]
    if added.words is not None:
        operands.append(padded(added.words, m))
        in_specs.append(pl.BlockSpec((m, 2), lambda row, own, step, _: (row, 0)))
    grid = (operands[0].shape[0] // m, width // n, depth // k)
    size = x.dtype.itemsize
    product: jax.Array = pl.pallas_call(
        functools.partial(_step, transposed=transposed, rate=added.rate),
        out_shape=jax.ShapeDtypeStruct((operands[0].shape[0], width), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=pl.BlockSpec((m, n), lambda row, own, step, _: (row, own)),
            scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * width * (depth + _occupied(rank)),
            transcendentals=0,
            bytes_accessed=size * (rows * depth * grid[1] + depth * width * grid[0] + rows * width),
        ),
        interpret=is_interpreted(platform),
    )(jnp.stack([jnp.asarray(index, jnp.int32), jnp.asarray(added.start, jnp.int32)]), *operands)
    return product[:rows]


def _step(
    at_ref: Any,
    x_ref: Any,
    w_ref: Any,
    h_ref: Any,
    b_ref: Any,
    *refs: Any,
    transposed: bool,
    rate: float,
) -> None:
    """Adds one block of the summed dimension, and after the last one the update."""
    *words_ref, out_ref, sum_ref = refs
    side = 1 if transposed else 0

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += _dot(x_ref[...], w_ref[...], 1, side)
    own = pl.program_id(1)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        update = _dot(h_ref[...], b_ref[...], 1, side)
        if words_ref:
            width = update.shape[1]
            bits = random_bits(words_ref[0][...], width, at_ref[1] + own * width)
            update = jnp.where(bits >= threshold(rate), update / (1 - rate), 0.0)
        out_ref[...] = (sum_ref[...] + update).astype(out_ref.dtype)


def gradients(
    dy: jax.Array, b: jax.Array, h: jax.Array, platform: Platform
) -> tuple[jax.Array, jax.Array]:
    """`dy @ b.T` `[M, R]` in dy's dtype and `h.T @ dy` `[R, O]` in float32, reading dy once.

    Args:
        dy: `[M, O]`.
        b: `[R, O]`, in dy's dtype.
        h: `[M, R]`, in dy's dtype.
        platform: the TPU, or interpreted.
    """
    from jax.experimental.pallas import tpu as pltpu

    rows, width = dy.shape
    rank = h.shape[1]
    m = _row_block(rows, ROWS if dy.dtype.itemsize < 4 else ROWS // 2)
    n = _block(width, COLUMNS)
    blocks = min(KEPT, -(-rows // m))  # of rows, whose sums are kept together
    kept = blocks * m
    dy, h = padded(dy, kept), padded(padded(h, kept), TILE, axis=1)
    b = padded(b, TILE)
    parts, padded_rank = dy.shape[0] // kept, h.shape[1]
    g, db = pl.pallas_call(
        functools.partial(_gradients_step, m=m),
        out_shape=(
            jax.ShapeDtypeStruct((dy.shape[0], padded_rank), dy.dtype),
            jax.ShapeDtypeStruct((parts, padded_rank, width), jnp.float32),
        ),
        grid=(parts, width // n, blocks),
        in_specs=[
            pl.BlockSpec((m, n), lambda part, own, row: (part * blocks + row, own)),
            pl.BlockSpec((padded_rank, n), lambda part, own, row: (0, own)),
            pl.BlockSpec((kept, padded_rank), lambda part, own, row: (part, 0)),
        ],
        out_specs=(
            pl.BlockSpec((kept, padded_rank), lambda part, own, row: (part, 0)),
            pl.BlockSpec((None, padded_rank, n), lambda part, own, row: (part, 0, own)),
        ),
        scratch_shapes=[pltpu.VMEM((kept, padded_rank), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * rows * width * _occupied(padded_rank),
            transcendentals=0,
            bytes_accessed=dy.dtype.itemsize * rows * width + 4 * parts * padded_rank * width,
        ),
        interpret=is_interpreted(platform),
    )(dy, b, h)
    return g[:rows, :rank], db.sum(axis=0)[:rank]


def _gradients_step(
    dy_ref: Any, b_ref: Any, h_ref: Any, g_ref: Any, db_ref: Any, sum_ref: Any, *, m: int
) -> None:
    """One block of dy: its part of `dy b.T` for these rows, and of `h.T dy` for these columns."""
    own, row = pl.program_id(1), pl.program_id(2)
    rows = pl.ds(row * m, m)
    dy = dy_ref[...]
    g, db = _dot(dy, b_ref[...], 1, 1), _dot(h_ref[rows, :], dy, 0, 0)

    @pl.when(own == 0)
    def _() -> None:
        sum_ref[rows, :] = g

    @pl.when(own > 0)
    def _() -> None:
        sum_ref[rows, :] += g

    @pl.when(own == pl.num_programs(1) - 1)
    def _() -> None:
        g_ref[rows, :] = sum_ref[rows, :].astype(g_ref.dtype)

    @pl.when(row == 0)
    def _() -> None:
        db_ref[...] = db

    @pl.when(row > 0)
    def _() -> None:
        db_ref[...] += db


def _row_block(rows: int, most: int) -> int:
    """Rows of a block: as few blocks as possible, of equal size, in whole tiles."""
    each = -(-rows // -(-rows // most))
    return -(-each // TILE) * TILE


def _block(size: int, most: int) -> int:
    """The largest divisor of `size` up to `most` in whole registers, of 256 lanes if possible."""
    for unit in (2 * LANES, LANES):
        for block in range(most // unit * unit, 0, -unit):
            if size % block == 0:
                return block
    raise AssertionError(f"{size} is not a multiple of {LANES}")


def _occupied(rank: int) -> int:
    """Columns of the matrix unit that a rank takes."""
    return -(-rank // LANES) * LANES


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    product: jax.Array = jax.lax.dot_general(
        x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
    return product
