"""4-bit weights dequantised inside the multiplication: Pallas kernels for TPUs and GPUs.

XLA writes a dequantised weight to memory and reads it back, nine times the bytes of its codes. With
few rows, as in decoding, that is most of the time; with many it is little beside the arithmetic,
and a kernel dequantises a weight once for each block of rows. Which pays is measured
(`lora_flax.choose_matmul`).

A byte holds two values 32 inputs apart, so a kernel `[I, O]` is two halves `[I / 2, O]`: of each
block of 64 inputs the first 32 and the last. The inputs are split alike, `[2, M, I / 2]`, and no
kernel puts halves together. A weight is rounded to the type of x before it is multiplied, as XLA's
way does; sums are float32.

Shapes: M rows, I inputs, O outputs; m, n and k are the blocks of M, O and I / 2.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lora_flax import nf4
from lora_flax.nf4 import BLOCK, Arrays, QuantType

Platform = Literal["tpu", "gpu", "interpret"]

HALF = BLOCK // 2
# Of I / 2 and O. On a TPU 256 codes have 8 scales, the rows of a float32 tile; a GPU's blocks must
# fit into its registers.
BLOCKS = {"tpu": (256, 512), "interpret": (256, 512), "gpu": (64, 128)}
# A weight is dequantised once for so many rows; on a TPU a block of sums then takes 2 MiB.
MAX_ROWS = {"tpu": 1024, "interpret": 1024, "gpu": 64}
# Rows of a bfloat16 tile, which a TPU's matrix unit and a GPU's take at least.
MIN_ROWS = 16


def fits(arrays: Arrays, quant_type: QuantType) -> bool:
    """Whether the kernels take a weight: 4 bits, I and O multiples of 512."""
    half, outputs = arrays["codes"].shape[-2:]
    return quant_type != "int8" and half % 256 == 0 and outputs % 512 == 0


def matmul(x: jax.Array, arrays: Arrays, quant_type: QuantType, platform: Platform) -> jax.Array:
    """`x @ kernel`, `[M, O]` in the type of x `[M, I]`; the arrays are of one layer."""
    rows, outputs = x.shape[0], arrays["codes"].shape[1]
    m = _row_block(rows, platform)
    halves = jnp.moveaxis(_padded(x, m).reshape(-1, x.shape[1] // BLOCK, 2, HALF), 2, 0)
    halves = halves.reshape(2, -1, x.shape[1] // 2)  # [2, M, I / 2]
    out = _call(False, halves, arrays, quant_type, m, platform)
    return out.reshape(-1, outputs)[:rows]


def matmul_transposed(
    gradient: jax.Array, arrays: Arrays, quant_type: QuantType, platform: Platform
) -> jax.Array:
    """`gradient @ kernel.T`, `[M, I]` in the type of gradient `[M, O]`."""
    rows, half = gradient.shape[0], arrays["codes"].shape[0]
    m = _row_block(rows, platform)
    out = _call(True, _padded(gradient, m)[None], arrays, quant_type, m, platform)
    joined = jnp.moveaxis(out.reshape(2, -1, half // HALF, HALF), 0, 2)
    return joined.reshape(-1, 2 * half)[:rows]


def _row_block(rows: int, platform: Platform) -> int:
    """A power of two, as GPUs need it."""
    return min(MAX_ROWS[platform], max(MIN_ROWS, pl.next_power_of_2(rows)))


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))


def _call(
    transposed: bool,
    x: jax.Array,
    arrays: Arrays,
    quant_type: QuantType,
    m: int,
    platform: Platform,
) -> jax.Array:
    """`[1, M, O]` of x `[2, M, I / 2]`, or transposed `[2, M, I / 2]` of x `[1, M, O]`."""
    codes, scales = arrays["codes"], nf4.scales(arrays)  # [I / 2, O], float32 [I / 64, O]
    k, n = BLOCKS[platform]
    out_halves, kept, summed = (2, k, n) if transposed else (1, n, k)
    grid_kept = (codes.shape[0] // k) if transposed else (codes.shape[1] // n)
    steps = (codes.shape[1] // n) if transposed else (codes.shape[0] // k)
    tile = functools.partial(_tile, quant_type=quant_type, transposed=transposed)
    out = jax.ShapeDtypeStruct((out_halves, x.shape[1], grid_kept * kept), x.dtype)
    out_block = (out_halves, m, kept)
    x_halves = x.shape[0]

    def weight_block(kept_index, step):
        return (kept_index, step) if transposed else (step, kept_index)

    if platform == "gpu":
        return _on_gpu(tile, (x, codes, scales), out, out_block, steps, (k, n), summed, transposed)
    from jax.experimental.pallas import tpu as pltpu

    return pl.pallas_call(
        functools.partial(_step, tile),
        out_shape=out,
        grid=(x.shape[1] // m, grid_kept, steps),
        in_specs=[
            pl.BlockSpec((x_halves, m, summed), lambda row, own, step: (0, row, step)),
            pl.BlockSpec((k, n), lambda row, own, step: weight_block(own, step)),
            pl.BlockSpec((k // HALF, n), lambda row, own, step: weight_block(own, step)),
        ],
        out_specs=pl.BlockSpec(out_block, lambda row, own, step: (0, row, own)),
        scratch_shapes=[pltpu.VMEM(out_block, jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=platform == "interpret",
    )(x, codes, scales)


def _step(tile: Any, x_ref, codes_ref, scales_ref, out_ref, sum_ref) -> None:
    """One block of what is summed, on a TPU: the grid's last axis goes through them in order."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    x = [x_ref[half] for half in range(x_ref.shape[0])]
    for half, part in enumerate(tile(x, codes_ref[...], scales_ref[...])):
        sum_ref[half] += part

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _on_gpu(tile, operands, out, out_block, steps, weight_block, summed, transposed):
    """The same where blocks of a grid run at once: each goes through what is summed by itself."""
    from jax.experimental.pallas import triton as plgpu

    x, codes, _ = operands
    halves, m, kept = out_block
    k, n = weight_block

    def kernel(x_ref, codes_ref, scales_ref, out_ref):
        def step(index, sums):
            at = pl.ds(index * summed, summed)
            scale_at = pl.ds(index * (k // HALF), k // HALF)
            own = [x_ref[half, :, at] for half in range(x_ref.shape[0])]
            if transposed:
                parts = tile(own, codes_ref[:, at], scales_ref[:, at])
            else:
                parts = tile(own, codes_ref[at, :], scales_ref[scale_at, :])
            return tuple(total + part for total, part in zip(sums, parts, strict=True))

        sums = jax.lax.fori_loop(0, steps, step, (jnp.zeros((m, kept), jnp.float32),) * halves)
        for half, total in enumerate(sums):
            out_ref[half] = total.astype(out_ref.dtype)

    if transposed:
        specs = [pl.BlockSpec((rows, codes.shape[1]), lambda row, own: (own, 0))
                 for rows in (k, k // HALF)]  # fmt: skip
    else:
        specs = [pl.BlockSpec((rows, n), lambda row, own: (0, own))
                 for rows in (codes.shape[0], codes.shape[0] // HALF)]  # fmt: skip
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(x.shape[1] // m, out.shape[2] // kept),
        in_specs=[pl.BlockSpec((x.shape[0], m, x.shape[2]), lambda row, own: (0, row, 0)), *specs],
        out_specs=pl.BlockSpec(out_block, lambda row, own: (0, row, own)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    )(*operands)


def _tile(
    x: list[jax.Array], codes, scales, quant_type: QuantType, transposed: bool
) -> list[jax.Array]:
    """What a block of the weight adds: `[m, n]`, or of each half `[m, k]`; float32.

    Args:
        x: both halves, each `[m, k]`, or transposed one `[m, n]`.
        codes, scales: `[k, n]` and `[k / 32, n]`.
    """
    wide = codes.astype(jnp.int32)
    weights = [_values(half, scales, quant_type, x[0].dtype) for half in (wide >> 4, wide & 15)]
    if transposed:
        return [_dot(x[0], weight, 1) for weight in weights]
    return [_dot(x[0], weights[0], 0) + _dot(x[1], weights[1], 0)]


def _values(codes, scales, quant_type: QuantType, dtype) -> jax.Array:
    """`[k, n]` of 4-bit codes."""
    k, n = codes.shape
    values = nf4.look_up(codes, nf4.CODES[quant_type]).reshape(k // HALF, HALF, n)
    return (values * scales[:, None]).reshape(k, n).astype(dtype)


def _dot(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(
        x, weight, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )
