"""Pallas kernels for TPUs and GPUs that dequantize 4-bit weights inside the matmul.

XLA writes a dequantized weight to memory and reads it back, many times the bytes of its codes; a
kernel avoids that, but dequantizes the weight once per block of rows. Which one is faster is
measured (`lora_flax.choose_matmul`).

A byte holds two values 32 inputs apart, so a kernel `[I, O]` consists of two halves `[I / 2, O]`:
the first 32 inputs of each block of 64, and the last 32. The inputs are split the same way, `[2, M,
I / 2]`, and the halves are never concatenated. Weights are rounded to x's dtype before they are
multiplied, as in the XLA version; sums are float32.

Shapes: M rows, I inputs, O outputs; m, n and k are the blocks of M, O and I / 2.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lora_flax.kernels.blocks import Platform, is_interpreted, padded
from lora_flax.quant import encoding
from lora_flax.quant.encoding import BLOCK, Encoded, Kind

HALF = BLOCK // 2
# Block sizes for I / 2 and O. On a TPU 256 codes have 8 scales, the rows of a float32 tile; a GPU's
# blocks must fit into its registers.
BLOCKS = {"tpu": (256, 512), "gpu": (64, 128)}
# Rows per dequantization of the weight; on a TPU a block of sums then takes 2 MiB.
MAX_ROWS = {"tpu": 1024, "gpu": 64}
# Rows of a bfloat16 tile, the minimum for a TPU's matrix unit and for a GPU's.
MIN_ROWS = 16


class _Plan(NamedTuple):
    """How one product is blocked: rows by m, and the weight's kept and summed sides."""

    platform: Platform
    transposed: bool
    m: int
    k: int
    n: int
    out_halves: int

    @property
    def kept(self) -> int:
        return self.k if self.transposed else self.n

    @property
    def summed(self) -> int:
        return self.n if self.transposed else self.k

    @property
    def out_block(self) -> tuple[int, int, int]:
        return (self.out_halves, self.m, self.kept)

    @property
    def interpret(self) -> bool:
        return is_interpreted(self.platform)


def fits(shape: tuple[int, int], kind: Kind) -> bool:
    """Whether the kernels support a weight `[I, O]`: 4 bits, I and O multiples of 512."""
    return kind != "int8" and shape[-2] % 512 == 0 and shape[-1] % 512 == 0


def matmul(x: jax.Array, encoded: Encoded, kind: Kind, platform: Platform) -> jax.Array:
    """`x @ kernel`, `[M, O]` in the dtype of x `[M, I]`; for one kernel."""
    plan = _plan(x.shape[0], platform, transposed=False)
    halves = jnp.moveaxis(padded(x, plan.m).reshape(-1, x.shape[1] // BLOCK, 2, HALF), 2, 0)
    out = _call(plan, halves.reshape(2, -1, x.shape[1] // 2), encoded, kind)
    return out[0, : x.shape[0]]


def matmul_transposed(
    gradient: jax.Array, encoded: Encoded, kind: Kind, platform: Platform
) -> jax.Array:
    """`gradient @ kernel.T`, `[M, I]` in the dtype of gradient `[M, O]`."""
    rows, half = gradient.shape[0], encoded.codes.shape[0]
    plan = _plan(rows, platform, transposed=True)
    out = _call(plan, padded(gradient, plan.m)[None], encoded, kind)
    joined = jnp.moveaxis(out.reshape(2, -1, half // HALF, HALF), 0, 2)
    return joined.reshape(-1, 2 * half)[:rows]


def _plan(rows: int, platform: Platform, transposed: bool) -> _Plan:
    kind = platform.removesuffix("_interpreted")
    power = 1 << (rows - 1).bit_length()  # as GPUs need it
    m = min(MAX_ROWS[kind], max(MIN_ROWS, power))
    return _Plan(platform, transposed, m, *BLOCKS[kind], out_halves=2 if transposed else 1)


def _call(plan: _Plan, x: jax.Array, encoded: Encoded, kind: Kind) -> jax.Array:
    """`[1, M, O]` from x `[2, M, I / 2]`, or transposed, `[2, M, I / 2]` from x `[1, M, O]`."""
    codes, scales = encoded.codes, encoding.block_scales(encoded)  # [I / 2, O], float32 [I / 64, O]
    width = codes.shape[0] if plan.transposed else codes.shape[1]
    out = jax.ShapeDtypeStruct((plan.out_halves, x.shape[1], width), x.dtype)
    tile = functools.partial(_tile, kind=kind, transposed=plan.transposed)
    run = _on_gpu if plan.platform.startswith("gpu") else _on_tpu
    return run(plan, tile, (x, codes, scales), out)


def _on_tpu(plan: _Plan, tile: Any, operands: Any, out: jax.ShapeDtypeStruct) -> jax.Array:
    """The last grid axis iterates over the summed dimension, in order."""
    from jax.experimental.pallas import tpu as pltpu

    x = operands[0]

    def weight(rows: int) -> pl.BlockSpec:
        if plan.transposed:
            return pl.BlockSpec((rows, plan.n), lambda row, own, step: (own, step))
        return pl.BlockSpec((rows, plan.n), lambda row, own, step: (step, own))

    product: jax.Array = pl.pallas_call(
        functools.partial(_step, tile),
        out_shape=out,
        grid=(x.shape[1] // plan.m, out.shape[2] // plan.kept, x.shape[2] // plan.summed),
        in_specs=[
            pl.BlockSpec((x.shape[0], plan.m, plan.summed), lambda row, own, step: (0, row, step)),
            weight(plan.k),
            weight(plan.k // HALF),
        ],
        out_specs=pl.BlockSpec(plan.out_block, lambda row, own, step: (0, row, own)),
        scratch_shapes=[pltpu.VMEM(plan.out_block, jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=plan.interpret,
    )(*operands)
    return product


def _step(
    tile: Any, x_ref: Any, codes_ref: Any, scales_ref: Any, out_ref: Any, sum_ref: Any
) -> None:
    """Accumulates one block of the summed dimension."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    x = [x_ref[half] for half in range(x_ref.shape[0])]
    for half, part in enumerate(tile(x, codes_ref[...], scales_ref[...])):
        sum_ref[half] += part

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _on_gpu(plan: _Plan, tile: Any, operands: Any, out: jax.ShapeDtypeStruct) -> jax.Array:
    """Grid blocks run in parallel here, so each loops over the summed dimension itself."""
    from jax.experimental.pallas import triton as plgpu

    x, codes, _ = operands

    def kernel(x_ref: Any, codes_ref: Any, scales_ref: Any, out_ref: Any) -> None:
        def step(index: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            at = pl.ds(index * plan.summed, plan.summed)
            own = [x_ref[half, :, at] for half in range(x.shape[0])]
            if plan.transposed:
                parts = tile(own, codes_ref[:, at], scales_ref[:, at])
            else:
                scales_at = pl.ds(index * (plan.k // HALF), plan.k // HALF)
                parts = tile(own, codes_ref[at, :], scales_ref[scales_at, :])
            return tuple(total + part for total, part in zip(sums, parts, strict=True))

        zero = jnp.zeros((plan.m, plan.kept), jnp.float32)
        steps = x.shape[2] // plan.summed
        sums = jax.lax.fori_loop(0, steps, step, (zero,) * plan.out_halves)
        for half, total in enumerate(sums):
            out_ref[half] = total.astype(out_ref.dtype)

    def weight(share: int) -> pl.BlockSpec:
        """Block spec for the codes, or for the scales, each of which covers 32 codes."""
        if plan.transposed:
            return pl.BlockSpec((plan.k // share, codes.shape[1]), lambda row, own: (own, 0))
        return pl.BlockSpec((codes.shape[0] // share, plan.n), lambda row, own: (0, own))

    product: jax.Array = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(x.shape[1] // plan.m, out.shape[2] // plan.kept),
        in_specs=[
            pl.BlockSpec((x.shape[0], plan.m, x.shape[2]), lambda row, own: (0, row, 0)),
            weight(1),
            weight(HALF),
        ],
        out_specs=pl.BlockSpec(plan.out_block, lambda row, own: (0, row, own)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=plan.interpret,
    )(*operands)
    return product


def _tile(
    x: list[jax.Array], codes: jax.Array, scales: jax.Array, kind: Kind, transposed: bool
) -> list[jax.Array]:
    """One weight block's contribution: `[m, n]`, or `[m, k]` for each half; float32.

    Args:
        x: both halves, each `[m, k]`, or if transposed a single `[m, n]`.
        codes, scales: `[k, n]` and `[k / 32, n]`.
    """
    wide = codes.astype(jnp.int32)
    weights = [_values(half, scales, kind, x[0].dtype) for half in (wide >> 4, wide & 15)]
    if transposed:
        return [_dot(x[0], weight, 1) for weight in weights]
    return [_dot(x[0], weights[0], 0) + _dot(x[1], weights[1], 0)]


def _values(codes: jax.Array, scales: jax.Array, kind: Kind, dtype: jnp.dtype) -> jax.Array:
    """Decodes 4-bit codes to values `[k, n]`."""
    k, n = codes.shape
    values = encoding.look_up(codes, encoding.CODES[kind]).reshape(k // HALF, HALF, n)
    return (values * scales[:, None]).reshape(k, n).astype(dtype)


def _dot(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    product: jax.Array = jax.lax.dot_general(
        x, weight, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )
    return product
