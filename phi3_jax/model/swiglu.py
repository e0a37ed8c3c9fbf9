"""SwiGLU's activation (Shazeer 2020), and a kernel for its gradient on TPUs.

XLA computes the gradient of `up * silu(gate)` inside the matrix products that read it. A kernel
that reads it needs it as one array, which XLA puts together from two in a pass of its own; here a
Pallas kernel writes both halves in place.

Shapes: B rows, S positions, F intermediate_size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from phi3_jax.model.remat import LANES, saved

# Where the gradient's kernel runs; the interpreted version runs anywhere, for tests.
Kernel = Literal["tpu", "interpreted"] | None
# Rows and columns of a block.
BLOCK = (512, 1024)


def swiglu(gate_up: jax.Array, kernel: Kernel = None) -> jax.Array:
    """`up * silu(gate)` `[B, S, F]` of `gate_up` `[B, S, 2 F]`, columns in the order gate, up.

    Args:
        gate_up: both projections.
        kernel: computes the gradient, where F is a multiple of 128 and no mesh axis cuts F or
            leaves parts of unequal size; None leaves it to XLA.
    """
    b, s, width = gate_up.shape
    mesh = jax.sharding.get_abstract_mesh()
    size = {axis: mesh.shape.get(axis, 1) for axis in ("data", "fsdp", "sequence", "tensor")}
    even = b % (size["data"] * size["fsdp"]) == 0 and s % size["sequence"] == 0
    if kernel and width % (2 * LANES) == 0 and size["tensor"] == 1 and even:
        activated: jax.Array = _activated(kernel == "interpreted", gate_up)
        return activated
    return _product(*_halves(gate_up))


def _halves(gate_up: jax.Array) -> tuple[jax.Array, jax.Array]:
    half = gate_up.shape[-1] // 2
    # Kept one by one: of an array that it reads twice, XLA for TPUs first makes a copy.
    return saved(gate_up[..., :half], "gate_up"), saved(gate_up[..., half:], "gate_up")


def _product(gate: jax.Array, up: jax.Array) -> jax.Array:
    return up * jax.nn.silu(gate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activated(interpret: bool, gate_up: jax.Array) -> jax.Array:
    return _product(*_halves(gate_up))


def _fwd(interpret: bool, gate_up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    gate, up = _halves(gate_up)
    return _product(gate, up), (gate, up)


def _bwd(
    interpret: bool, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array]:
    run: Callable[..., jax.Array] = functools.partial(_gradient, interpret=interpret)
    if not jax.sharding.get_abstract_mesh().empty:
        rows = PartitionSpec(("data", "fsdp"), "sequence")
        run = jax.shard_map(run, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False)
    return (run(*residuals, gradient),)


_activated.defvjp(_fwd, _bwd)


def _gradient(gate: jax.Array, up: jax.Array, gradient: jax.Array, interpret: bool) -> jax.Array:
    """The gradient of gate and up side by side, `[B, S, 2 F]`."""
    b, s, f = gate.shape
    rows, columns = min(BLOCK[0], b * s), _columns(f)
    blocks = f // columns
    each = pl.BlockSpec((rows, columns), lambda row, column, half: (row, column))
    out: jax.Array = pl.pallas_call(
        _block,
        out_shape=jax.ShapeDtypeStruct((b * s, 2 * f), gate.dtype),
        grid=(-(-b * s // rows), blocks, 2),
        in_specs=[each] * 3,
        out_specs=pl.BlockSpec(
            (rows, columns), lambda row, column, half: (row, half * blocks + column)
        ),
        interpret=interpret,
    )(*(array.reshape(b * s, f) for array in (gate, up, gradient)))
    return out.reshape(b, s, 2 * f)


def _columns(f: int) -> int:
    return next(n for n in range(BLOCK[1], 0, -LANES) if f % n == 0)


def _block(gate_ref: Any, up_ref: Any, gradient_ref: Any, out_ref: Any) -> None:
    gate, gradient = (ref[...].astype(jnp.float32) for ref in (gate_ref, gradient_ref))
    share = jax.nn.sigmoid(gate)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        own = up_ref[...].astype(jnp.float32) * share * (1 + gate * (1 - share))
        out_ref[...] = (gradient * own).astype(out_ref.dtype)

    @pl.when(pl.program_id(2) == 1)
    def _() -> None:
        out_ref[...] = (gradient * gate * share).astype(out_ref.dtype)
