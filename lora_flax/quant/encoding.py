"""Encoding of quantized weights: 4 bits in blocks (NF4, FP4), 8 bits per output channel.

The numbers match bitsandbytes: the same codes, the same scales, the same double quantization
(Dettmers et al. 2023, arXiv:2305.14314). The memory layout does not: bitsandbytes stores a weight
as `[out, in]` with blocks of 64 values along a row; here a kernel is `[in, out]`, so a block is 64
values along a column, and a byte holds two values that are 32 apart. Unpacking therefore yields two
contiguous halves, which vector units and TPUs handle without moving individual values.

Shapes: I inputs, O outputs of one kernel.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["nf4", "fp4", "int8"]

BLOCK = 64  # weights that share a scale
BLOCK_BYTES = BLOCK // 2  # their 4-bit codes
_GRID = 2**16 - 1
NESTED_BLOCK = 256  # scales that share a scale, in double quantization

# Quantiles of the normal distribution (appendix E of the paper), and 1 sign, 2 exponent and 1
# mantissa bits; both match bitsandbytes, in code order.
CODES = {
    "nf4": np.array(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ],
        np.float32,
    ),
    "fp4": (
        np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12
    ).astype(np.float32),
}


class Encoded(NamedTuple):
    """A kernel `[I, O]` as codes and scales.

    Attributes:
        codes: uint8 `[I / 2, O]` for 4 bits (for each block of a column, rows 0 to 31 in the high
            half of the byte and 32 to 63 in the low half), or int8 `[I, O]`.
        absmax: the scales, float32 `[I / 64, O]`, or `[1, O]` for int8; uint8 with double
            quantization.
        nested_absmax: the scales of the scales, float32 `[ceil(I O / 64 / 256)]`; None without
            double quantization.
        offset: what was subtracted from the scales, float32 `[]`; likewise.
    """

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None = None
    offset: jax.Array | None = None


def dynamic_codes() -> np.ndarray:
    """The 256 values of an 8-bit scale, ascending, float32 (Dettmers 2016, arXiv:1511.04561).

    One sign bit, then a run of zeros that encodes a power of ten, a one, and a linear fraction in
    the remaining bits: bitsandbytes' `create_dynamic_map()`.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * means
        values += [*scaled, *-scaled]
    return np.sort(np.array(values, np.float32))


def _linspace(count: int) -> np.ndarray:
    """`torch.linspace(0.1, 1, count)`, bit for bit: a float32 step, counted from the nearer end."""
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(count - 1))
    index = np.arange(count)
    rising, falling = np.float32(0.1) + step * index, 1 - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def quantize(kernel: jax.Array, kind: Kind, double: bool) -> Encoded:
    """Quantizes a kernel.

    Args:
        kernel: `[I, O]`, any float dtype; for 4 bits I is a multiple of 64.
        kind: `nf4`, `fp4` or `int8`.
        double: quantize the scales of 4-bit blocks too.
    """
    wide = kernel.astype(jnp.float32)
    if kind == "int8":
        return _quantize_int8(wide)
    blocks = wide.reshape(-1, BLOCK, wide.shape[1])  # [I/64, 64, O]
    absmax = jnp.abs(blocks).max(axis=1)
    scaled = jnp.clip(blocks * (1 / _nonzero(absmax))[:, None], -1, 1)
    table = CODES[kind]
    order = np.argsort(table, kind="stable")
    middle = (table[order[:-1]] + table[order[1:]]) / np.float32(2)
    # Counting the bounds below a value gives the same result as a search, without a gather.
    rank = sum((scaled > bound).astype(jnp.uint8) for bound in middle)
    assert isinstance(rank, jax.Array)
    codes = pack(rank if kind == "nf4" else jnp.asarray(order, jnp.uint8)[rank])
    return Encoded(codes, *(_nest(absmax) if double else (absmax,)))


def dequantize(encoded: Encoded, kind: Kind, dtype: jnp.dtype) -> jax.Array:
    """The kernel `[I, O]` that `quantize` rounded; float32 until it is cast to `dtype`."""
    packed = encoded.codes
    if kind == "int8":
        wide = packed.astype(jnp.float32) * encoded.absmax
        return (wide * np.float32(1 / 127)).astype(dtype)
    halves = packed.reshape(-1, BLOCK_BYTES, packed.shape[-1])
    # Concatenate codes rather than values: the concatenation is written to memory, and codes take
    # the fewest bytes. The TPU compiler estimates half the cycles of concatenating values.
    codes = jnp.concatenate([halves >> 4, halves & 15], axis=1)
    values = look_up(codes, CODES[kind]) * block_scales(encoded)[:, None]
    return values.astype(dtype).reshape(-1, packed.shape[-1])


def block_scales(encoded: Encoded) -> jax.Array:
    """The scale of every block, float32 `[I / 64, O]`, with or without double quantization."""
    absmax = encoded.absmax
    if encoded.nested_absmax is None:
        return absmax
    assert encoded.offset is not None
    columns, rows = absmax.shape[1], absmax.shape[0]
    # bitsandbytes orders the blocks output by output.
    nested = jnp.repeat(encoded.nested_absmax, NESTED_BLOCK)[: rows * columns]
    nested = nested.reshape(columns, rows).T
    product = _dynamic_value(absmax) * nested
    # The maximum does not change the result, but keeps the compiler from fusing the product and the
    # sum, which rounds once where bitsandbytes rounds twice; optimization_barrier does not prevent
    # it.
    return jnp.maximum(product, jnp.finfo(jnp.float32).min) + encoded.offset


def pack(codes: jax.Array) -> jax.Array:
    """Packs 4-bit codes `[I / 64, 64, O]`, uint8, two to a byte: `[I / 2, O]`."""
    high, low = jnp.split(codes, 2, axis=1)
    return ((high << 4) | low).reshape(-1, codes.shape[-1])


def repack(packed: np.ndarray, absmax: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Converts the layout of bitsandbytes' 4-bit codes and of their scales to that of `Encoded`.

    Args:
        packed: uint8, two codes per byte in the order of the weight `[O, I]`, the first in the high
            half.
        absmax: one per block of 64, in the order of the weight; float32, or uint8 when nested.
        outputs: O.

    Raises:
        ValueError: if the sizes do not match.
    """
    flat = packed.reshape(-1)
    codes = np.stack([flat >> 4, flat & 0xF], axis=-1).reshape(outputs, -1, 2, BLOCK_BYTES)
    halves = np.moveaxis(codes, 0, -1)  # [I/64, 2, 32, O]
    ours = ((halves[:, 0] << 4) | halves[:, 1]).reshape(-1, outputs)
    return ours, np.ascontiguousarray(absmax.reshape(outputs, -1).T)


def _quantize_int8(kernel: jax.Array) -> Encoded:
    """bitsandbytes' `int8_vectorwise_quant` of a weight: one scale per output channel.

    Its outlier columns, which run in 16 bits, concern activations and are left out here.
    """
    absmax = jnp.abs(kernel).max(axis=0, keepdims=True)
    codes = jnp.round(kernel * (1 / _nonzero(absmax) * 127))
    return Encoded(codes.astype(jnp.int8), absmax)


def _nest(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales minus their mean, in 8 bits with blocks of 256 (section 3 of the QLoRA paper)."""
    flat = absmax.T.reshape(-1)
    offset = flat.mean()
    blocks = -(-flat.size // NESTED_BLOCK)
    filled = jnp.zeros(blocks * NESTED_BLOCK, jnp.float32).at[: flat.size].set(flat - offset)
    filled = filled.reshape(blocks, NESTED_BLOCK)
    nested = jnp.abs(filled).max(axis=1)
    value = jnp.clip(filled * (1 / _nonzero(nested))[:, None], -1, 1)
    point = ((value + 1) * 0.5 * _GRID + 0.5).astype(jnp.int32)
    chosen = jnp.asarray(_nearest_on_grid())[point].reshape(-1)[: flat.size]
    return chosen.reshape(absmax.shape[::-1]).T, nested, offset


def _nonzero(scale: jax.Array) -> jax.Array:
    """Replaces the scale of an all-zero block with 1."""
    return jnp.where(scale > 0, scale, 1)


@functools.cache
def _nearest_on_grid() -> np.ndarray:
    """The nearest of `dynamic_codes` at each of 65,536 points from -1 to 1, uint8.

    bitsandbytes' CPU build rounds to these points first, so this does the same.
    """
    codes = dynamic_codes()
    grid = np.arange(_GRID + 1) / _GRID * 2 - 1
    nearest: np.ndarray = np.abs(grid[:, None] - codes).argmin(axis=1).astype(np.uint8)
    return nearest


def _dynamic_value(codes: jax.Array) -> jax.Array:
    """`dynamic_codes()[codes]`."""
    table = dynamic_codes()

    def selected(codes: jax.Array) -> jax.Array:
        """127 negative values, 0, the same 127 positive, and 1."""
        distance = codes.astype(jnp.int32) - 127
        size = look_up(jnp.abs(distance), table[127:255])
        size = jnp.where(distance == 128, jnp.float32(1), size)
        return jnp.where(distance < 0, -size, size)

    # According to the TPU compiler's estimate, a gather there takes twice as long as the matmul
    # that needs it.
    values: jax.Array = jax.lax.platform_dependent(
        codes, tpu=selected, default=lambda codes: jnp.asarray(table)[codes]
    )
    return values


def look_up(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """`table[codes]` as a tree of selects, bit by bit, since vector units have no fast gather.

    The table's length must be a power of two.
    """
    level: list[jax.Array] = [jnp.float32(value) for value in table]
    for bit in range(len(table).bit_length() - 1):
        is_set = (codes >> bit) & 1 == 1
        level = [
            jnp.where(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0]
